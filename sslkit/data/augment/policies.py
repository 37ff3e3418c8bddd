"""Named view policies, with the numbers and the transforms of the papers' official code.

A policy is a set of values, not code: a recipe states them and may override each.

``moco_*`` and ``swav`` follow torchvision and Pillow. ``simclr`` and ``byol`` follow the TensorFlow and JAX code of
their authors: google-research/simclr ``data_util.py`` and deepmind-research ``byol/utils``. Three differences remain:

- A crop is rounded to 8 bits after the resize, and a view once more at the end. What comes between is computed in
  floats, as in the official code, which never rounds.
- SimCLR's official code clips the overshoot of its bicubic resize after the first jitter step, not before it as here.
- SimCLR's official code draws one sigma of the blur for all images of a replica's batch; here each view has its own.

docs/reproduce.md has the measured size of each.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LARGE_VIEWS = 2
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
PerView = Probability | tuple[Probability, Probability]
Range = tuple[float, float]
PerChannel = tuple[float, ...]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Defaults of every policy over those of `ViewsConfig`; sources in docs/methods.md.
POLICIES: dict[str, dict[str, Any]] = {
    "moco_v1": {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_prob": 1.0, "gray_first": True, "blur_prob": 0.0},
    "moco_v2": {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_prob": 0.8, "blur_prob": 0.5},
    "moco_v3": {
        "crop_scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "jitter_prob": 0.8,
        "blur_prob": (1.0, 0.1),
        "solarize_prob": (0.0, 0.2),
    },
    # Pixels in [0, 1] are not normalised further.
    "simclr": {
        "crop_scale": (0.08, 1.0),
        "crop_sampler": "tensorflow",
        "min_object_covered": 0.1,
        "interpolation": "bicubic",
        "resize": "tensorflow_v1",
        "transforms": "tensorflow",
        "jitter": (0.8, 0.8, 0.8, 0.2),
        "jitter_prob": 0.8,
        "blur_prob": 0.5,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    },
    "byol": {
        "crop_scale": (0.08, 1.0),
        "crop_sampler": "clamped",
        "interpolation": "bicubic",
        "resize": "tensorflow",
        "transforms": "tensorflow",
        "brightness": "add",
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "jitter_prob": 0.8,
        "blur_prob": (1.0, 0.1),
        "solarize_prob": (0.0, 0.2),
    },
    "swav": {
        "crop_scale": (0.14, 1.0),
        "small_crops": 6,
        "jitter": (0.8, 0.8, 0.8, 0.2),
        "jitter_prob": 0.8,
        "blur_prob": 0.5,
        "std": (0.228, 0.224, 0.225),
    },
    "moco_cifar10": {
        "size": 32,
        "crop_scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "jitter_prob": 0.8,
        "blur_prob": 0.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "crop_pct": 1.0,
    },
    # Colour does nothing on grey images, and half a 28-pixel shoe is not a shoe.
    "small_gray": {
        "size": 32,
        "crop_scale": (0.3, 1.0),
        "jitter": (0.4, 0.4, 0.0, 0.0),
        "jitter_prob": 0.8,
        "gray_prob": 0.0,
        "blur_prob": 0.0,
        "crop_pct": 1.0,
    },
}

# Keys that resolved recipes did not state before the policies "simclr" and "byol" followed TensorFlow.
LATER_KEYS = ("crop_sampler", "min_object_covered", "resize", "transforms", "brightness")


class ViewsConfig(BaseModel):
    """The ``[views]`` table. Probabilities may be one number, or one per view; what is not given is the policy's.

    Attributes:
        policy: Which of `POLICIES` fills in what is not given.
        size: Side of the two square views in pixels.
        crop_scale: Area of a random resized crop as a share of the image.
        small_crops: Further views, small ones (SwAV's multi-crop). Of probabilities given per view, they have the
            second's.
        small_size: Their side in pixels.
        small_scale: Their area as a share of the image.
        crop_ratio: Width over height of the crop.
        crop_sampler: How the crop is drawn. ``torchvision`` (`RandomResizedCrop`): area uniform, ratio log-uniform,
            drawn again while it does not fit, ten times at most. ``clamped`` (BYOL): the same, but a side that does not
            fit is cut to the image's. ``tensorflow`` (SimCLR, `tf.image.sample_distorted_bounding_box`): ratio uniform,
            height uniform between the least and the largest that area and image allow, 100 attempts, then the whole
            image; small areas are more frequent.
        min_object_covered: For the ``tensorflow`` sampler: a crop of less than this share of the image is drawn again.
            Not for small crops.
        interpolation: Of the crop's resize.
        resize: Which pixels a resize reads. ``antialias``: shrinking averages, as Pillow and torchvision do it.
            ``tensorflow`` (`tf.image.resize`): four pixels a direction (bilinear: two), whatever the scale, cubic with
            a = -0.5. ``tensorflow_v1`` (`tf.compat.v1.image.resize_bicubic`): cubic with a = -0.75, and output pixel i
            reads at i times the scale, without the half-pixel offset. Only ``antialias`` allows decoding large JPEGs at
            a lower resolution.
        transforms: Whose jitter, grey and blur. ``torchvision`` (as on Pillow images): contrast about the mean of the
            grey image, saturation by blending with grey, blur with mirrored edges, 8 bits between the steps.
            ``tensorflow``: contrast about each channel's mean, saturation in HSV, a blur kernel as wide as a tenth of
            the view with zeros beyond the edges, floats between the steps.
        brightness: ``multiply`` pixels by a factor, or ``add`` a share of the full scale (BYOL).
        jitter: Strengths of brightness, contrast, saturation and hue, applied in random order.
        jitter_prob: How often colours are jittered.
        gray_prob: How often a view turns grey.
        gray_first: Whether grey comes before the jitter (MoCo v1) or after (all later papers).
        blur_prob: How often a view is blurred.
        blur_sigma: Range of the Gaussian's standard deviation in pixels.
        solarize_prob: How often values from 128 up are inverted.
        flip_prob: How often a view is mirrored.
        rotate_degrees: Largest rotation to either side; 0 leaves rotation out (no paper here rotates).
        erase_prob: How often a rectangle of the view is blanked (no paper here erases).
        erase_scale: Its area as a share of the view.
        mean: Per-channel mean that views are normalised by on the device, for values in [0, 1]; as many numbers as the
            images have channels.
        std: Per-channel standard deviation, likewise.
        crop_pct: At evaluation, the share of the shorter side that the centre crop keeps (224 of 256 = 0.875).
        device: Where all that follows the crop is done: on the ``cpu`` by the data workers, or on the ``accelerator``
            that the model computes on, a batch at a time. Draws are the same; pixels differ by rounding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    policy: str
    size: int = Field(default=224, ge=8, le=4096)
    crop_scale: Range = (0.2, 1.0)
    small_crops: int = Field(default=0, strict=True, ge=0, le=100)
    small_size: int = Field(default=96, strict=True, ge=8, le=4096)
    small_scale: Range = (0.05, 0.14)
    crop_ratio: Range = (0.75, 4 / 3)
    crop_sampler: Literal["torchvision", "clamped", "tensorflow"] = "torchvision"
    min_object_covered: Probability = 0.1
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    resize: Literal["antialias", "tensorflow", "tensorflow_v1"] = "antialias"
    transforms: Literal["torchvision", "tensorflow"] = "torchvision"
    brightness: Literal["multiply", "add"] = "multiply"
    jitter: tuple[float, float, float, float]
    jitter_prob: PerView
    gray_prob: PerView = 0.2
    gray_first: bool = False
    blur_prob: PerView
    blur_sigma: Range = (0.1, 2.0)
    solarize_prob: PerView = 0.0
    flip_prob: PerView = 0.5
    rotate_degrees: float = Field(default=0.0, ge=0.0, le=180.0)
    erase_prob: PerView = 0.0
    erase_scale: Range = (0.05, 0.2)
    mean: PerChannel = IMAGENET_MEAN
    std: PerChannel = IMAGENET_STD
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    device: Literal["cpu", "accelerator"] = "cpu"

    @field_validator("crop_scale", "small_scale", "erase_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _ordered(cls, value: Range) -> Range:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError("must be two positive numbers, the smaller first")
        return value

    @field_validator("crop_scale", "small_scale", "erase_scale")
    @classmethod
    def _share(cls, value: Range) -> Range:
        if value[1] > 1.0:
            raise ValueError("is a share of the image's area, so at most 1")
        return value

    @field_validator("jitter")
    @classmethod
    def _strengths(cls, value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        if min(value) < 0.0 or value[3] > 0.5:
            raise ValueError("must be four strengths from 0 up, hue at most 0.5")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: PerChannel) -> PerChannel:
        if not value or min(value) <= 0.0:
            raise ValueError("must be positive numbers, one a channel")
        return value

    @model_validator(mode="after")
    def _crops_possible(self) -> Self:
        if self.crop_sampler == "tensorflow" and self.min_object_covered > self.crop_scale[1]:
            raise ValueError(
                f"min_object_covered: must be at most crop_scale's upper number, {self.crop_scale[1]:g}, not "
                f"{self.min_object_covered:g}; a smaller crop is never taken"
            )
        return self

    @property
    def channels(self) -> int:
        """How many channels the views have."""
        return len(self.mean)

    def unfit_for(self, channels: int) -> list[str]:
        """What of these views images of so many channels cannot have, in sentences that begin with the key."""
        found = [
            f"{key}: {len(values)} numbers, where images have {channels} channels ([backbone] args in_chans); sslkit "
            f"data check DIR --channels {channels} prints the right ones"
            for key, values in (("mean", self.mean), ("std", self.std))
            if len(values) != channels
        ]
        if channels == 3:
            return found
        if self.jitter[2] or self.jitter[3]:
            found.append("jitter: saturation and hue are of three colours; its last two numbers must be 0")
        if self.gray_prob not in (0.0, (0.0, 0.0)):
            found.append("gray_prob: turning grey is of three colours; it must be 0")
        if self.device != "cpu":
            found.append("device: views of other than three channels are finished on the 'cpu'")
        return found


def fill_policy(views: dict[str, Any]) -> dict[str, Any]:
    """A ``[views]`` table with what it does not give taken from its policy, which must be a known one."""
    return {**POLICIES[views["policy"]], **views}


def fill_later_keys(views: dict[str, Any]) -> dict[str, Any]:
    """The ``[views]`` table that a run saved, with `LATER_KEYS` if it is older than they are.

    Such a table states every other key. The run made the views of `ViewsConfig`'s defaults.
    """
    if not states_all_others(views):
        return views
    return {**{key: ViewsConfig.model_fields[key].default for key in LATER_KEYS}, **views}


def states_all_others(views: dict[str, Any]) -> bool:
    """Whether a ``[views]`` table states every key but `LATER_KEYS`, as recipes resolved before them do."""
    return ViewsConfig.model_fields.keys() - LATER_KEYS <= views.keys()
