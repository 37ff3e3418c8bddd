"""Small sets of real images for experiments: a bundled one, and two made from packages that are downloaded.

    python benchmarks/small_sets.py runs/small_sets

- ``emoji``: 1 365 pictures of 54 classes, 64 pixels, on white (npm package emoji-datasource-google 16.0.0; data MIT,
  images Apache-2.0). Scored by leaving one out.
- ``tiles``: 64-pixel tiles of 23 photographs, class = photograph (Debian packages mate-backgrounds and
  plasma-workspace-wallpapers): 3 492 to train on, 1 332 from another place of each photograph to test on.
- ``garments``: the bundled subset of Fashion-MNIST, 10 000 and 2 000 images. Nothing is written for it.

Needs npm, apt-get and dpkg. The pictures are not part of this project and must not be added to it.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sslkit.data.sources.image_source import DataConfig, open_source

EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"
PHOTO_PACKAGES = ("mate-backgrounds", "plasma-workspace-wallpapers")
PHOTOS = {
    "usr/share/backgrounds/mate/nature/{}.jpg": (
        *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm"),
        *("TwoWings", "Wood", "YellowFlower"),
    ),
    "usr/share/wallpapers/{}/contents/images/2560x1600.jpg": (
        *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite"),
        *("OneStandsOut", "Path", "summer_1am"),
    ),
}
MIN_IN_CLASS = 12  # emoji
TILE, PHOTO_HEIGHT, GAP, TRAIN_SHARE = 64, 768, 32, 0.7
NAMES = ("emoji", "tiles", "garments")


@dataclass(frozen=True)
class SmallSet:
    """One set: where it is trained on, and its images and labels for scoring.

    Attributes:
        path: ``[data] path``.
        train: Images (N, H, W, 3) uint8 and labels (N,).
        test: Likewise; None where each image is scored by all others.
    """

    path: str
    train: tuple[NDArray[np.uint8], NDArray[np.int64]]
    test: tuple[NDArray[np.uint8], NDArray[np.int64]] | None


def load(name: str, folder: Path) -> SmallSet:
    """Open a set; `make` has made it."""
    if name == "garments":
        splits = [_read(DataConfig(path="builtin:fashion_mnist", split=split)) for split in ("train", "test")]
        return SmallSet("builtin:fashion_mnist", splits[0], splits[1])
    if name == "emoji":
        return SmallSet(str(folder / name), _read(DataConfig(path=str(folder / name))), None)
    train, test = (folder / name / split for split in ("train", "test"))
    return SmallSet(str(train), _read(DataConfig(path=str(train))), _read(DataConfig(path=str(test))))


def _read(config: DataConfig) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    source = open_source(config)
    _, labels = np.unique(source.labels(), return_inverse=True)
    return np.stack([source.read(index) for index in range(len(source))]), labels.astype(np.int64)


def make(folder: Path) -> None:
    """Download the packages and write the sets that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("emoji", _write_emoji), ("tiles", _write_tiles)):
        if (folder / name).exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as work:
            write(Path(work), Path(work) / name)
            shutil.move(Path(work) / name, folder / name)


def _write_emoji(work: Path, folder: Path) -> None:
    packed = subprocess.run(
        ["npm", "pack", "--silent", EMOJI_PACKAGE], cwd=work, check=True, capture_output=True, text=True
    )
    subprocess.run(["tar", "xzf", packed.stdout.split()[-1]], cwd=work, check=True)
    classes: dict[str, list[Path]] = defaultdict(list)
    for entry in json.loads((work / "package" / "emoji.json").read_bytes()):
        file = work / "package" / "img" / "google" / "64" / entry["image"]
        if entry.get("has_img_google") and file.is_file() and entry["category"] != "Component":
            classes[entry["subcategory"]].append(file)
    for name, files in classes.items():
        if len(files) < MIN_IN_CLASS or name == "country-flag":
            continue
        (folder / name).mkdir(parents=True)
        for file in files:
            picture = Image.open(file).convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            ground.alpha_composite(picture)
            ground.convert("RGB").save(folder / name / file.name)


def _write_tiles(work: Path, folder: Path) -> None:
    subprocess.run(["apt-get", "-qq", "download", *PHOTO_PACKAGES], cwd=work, check=True, stderr=subprocess.DEVNULL)
    for package in work.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, work / "root"], check=True)
    for pattern, names in PHOTOS.items():
        for name in names:
            photo = Image.open(work / "root" / pattern.format(name)).convert("RGB")
            width = round(photo.width * PHOTO_HEIGHT / photo.height)
            _cut(photo.resize((width, PHOTO_HEIGHT), Image.Resampling.LANCZOS), name, folder)


def _cut(photo: Image.Image, name: str, folder: Path) -> None:
    """Write the tiles of a photograph: those of its left part to train on, those of its right part to test on."""
    cut = int(photo.width * TRAIN_SHARE)
    for split, first, end in (("train", 0, cut), ("test", cut + GAP, photo.width)):
        (folder / split / name).mkdir(parents=True)
        for left in range(first, end - TILE + 1, TILE):
            for top in range(0, PHOTO_HEIGHT - TILE + 1, TILE):
                tile = photo.crop((left, top, left + TILE, top + TILE))
                tile.save(folder / split / name / f"{left}_{top}.png")


def main() -> None:
    """Parse and make the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    make(folder)
    for name in NAMES:
        found = load(name, folder)
        tested = "leave one out" if found.test is None else f"{len(found.test[1])} to test on"
        print(f"{name}: {len(found.train[1])} images, {len(np.unique(found.train[1]))} classes, {tested}")


if __name__ == "__main__":
    main()
