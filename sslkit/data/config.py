"""The ``[data]`` table of a recipe: which images, in which shares, and who reads them."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sslkit.data.decode.background import WHITE, check_background

MAX_CHANNELS = 512


class SourceConfig(BaseModel):
    """One source of images, in the words of ``datasets.load_dataset``.

    Attributes:
        path: A folder of images (with or without a folder per class), a parquet, arrow or tar file, a folder of them,
            tar files by a pattern such as ``shards/train-{0000..0127}.tar``, a Hub dataset id, ``"imagefolder"`` /
            ``"parquet"`` / ``"arrow"`` / ``"webdataset"`` with ``data_dir`` or ``data_files``, or
            ``"builtin:fashion_mnist"``.
        name: The Hub dataset's configuration. ``"full"`` asks for all 70 000 images of ``builtin:fashion_mnist``.
        data_dir: Folder for the loaders above, or a folder in the one that ``path`` names.
        data_files: Files for the loaders above, or of a dataset of the Hub.
        split: Which split to read, by any of its usual names (``validation``, ``val``, ``valid`` and ``dev`` are one).
            ``"all"`` takes everything, whatever folders and files are called.
        image_column: Column of images; found by its type and usual names when not given. Of tar files, the suffix of
            the images, such as ``jpg`` or ``left.png``.
        label_column: Column of class labels; found by its type and usual names when not given. Of tar files, the suffix
            of the file beside each image that holds its label (``cls`` when not given), or a key of its ``.json``.
            Never read for pretraining.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str = Field(min_length=1)
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None


class MixConfig(SourceConfig):
    """A ``[[data.mix]]`` table: one of several sources.

    Attributes:
        weight: Its share of the samples, beside the others' weights; none for any: each image once an epoch.
    """

    weight: float | None = Field(default=None, gt=0.0)


class DataConfig(SourceConfig):
    """The ``[data]`` table of a recipe.

    Attributes:
        path: As above; left out where ``mix`` stands for it.
        mix: Several sources in place of one.
        streaming: Whether parquet files are read row group by row group where they lie, here or on the Hub, instead of
            being copied to `datasets`' cache first. Other files are read where they lie anyway.
        shuffle_buffer: Images of a stream that are held at a time to be mixed, by all processes together.
        background: The colour, as CSS writes it, that transparent pixels of RGB are composited over; ``"keep"`` drops
            alpha and keeps the colours under it.
        channels: Of images that are not read as RGB; filled in by ``[backbone] args = { in_chans = n }``.
        workers: Processes that decode and augment; ``"auto"`` is one a core, less one on CPU-only machines.
        worker_timeout: Seconds that a batch may take before its worker counts as stuck (0: for ever).
        max_bad_share: The run stops when more than this share of the images, rounded up to whole images, has proved
            unreadable. Until then another image takes the place of each.
    """

    path: str = ""
    mix: list[MixConfig] | None = None
    streaming: bool = Field(default=False, strict=True)
    shuffle_buffer: int = Field(default=16_384, strict=True, ge=1)
    background: Annotated[str, AfterValidator(check_background)] = WHITE
    channels: int | None = Field(default=None, strict=True, ge=1, le=MAX_CHANNELS)
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    worker_timeout: float = Field(default=300.0, ge=0.0)
    max_bad_share: float = Field(default=0.01, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        given = self.model_fields_set & (SourceConfig.model_fields.keys() - {"path"})
        if self.mix is None and not self.path:
            raise ValueError("path names no images; give a folder, a file, a Hub id, or [[data.mix]] tables")
        if self.mix is not None and (self.path or any(getattr(self, key) not in (None, "train") for key in given)):
            raise ValueError("mix stands in place of path and its words; give either, or path as one more mix table")
        if self.mix is not None and not self.mix:
            raise ValueError("mix holds no source")
        if self.mix is not None and self.streaming:
            raise ValueError("streaming is of one source; leave it out, or [[data.mix]]")
        weights = [each.weight for each in self.mix or []]
        if None in weights and any(weights):
            raise ValueError("mix: give every source a weight, or none")
        return self

    def paths(self) -> list[tuple[str, str]]:
        """Everything in the table that may be a path, each after the key that it stands under."""
        found = []
        tables = [("[data]", self), *((f"[[data.mix]] {n}", each) for n, each in enumerate(self.mix or [], 1))]
        for table, source in tables:
            files = source.data_files or []
            found += [(f"{table} path", source.path), (f"{table} data_dir", source.data_dir or "")]
            found += [(f"{table} data_files", each) for each in ([files] if isinstance(files, str) else files)]
        return found

    @property
    def title(self) -> str:
        """What to call the data in print."""
        return self.path or " + ".join(each.path for each in self.mix or [])
