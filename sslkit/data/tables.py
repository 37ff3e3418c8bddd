"""Tables of strangers: Arrow files where they lie, of which only the columns of images and labels are looked at."""

import glob
from typing import Any

import datasets
import pyarrow as pa

from sslkit.errors import UserError


def map_arrow(patterns: list[str]) -> datasets.Dataset:
    """The rows of Arrow files where they lie, without the copy that `datasets` makes of other files.

    Raises:
        ValueError: One of them is no such file.
    """
    tables = []
    for file in sorted(file for pattern in patterns for file in glob.glob(pattern, recursive=True)):
        try:
            table = datasets.Dataset.from_file(file)
            table.data.validate(full=True)  # a stranger's offsets may point anywhere
        except pa.ArrowInvalid:  # Arrow's other kind of file, or none
            return datasets.load_dataset("arrow", data_files={"split": patterns}, split="split")
        tables.append(table)
    if not tables:
        raise ValueError("no such file")
    return datasets.concatenate_datasets(tables)


def only_columns(table: datasets.Dataset, image: str, label: str | None) -> datasets.Dataset:
    """The columns of images, not decoded, and labels: others could want libraries that are not here.

    Raises:
        UserError: The first is not one of images.
    """
    table = table.select_columns([image, *([label] if label and label != image else [])])
    if table.features[image] == datasets.Image(decode=False):
        return table
    try:
        return table.cast_column(image, datasets.Image(decode=False))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"[data] image_column: {image!r} holds {table.features[image]}, not images") from error


def label_word(value: Any, names: list[str], row: int) -> str:
    """A label as a word: its class's name, or the number where classes have none.

    Raises:
        UserError: It is of no class, as -1 is, which marks images without a label.
    """
    if not names and value is not None:
        return str(value)
    if type(value) is int and 0 <= value < len(names):
        return str(names[value])
    raise UserError(
        f"[data] label_column: row {row} has the label {value!r:.50}, which is of no class; leave unlabelled rows out"
    )
