"""The data sets that come with sslkit, and the complete one that Debian's package installs."""

from importlib import resources
from pathlib import Path

import datasets
import pyarrow.parquet

from sslkit.data.config import SourceConfig
from sslkit.data.formats.splits import ALL, choose
from sslkit.data.sources.idx import read_idx
from sslkit.errors import UserError, near_miss

BUILTIN = "builtin:"
BUILTIN_SETS = ("fashion_mnist",)
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load_bundled(config: SourceConfig) -> datasets.Dataset:
    """Load the rows of ``builtin:NAME``.

    Raises:
        UserError: There is no such data set, split or configuration, or its files are damaged.
    """
    name = config.path.removeprefix(BUILTIN)
    if name not in BUILTIN_SETS:
        known = [BUILTIN + each for each in BUILTIN_SETS]
        raise UserError(
            f"[data] path: no bundled data set {config.path!r}{near_miss(config.path, known)}; there is {known}"
        )
    if config.split == ALL:
        return datasets.concatenate_datasets(
            [load_bundled(config.model_copy(update={"split": split})) for split in ("train", "test")]
        )
    split = next(iter(choose(("train", "test"), config.split)), "")
    if not split:
        raise UserError(f"[data] split: {config.path} has the splits 'train' and 'test', not {config.split!r}")
    if config.name == "full":
        return _read_idx_fashion_mnist(Path(config.data_dir or DEBIAN_FASHION_MNIST), split)
    if config.name is not None:
        raise UserError(f"[data] name: {config.path} has the configuration 'full' or none, not {config.name!r}")
    resource = resources.files("sslkit.data") / "builtin" / name / f"{split}.parquet"
    with resources.as_file(resource) as file:
        return datasets.Dataset(pyarrow.parquet.read_table(file))


def _read_idx_fashion_mnist(folder: Path, split: str) -> datasets.Dataset:
    """Read all 60 000 or 10 000 images from the IDX files that Debian's dataset-fashion-mnist installs."""
    stem = "train" if split == "train" else "t10k"
    images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", num_axes=3)
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", num_axes=1)
    if len(images) != len(labels) or labels.max() > 9:
        raise UserError(
            f"[data] data_dir: {folder} has {len(images)} images and {len(labels)} labels up to {labels.max()}; there "
            "must be one label from 0 to 9 for each image"
        )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    rows = [{"image": pixels, "label": int(label)} for pixels, label in zip(images, labels, strict=True)]
    return datasets.Dataset.from_list(rows, features=features)
