"""The data sets that come with sslkit, and the complete one that Debian's package installs as IDX files."""

import gzip
import math
import zlib
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from sslkit.data.config import SourceConfig
from sslkit.data.formats.splits import ALL, choose
from sslkit.errors import UserError, near_miss

BUILTIN = "builtin:"
BUILTIN_SETS = ("fashion_mnist",)
BUILTIN_SPLITS = ("train", "test")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
MAX_IDX_BYTES = 2**28  # five times the largest file of Fashion-MNIST


def load_bundled(config: SourceConfig) -> datasets.Dataset:
    """Load the rows of ``builtin:NAME``. An unknown data set, split or configuration raises `UserError`."""
    name = config.path.removeprefix(BUILTIN)
    if name not in BUILTIN_SETS:
        known = [BUILTIN + each for each in BUILTIN_SETS]
        raise UserError(
            f"[data] path: no bundled data set {config.path!r}{near_miss(config.path, known)}; there is {known}"
        )
    splits = BUILTIN_SPLITS if config.split == ALL else choose(BUILTIN_SPLITS, config.split)
    if not splits:
        raise UserError(f"[data] split: {config.path} has the splits 'train' and 'test', not {config.split!r}")
    if config.name not in (None, "full"):
        raise UserError(f"[data] name: {config.path} has the configuration 'full' or none, not {config.name!r}")
    return datasets.concatenate_datasets([_load_split(config, name, split) for split in splits])


def _load_split(config: SourceConfig, name: str, split: str) -> datasets.Dataset:
    if config.name == "full":
        return _read_idx_fashion_mnist(Path(config.data_dir or DEBIAN_FASHION_MNIST), split)
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
            f"[data] data_dir: {folder} has {len(images)} images, {len(labels)} labels and the largest label "
            f"{labels.max()}; there must be one label from 0 to 9 for each image"
        )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    rows = [{"image": pixels, "label": int(label)} for pixels, label in zip(images, labels, strict=True)]
    return datasets.Dataset.from_list(rows, features=features)


def read_idx(file: Path, num_axes: int) -> NDArray[np.uint8]:
    """Read a gzipped IDX file: a magic number, the lengths of the ``num_axes`` axes, then unsigned bytes.

    At most 256 MiB are read, whatever the header states. A missing, damaged or other file raises `UserError`.
    """
    if not file.is_file():
        raise UserError(
            f"[data] name: 'full' needs {file}; install Debian's package dataset-fashion-mnist, or set data_dir"
        )
    try:
        with gzip.open(file) as stream:
            header = stream.read(4 + 4 * num_axes)
            shape = np.frombuffer(header[4:], dtype=">u4").tolist()
            size = math.prod(shape)
            content = stream.read(size + 1) if 0 < size <= MAX_IDX_BYTES else b""
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"[data] data_dir: {file} is not an intact gzip file: {error}") from error
    if header[:4] != bytes((0, 0, 8, num_axes)) or not content or len(content) != size:
        raise UserError(
            f"[data] data_dir: {file} is not an IDX file of unsigned bytes with {num_axes} axes, or not of the size "
            f"that its header states (at most {MAX_IDX_BYTES} bytes)"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
