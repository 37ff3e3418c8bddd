"""PASCAL VOC's format: an XML file a picture, lists of pictures as splits."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import Picture, as_boxes

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def find_years(folder: Path) -> list[Path]:
    """The folders that hold JPEGImages and the rest: this one, or the VOC* ones in it or in its VOCdevkit."""
    candidates = [folder, *sorted(folder.glob("VOC*")), *sorted(folder.glob("VOCdevkit/VOC*"))]
    return [path for path in candidates if (path / "Annotations").is_dir() and (path / "ImageSets" / "Main").is_dir()]


def splits_of(years: list[Path]) -> list[str]:
    """Names of the lists in ImageSets/Main, without the lists of single classes (``dog_train``)."""
    names = {file.stem for year in years for file in (year / "ImageSets" / "Main").glob("*.txt")}
    return sorted(name for name in names if "_" not in name)


def read_split(years: list[Path], split: str) -> tuple[list[Picture], dict[int, str]]:
    """Every picture of a split, in the order of its lists, and the class names behind their numbers."""
    numbers: dict[str, int] = {}
    pictures = []
    for year in years:
        names = year / "ImageSets" / "Main" / f"{split}.txt"
        if names.is_file():
            try:
                lines = names.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{names}: is not a list that can be read ({error})") from error
            pictures += [_read_picture(year, line.split()[0], numbers) for line in lines if line.strip()]
    return pictures, {number: name for name, number in numbers.items()}


def _read_picture(year: Path, name: str, numbers: dict[str, int]) -> Picture:
    file = year / "Annotations" / f"{name}.xml"
    boxes, labels, difficult = [], [], []
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(float(_text(root, f"size/{side}"))) for side in ("width", "height"))
        for thing in root.iter("object"):
            corners = [float(_text(thing, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")]
            # VOC counts pixels from 1 and includes both ends: pixels 1 to W are the coordinates 0 to W.
            boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
            labels.append(numbers.setdefault(_text(thing, "name").strip(), len(numbers) + 1))
            difficult.append((thing.findtext("difficult") or "0").strip() == "1")
        placed = as_boxes(boxes, name)
        return Picture(
            file=_picture_file(year, name),
            width=width,
            height=height,
            boxes=placed,
            labels=np.array(labels, dtype=np.int64),
            ignored=np.array(difficult, dtype=bool),
            crowds=np.zeros(len(boxes), dtype=bool),
            areas=(placed[:, 2:] - placed[:, :2]).prod(axis=1),
        )
    except UserError:
        raise
    except (OSError, ElementTree.ParseError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: is not a readable VOC annotation ({error})") from error


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no <{path.replace('/', '><')}>")
    return text


def _picture_file(year: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        file = year / "JPEGImages" / f"{name}{suffix}"
        if file.is_file():
            return file
    raise UserError(f"{year / 'JPEGImages'}: has no picture {name}.jpg, but a split names it")
