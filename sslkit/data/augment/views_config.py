"""The ``[views]`` table of a recipe: how each view is made, for all views and by role."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from sslkit.data.augment.policies import IMAGENET_MEAN, IMAGENET_STD, POLICIES
from sslkit.data.augment.user_pipeline import SUFFIXES, UserPipeline
from sslkit.data.augment.view_layers import (
    EARLIER_KEYS,
    LOCAL_DEFAULTS,
    ROLES,
    layer_views,
    read_pipelines,
    with_present_keys,
)
from sslkit.errors import near_miss

NUM_GLOBAL_VIEWS = 2
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]
PerChannel = tuple[float, ...]
Transforms = Annotated[
    Annotated[Literal["torchvision", "tensorflow"], Tag("name")] | Annotated[UserPipeline, Tag("table")],
    Discriminator(lambda value: "table" if isinstance(value, dict | UserPipeline) else "name"),
]

# Keys that resolved recipes did not state before the policies "simclr" and "byol" followed TensorFlow.
LATER_KEYS = ("crop_sampler", "min_object_covered", "resize", "transforms", "brightness")


class ViewPolicy(BaseModel):
    """How one view is made of an image.

    Attributes:
        size: Side of the square view in pixels.
        crop_scale: Area of the random resized crop as a share of the image.
        crop_ratio: Width over height of the crop.
        crop_sampler: How the crop is drawn. ``torchvision`` (`RandomResizedCrop`): area uniform, ratio log-uniform; a
            crop that does not fit is drawn again, up to ten times. ``clamped`` (BYOL): the same, but a side that does
            not fit is cut to the image's. ``tensorflow`` (SimCLR, `tf.image.sample_distorted_bounding_box`): ratio and
            height uniform. ``none``: no crop, for a pipeline file that crops itself.
        min_object_covered: For the ``tensorflow`` sampler: a crop of less than this share of the image is drawn again.
        interpolation: Of the crop's resize.
        resize: Which pixels a resize reads. ``antialias``: shrinking averages, as in Pillow and torchvision.
            ``tensorflow`` (`tf.image.resize`): four pixels a direction (bilinear: two), whatever the scale, cubic with
            a = -0.5. ``tensorflow_v1`` (`tf.compat.v1.image.resize_bicubic`): cubic with a = -0.75, and output pixel i
            reads at i times the scale, without the half-pixel offset. Only ``antialias`` allows decoding large JPEGs at
            a lower resolution.
        transforms: What follows the crop. ``torchvision`` (as on Pillow images): contrast about the mean of the grey
            image, saturation by blending with grey, blur with mirrored edges, 8 bits between the steps.
            ``tensorflow``: contrast about each channel's mean, saturation in HSV, a blur kernel as wide as a tenth of
            the view with zeros beyond the edges, floats between the steps. The path of a file (.yaml, .yml, .json) that
            `albumentations.save` wrote: that pipeline, instead of all steps below.
        brightness: ``multiply`` pixels by a factor, or ``add`` a share of the full scale (BYOL).
        jitter: Strengths of brightness, contrast, saturation and hue, applied in random order.
        jitter_prob: Probability of the jitter.
        gray_prob: Probability that the view is converted to grey.
        gray_first: Whether grey comes before the jitter (MoCo v1) or after (all later papers).
        blur_prob: Probability of a Gaussian blur.
        blur_sigma: Range of its standard deviation in pixels.
        solarize_prob: Probability that values from 128 up are inverted.
        flip_prob: Probability that the view is mirrored left to right.
        rotate_degrees: Largest rotation in either direction; 0 for none (no paper here rotates).
        erase_prob: Probability that a rectangle of the view is set to black (no paper here erases).
        erase_scale: Area of the rectangle as a share of the view.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    size: int = Field(default=224, ge=8, le=4096)
    crop_scale: Range = (0.2, 1.0)
    crop_ratio: Range = (0.75, 4 / 3)
    crop_sampler: Literal["torchvision", "clamped", "tensorflow", "none"] = "torchvision"
    min_object_covered: Probability = 0.1
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    resize: Literal["antialias", "tensorflow", "tensorflow_v1"] = "antialias"
    transforms: Transforms = "torchvision"
    brightness: Literal["multiply", "add"] = "multiply"
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_prob: Probability = 0.0
    gray_prob: Probability = 0.2
    gray_first: bool = False
    blur_prob: Probability = 0.0
    blur_sigma: Range = (0.1, 2.0)
    solarize_prob: Probability = 0.0
    flip_prob: Probability = 0.5
    rotate_degrees: float = Field(default=0.0, ge=0.0, le=180.0)
    erase_prob: Probability = 0.0
    erase_scale: Range = (0.05, 0.2)

    @field_validator("crop_scale", "erase_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _ordered(cls, value: Range, info: ValidationInfo) -> Range:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError("must be two positive numbers, the smaller first")
        if info.field_name in ("crop_scale", "erase_scale") and value[1] > 1.0:
            raise ValueError("is a share of the image's area, so at most 1")
        return value

    @field_validator("transforms", mode="before")
    @classmethod
    def _known_transforms(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("torchvision", "tensorflow"):
            raise ValueError(f"must be 'torchvision', 'tensorflow' or a pipeline file ({', '.join(SUFFIXES)})")
        return value

    @field_validator("jitter")
    @classmethod
    def _strengths(cls, value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        if min(value) < 0.0 or value[3] > 0.5:
            raise ValueError("must be four strengths from 0 up, hue at most 0.5")
        return value

    @property
    def pipeline(self) -> UserPipeline | None:
        """The user's own pipeline, if there is one."""
        return self.transforms if isinstance(self.transforms, UserPipeline) else None

    def fault(self) -> str:
        """Which values do not go together, in a sentence that begins with the key; empty if all do."""
        if self.crop_sampler == "tensorflow" and self.min_object_covered > self.crop_scale[1]:
            return (
                f"min_object_covered: must be at most crop_scale's upper number, {self.crop_scale[1]:g}, not "
                f"{self.min_object_covered:g}; a smaller crop is never taken"
            )
        if self.crop_sampler == "none" and self.pipeline is None:
            return "crop_sampler: 'none' is for a pipeline file that crops ([views] transforms); take 'torchvision'"
        if self.pipeline and self.crop_sampler != "none" and (crops := self.pipeline.crops()):
            return (
                f"transforms: the pipeline crops ({crops[0]}) after sslkit has cropped; set [views] crop_sampler = "
                f"'none', so that it gets whole images, or leave {crops[0]} out"
            )
        return ""


class RoleTable(ViewPolicy):
    """``[views.global1]``, ``[views.global2]``: what replaces ``[views]`` for a role. Unset fields have no meaning."""

    def overrides(self) -> dict[str, Any]:
        """The values that are set for views of this role."""
        return {key: getattr(self, key) for key in ViewPolicy.model_fields if key in self.model_fields_set}

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if type(self) is RoleTable and "size" in self.model_fields_set:
            raise ValueError("size: both global views have [views] size; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _only_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


class LocalTable(RoleTable):
    """``[views.local]``: the number per image of small crops (multi-crop), and what replaces ``[views]`` for them.

    Its ``size`` in pixels, ``crop_scale`` and ``min_object_covered`` have defaults of their own.
    """

    count: int = Field(default=0, strict=True, ge=0, le=100)


class ViewsConfig(ViewPolicy):
    """The ``[views]`` table: values for all views, and one table per role for what differs in it.

    Two global views are made of each image, of roles ``global1`` and ``global2``, and ``local.count`` local ones. The
    values in ``[views]`` are always those of the last role, so that equal views have equal tables.

    Attributes:
        policy: Which of `POLICIES` fills in what is not given.
        global1: What replaces ``[views]`` for the first global view.
        global2: The same for the second one.
        local: The number of small crops, and what replaces ``[views]`` for them.
        mean: Mean of each channel that views are normalised by on the device, for values in [0, 1].
        std: Standard deviation of each channel, likewise.
        crop_pct: In evaluation, the share of the shorter side that the centre crop keeps (224 of 256 = 0.875).
        device: Where the steps after the crop are done: on the ``cpu`` by the data workers, or on the ``accelerator`` a
            batch at a time. The random parameters are the same; pixels differ by rounding.
    """

    policy: str
    jitter: tuple[float, float, float, float]
    jitter_prob: Probability
    blur_prob: Probability
    global1: RoleTable = RoleTable()
    global2: RoleTable = RoleTable()
    local: LocalTable = LocalTable()
    mean: PerChannel = IMAGENET_MEAN
    std: PerChannel = IMAGENET_STD
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    device: Literal["cpu", "accelerator"] = "cpu"

    @classmethod
    def of_policy(cls, policy: str, **changes: Any) -> "ViewsConfig":
        """The views of a named policy, with changes as a recipe's ``[views]`` makes them."""
        return cls.model_validate(layer_views(POLICIES[policy], {"policy": policy, **changes}))

    @model_validator(mode="before")
    @classmethod
    def _present_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = with_present_keys(value)
        for earlier, key in EARLIER_KEYS.items():
            if earlier in value:
                raise ValueError(f"{earlier}: earlier name of [views.local] {key}, which is given too; leave it out")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: PerChannel) -> PerChannel:
        if not value or min(value) <= 0.0:
            raise ValueError("must be positive numbers, one a channel")
        return value

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        """Write equal views in one way: a value in ``[views]`` is that of the last role."""
        resolved = {role: self._resolved(role) for role in ROLES}
        last = resolved["local" if self.local.count else "global2"]
        base = {key: (resolved["global2"] if key in LOCAL_DEFAULTS else last)[key] for key in last}
        for role in ROLES:
            expected, kept, table = base, dict[str, Any](), RoleTable
            if role == "local":
                expected = {**(base if self.local.count else resolved[role]), **dict.fromkeys(LOCAL_DEFAULTS)}
                kept, table = {"count": self.local.count}, LocalTable
            kept |= {key: value for key, value in resolved[role].items() if value != expected[key]}
            object.__setattr__(self, role, table.model_construct(_fields_set=set(kept), **kept))
        for key, value in base.items():
            object.__setattr__(self, key, value)
        for role in self.roles():
            prefix = f"{role} " if getattr(self, role).overrides() else ""
            if found := self.policy_of(role).fault():
                raise ValueError(found if found == self.fault() else prefix + found)
        return self

    @model_serializer(mode="wrap")
    def _without_empty_tables(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"policy": self.policy, **{key: value for key, value in handler(self).items() if value != {}}}

    def _resolved(self, role: str) -> dict[str, Any]:
        """Every value of the views of a role."""
        own = LOCAL_DEFAULTS if role == "local" else {}
        table: RoleTable = getattr(self, role)
        return {**{key: getattr(self, key) for key in ViewPolicy.model_fields}, **own, **table.overrides()}

    def policy_of(self, role: str) -> ViewPolicy:
        """How views of a role are made; a role is one of `ROLES`."""
        return ViewPolicy.model_construct(**self._resolved(role))

    def roles(self) -> list[str]:
        """The role of each view of an image, in the order of the views."""
        return ["global1", "global2"] + ["local"] * self.local.count

    def counts(self) -> dict[str, int]:
        """How many views of each of the methods' roles are made of an image; see `Method.views`."""
        return {"global": NUM_GLOBAL_VIEWS, "local": self.local.count}

    def view_policies(self) -> list[ViewPolicy]:
        """How each view of an image is made, in the order of the views."""
        by_role = {role: self.policy_of(role) for role in ROLES}
        return [by_role[role] for role in self.roles()]

    @property
    def channels(self) -> int:
        """How many channels the views have."""
        return len(self.mean)

    def unfit_for(self, channels: int) -> list[str]:
        """What is wrong with these views for images of so many channels, in sentences that begin with the key."""
        found = [
            f"{key}: {len(values)} numbers, where images have {channels} channels ([backbone] args in_chans); sslkit "
            f"data check DIR --channels {channels} prints the right ones"
            for key, values in (("mean", self.mean), ("std", self.std))
            if len(values) != channels
        ]
        policies, other = self.view_policies(), channels != 3
        pipeline, device = any(policy.pipeline for policy in policies), self.device != "cpu"
        colours = any(policy.jitter[2] or policy.jitter[3] for policy in policies)
        gray = any(policy.gray_prob for policy in policies)
        rules = (
            (device and pipeline, "device: a pipeline file runs on the 'cpu'"),
            (other and pipeline, "transforms: a pipeline file needs images of 3 channels; take 'torchvision'"),
            (other and colours, "jitter: saturation and hue need 3 channels; set its last two numbers to 0"),
            (other and gray, "gray_prob: grey needs images of 3 channels; set it to 0"),
            (other and device, "device: views of other than 3 channels are finished on the 'cpu'"),
        )
        return found + [sentence for applies, sentence in rules if applies]


def resolve_views(views: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Fill in a ``[views]`` table from its policy and read its pipeline files; see `read_pipelines` for ``folder``.

    Returns the table, and a sentence for everything that is wrong with it.
    """
    policy = views.get("policy")
    if not isinstance(policy, str) or policy not in POLICIES:
        near = near_miss(str(policy), POLICIES)
        return views, [f"[views] policy: unknown policy {policy!r}{near}; there are {', '.join(POLICIES)}"]
    return read_pipelines(layer_views(POLICIES[policy], views), folder)


def fill_later_keys(views: dict[str, Any]) -> dict[str, Any]:
    """The ``[views]`` table that a run saved, with `LATER_KEYS` if it is older than they are.

    Such a table states every other key. The run made the views of the defaults of `ViewsConfig`.
    """
    if not states_all_others(views):
        return views
    return {**{key: ViewsConfig.model_fields[key].default for key in LATER_KEYS}, **views}


def states_all_others(views: dict[str, Any]) -> bool:
    """Whether a ``[views]`` table states every key but `LATER_KEYS`, as recipes resolved before them do."""
    return ViewsConfig.model_fields.keys() - {*LATER_KEYS, *ROLES} <= views.keys()
