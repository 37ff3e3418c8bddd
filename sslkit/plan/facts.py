"""What a plan depends on: the images, the machine and the time."""

from dataclasses import dataclass

from sslkit.data.loading.loader import cores_of_a_process
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.image_checks import summarise_images
from sslkit.doctor.machine_checks import GIB, memory_of_device, training_device
from sslkit.errors import UserError
from sslkit.text import pluralize

MIN_IMAGES = 32  # fewer give no batch worth learning from


@dataclass(frozen=True)
class Facts:
    """What the rules may use.

    Attributes:
        count: Number of images.
        height: Median height in pixels of a sample of the images.
        width: Median width.
        grey: Whether all sampled images are greyscale.
        classes: Number of labels; 0 if the images have none. Used to monitor the run, not to train.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        memory: Of the device, in bytes.
        cores: Usable by this process.
        hours: Time for the run.
    """

    count: int
    height: int
    width: int
    grey: bool
    classes: int
    device: str
    memory: int
    cores: int
    hours: float

    @property
    def short_side(self) -> int:
        """The shorter side of the median image, in pixels."""
        return min(self.height, self.width)

    def describe(self) -> str:
        """One line about images, machine and time."""
        images = f"{self.count} {'grey' if self.grey else 'colour'} images of about {self.width} x {self.height} pixels"
        kind = {"cpu": f"CPU with {pluralize(self.cores, 'core')}", "cuda": "GPU", "mps": "Apple GPU"}[self.device]
        return f"{images}; {kind}, {self.memory / GIB:.0f} GiB"


def gather_facts(source: ImageSource, hours: float) -> Facts:
    """Read a sample of the images, and look at the machine.

    Raises:
        UserError: There are too few images to train on.
    """
    if len(source) < MIN_IMAGES:
        raise UserError(
            f"--data: {source.description} has {pluralize(len(source), 'image')}; pretraining needs {MIN_IMAGES} or "
            "more, and begins to help with some thousands. Use public weights as they are: sslkit eval knn with a timm "
            "name such as resnet18.a1_in1k"
        )
    images, device = summarise_images(source), training_device()
    return Facts(
        count=len(source),
        height=images.height,
        width=images.width,
        grey=images.grey,
        classes=_count_classes(source),
        device=device.type,
        memory=memory_of_device(device),
        cores=cores_of_a_process(1),
        hours=hours,
    )


def _count_classes(source: ImageSource) -> int:
    try:
        return len(set(source.labels()))
    except UserError:
        return 0
