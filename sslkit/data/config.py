"""The ``[data]`` table of a recipe: which images to read, and how."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sslkit.data.decode.background import WHITE, check_background

MAX_CHANNELS = 512


class SourceConfig(BaseModel):
    """One source of images, with the keys of ``datasets.load_dataset``.

    Attributes:
        path: A folder of images (with or without a folder per class), a parquet, arrow or tar file, a folder of them, a
            pattern of tar files such as ``shards/train-{0000..0127}.tar``, a Hub dataset id, ``builtin:fashion_mnist``,
            or ``imagefolder``, ``parquet``, ``arrow`` or ``webdataset`` with ``data_dir`` or ``data_files``.
        name: Configuration of a Hub dataset. ``"full"`` selects all 70 000 images of ``builtin:fashion_mnist``.
        data_dir: Folder for the loaders above, or a subfolder of the folder ``path``.
        data_files: Files for the loaders above, or of a Hub dataset.
        split: The split to read, by any of its usual names (``validation``, ``val``, ``valid`` and ``dev`` are one).
            ``"all"`` reads everything, whatever the names of folders and files.
        image_column: Column of images; by default found by its type and usual names. For tar files, the suffix of the
            images, such as ``jpg`` or ``left.png``.
        label_column: Column of class labels; by default found by its type and usual names. For tar files, the suffix of
            the file beside each image that holds its label (default ``cls``), or a key of its ``.json``. Never read for
            pretraining.
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
        weight: Relative number of samples per epoch. Without weights, each image of all sources occurs once per epoch.
    """

    weight: float | None = Field(default=None, gt=0.0)


class DataConfig(SourceConfig):
    """The ``[data]`` table of a recipe.

    Attributes:
        path: As above; left out if ``mix`` is given.
        mix: Several sources in place of one.
        streaming: Whether to read parquet files row group by row group in place, locally or on the Hub, instead of
            copying them to the cache of `datasets` first. Other files are read in place anyway.
        shuffle_buffer: Images of a stream that all processes together hold in memory for shuffling.
        background: CSS colour that transparent pixels of RGB are composited over; ``"keep"`` drops alpha and keeps the
            colours under it.
        channels: Number of channels of images that are not read as RGB; set by ``[backbone] args = { in_chans = n }``.
        workers: Number of processes that decode and augment, or ``"auto"``; see `resolve_workers`.
        worker_timeout: Seconds that a batch may take before its worker counts as hung; 0 waits forever.
        max_bad_share: The run stops when more than this share of the images, rounded up to whole images, has turned out
            to be unreadable. Until then each is replaced by another image.
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
        if self.mix is None:
            if not self.path:
                raise ValueError("path names no images; give a folder, a file, a Hub id, or [[data.mix]] tables")
            return self
        weights = [each.weight for each in self.mix]
        given = self.model_fields_set & SourceConfig.model_fields.keys()
        if any(getattr(self, key) not in (None, "", "train") for key in given):
            raise ValueError("mix replaces path and its keys; give one of them, or give path as another mix table")
        if not self.mix:
            raise ValueError("mix is empty; give at least one [[data.mix]] table")
        if self.streaming:
            raise ValueError("streaming reads one source; leave out streaming or [[data.mix]]")
        if None in weights and any(weights):
            raise ValueError("mix: give every source a weight, or none of them")
        return self

    def paths(self) -> list[tuple[str, str]]:
        """All values of the table that may be paths, each with its key."""
        paths = []
        tables = [("[data]", self), *((f"[[data.mix]] {n}", each) for n, each in enumerate(self.mix or [], 1))]
        for table, source in tables:
            files = source.data_files or []
            paths += [(f"{table} path", source.path), (f"{table} data_dir", source.data_dir or "")]
            paths += [(f"{table} data_files", each) for each in ([files] if isinstance(files, str) else files)]
        return paths

    @property
    def title(self) -> str:
        """Name of the data in messages."""
        return self.path or " + ".join(each.path for each in self.mix or [])
