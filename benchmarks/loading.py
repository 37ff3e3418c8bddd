"""Two views from a JPEG: sslkit compared with the papers' pipelines, lightly's, and the fastest possible.

    python benchmarks/loading.py [--rounds 15] [--sizes 500x375 4000x3000]

One core, no workers: the work of one data worker. "Official" is the pipeline of the official code (Pillow and
torchvision) with the published numbers; lightly's is its transform for the same paper. The limit is the fastest
decoding and two antialiased crops. Times are measured alternately; use the ratios.
"""

import argparse
import io
import os
import random
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from side_by_side import in_turn, machine, ratios, table
from sklearn.datasets import load_sample_images
from torchvision import transforms

from sslkit.data.augment.cpu import ViewPipeline, resize
from sslkit.data.augment.policies import IMAGENET_MEAN, IMAGENET_STD
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.decode.rgb import decode_reduced, decode_rgb

QUALITY = 90
IMAGES = 4  # of a round


def jpegs(width: int, height: int) -> list[bytes]:
    """Write two photographs of this size as JPEG files."""
    encoded = []
    for photo in load_sample_images().images:
        stream = io.BytesIO()
        Image.fromarray(photo).resize((width, height), Image.LANCZOS).save(stream, "JPEG", quality=QUALITY)
        encoded.append(stream.getvalue())
    return encoded


class Blur:
    """Blur as in the official code: Pillow's, with a radius from 0.1 to 2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarize:
    """Solarize as in the official code, at half of the range."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Invert bright pixels."""
        return ImageOps.solarize(image)


def official_transforms(policy: str) -> list[Callable[[Image.Image], torch.Tensor]]:
    """The official code's transforms of both views."""
    numbers = ViewsConfig.of_policy(policy)

    def of_view(blur: float, solarize: float) -> Callable[[Image.Image], torch.Tensor]:
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(224, scale=numbers.crop_scale),
                transforms.RandomApply([transforms.ColorJitter(*numbers.jitter)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([Blur()], p=blur),
                transforms.RandomApply([Solarize()], p=solarize),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    return [of_view(0.5, 0.0)] * 2 if policy == "moco_v2" else [of_view(1.0, 0.0), of_view(0.1, 0.2)]


def official(encoded: bytes, views: list[Callable[[Image.Image], torch.Tensor]]) -> object:
    """Both views of one image."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return [view(image) for view in views]


def lightly(policy: str) -> Callable[[bytes], object] | None:
    """lightly's transform for the paper, or None if it does not exist or lightly is not installed."""
    if policy != "moco_v2" or not find_spec("lightly"):
        return None
    transform = import_module("lightly.transforms.moco_transform").MoCoV2Transform(input_size=224, min_scale=0.2)
    return lambda encoded: transform(Image.open(io.BytesIO(encoded)).convert("RGB"))


def contenders(policy: str, size: tuple[int, int]) -> dict[str, Callable[[bytes], object]]:
    """The compared functions of a file, by name."""
    config = ViewsConfig.of_policy(policy)
    pipeline, count = ViewPipeline(config, 0), iter(range(10**9))

    def ours(encoded: bytes) -> object:
        sample = next(count)
        pixels, whole = decode_reduced(encoded, "", partial(pipeline.reduction, 0, sample))
        return pipeline(pixels, 0, sample, whole)

    def for_device(encoded: bytes) -> object:
        sample = next(count)
        pixels, whole = decode_reduced(encoded, "", partial(pipeline.reduction, 0, sample))
        return pipeline.crop_views(pixels, 0, sample, whole)

    def limit(encoded: bytes) -> object:
        draws = pipeline.view_params(0, next(count), (size[1], size[0]))
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        boxes = [draw.box for draw in draws]
        return [
            resize(pixels[top : top + high, left : left + wide], 224, "bilinear") for top, left, high, wide in boxes
        ]

    found = {"official": partial(official, views=official_transforms(policy)), "lightly": lightly(policy)}
    found |= {"sslkit, CPU views": ours, "sslkit, device views": for_device, "decoding and two crops": limit}
    return {name: work for name, work in found.items() if work} | {"decoding": lambda encoded: decode_rgb(encoded, "")}


def measure(policy: str, size: tuple[int, int], rounds: int) -> list[list[str]]:
    """Rows of the table: speed relative to the official pipeline."""
    files = jpegs(*size)
    works = {
        name: lambda work=work: [work(files[number % len(files)]) for number in range(IMAGES)]
        for name, work in contenders(policy, size).items()
    }
    seconds = in_turn(works, rounds)
    rows = []
    for name, own in seconds.items():
        median, low, high = ratios({"official": seconds["official"], name: own}, name)["official"]
        speed = IMAGES / sorted(own)[len(own) // 2]
        size_words = f"{size[0]} x {size[1]}"
        rows.append([policy, size_words, name, f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{speed:.0f}"])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sizes", nargs="+", default=["500x375", "4000x3000"], help="Width x height of the files.")
    parser.add_argument("--policies", nargs="+", default=["moco_v2", "moco_v3"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(machine("torch", "torchvision", "pillow", "albumentations", "opencv-python-headless", "lightly"))
    rows = []
    for words in arguments.sizes:
        width, height = map(int, words.split("x"))
        for policy in arguments.policies:
            rows += measure(
                policy, (width, height), arguments.rounds if width < 2000 else max(arguments.rounds // 3, 5)
            )
    print(table(["policy", "file", "what", "times official", "quartiles", "images/s, one core"], rows))


if __name__ == "__main__":
    main()
