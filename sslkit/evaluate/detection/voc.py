"""PASCAL VOC's format: one XML file per image, and lists of images as splits."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import AnnotatedImage, as_boxes

EDGES = ("xmin", "ymin", "xmax", "ymax")
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def find_years(folder: Path) -> list[Path]:
    """Find the folders with Annotations and ImageSets: this one, or VOC* folders in it or in its VOCdevkit."""
    candidates = [folder, *sorted(folder.glob("VOC*")), *sorted(folder.glob("VOCdevkit/VOC*"))]
    return [path for path in candidates if (path / "Annotations").is_dir() and (path / "ImageSets" / "Main").is_dir()]


def splits_of(years: list[Path]) -> list[str]:
    """Names of the lists in ImageSets/Main, without those of single classes such as ``dog_train``."""
    names = {file.stem for year in years for file in (year / "ImageSets" / "Main").glob("*.txt")}
    return sorted(name for name in names if "_" not in name)


def read_split(years: list[Path], split: str) -> tuple[list[AnnotatedImage], dict[int, str]]:
    """Read the images of a split in the order of its lists, and the class names by number."""
    numbers: dict[str, int] = {}
    images = []
    for year in years:
        names = year / "ImageSets" / "Main" / f"{split}.txt"
        if names.is_file():
            try:
                lines = names.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{names}: cannot be read as a list of images ({error})") from error
            images += [_read_image(year, line.split()[0], numbers) for line in lines if line.strip()]
    return images, {number: name for name, number in numbers.items()}


def _read_image(year: Path, name: str, numbers: dict[str, int]) -> AnnotatedImage:
    file = year / "Annotations" / f"{name}.xml"
    rows, labels, difficult = [], [], []
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(float(_text(root, f"size/{side}"))) for side in ("width", "height"))
        for element in root.iter("object"):
            left, top, right, bottom = (float(_text(element, f"bndbox/{edge}")) for edge in EDGES)
            # VOC counts pixels from 1 and includes both ends: pixels 1 to W are the coordinates 0 to W.
            rows.append([left - 1, top - 1, right, bottom])
            labels.append(numbers.setdefault(_text(element, "name").strip(), len(numbers) + 1))
            difficult.append((element.findtext("difficult") or "0").strip() == "1")
        boxes = as_boxes(rows, name)
        return AnnotatedImage(
            file=_image_file(year, name),
            width=width,
            height=height,
            boxes=boxes,
            labels=np.array(labels, dtype=np.int64),
            ignored=np.array(difficult, dtype=bool),
            crowds=np.zeros(len(boxes), dtype=bool),
            areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
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


def _image_file(year: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        file = year / "JPEGImages" / f"{name}{suffix}"
        if file.is_file():
            return file
    raise UserError(f"{year / 'JPEGImages'}: a split lists {name}, but there is no {name}.jpg")
