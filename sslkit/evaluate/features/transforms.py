"""From an image to an encoder's input: timm's transforms for RGB, the same steps on tensors for other channels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from sslkit.data.decode.channels import FULL_SCALE
from sslkit.data.sources.image_source import ImageSource

Transform = Callable[[Any], Tensor]

LONGEST = 8  # times the shorter side (and the input's aspect): what is longer is cropped before it is resized


class ShortenStrip:
    """Bound what an elongated image is resized to, by cutting away what the centre crop would.

    A strip of 1 x 20000 pixels whose shorter side becomes 256 would be 5 million pixels long. Its middle is taken
    instead, `LONGEST` times its shorter side; the centre crop takes the same part of it, within a pixel. Other images
    stay as they are.

    Args:
        size: Height and width of the input.
        whole: Whether the transform keeps the whole image, by borders: a strip that would be less than a pixel wide
            is then resized to one pixel, instead of cut.
    """

    def __init__(self, size: Sequence[int], *, whole: bool) -> None:
        self.size, self.whole = tuple(size), whole

    def __call__(self, image: Any) -> Any:
        """A Pillow image, or a tensor (C, H, W)."""
        _, height, width = functional.get_dimensions(image)
        shorter, longer = sorted((height, width))
        aspect = max(self.size) / min(self.size)
        if self.whole:
            fitting = max(self.size)
            if longer < fitting * shorter:
                return image
            return functional.resize(image, [fitting, 1] if height > width else [1, fitting])
        kept = math.ceil(LONGEST * aspect) * shorter
        if longer <= kept:
            return image
        kept += (longer - kept) % 2  # so that the middle stays where it is
        start = (longer - kept) // 2
        box = (start, 0, kept, width) if height > width else (0, start, height, kept)
        return functional.crop(image, *box)

    def __repr__(self) -> str:
        """What it does, by which features are kept apart from those of another transform."""
        return f"{type(self).__name__}({self.size}, whole={self.whole})"


class ChannelTransform:
    """Resize, crop and normalise a tensor (C, H, W) of values in [0, 1].

    Args:
        preprocessing: timm's data config.
        is_training: Whether to cut and mirror at random, as the papers' linear protocols do, or to take the centre.
    """

    def __init__(self, preprocessing: Mapping[str, Any], *, is_training: bool) -> None:
        self.channels, *size = preprocessing["input_size"]
        interpolation = transforms.InterpolationMode(preprocessing["interpolation"])
        if is_training:
            steps: list[Any] = [transforms.RandomResizedCrop(size, interpolation=interpolation, antialias=True)]
            steps.append(transforms.RandomHorizontalFlip())
        else:
            side = math.floor(size[0] / (preprocessing.get("crop_pct") or 1.0))
            steps = [ShortenStrip(size, whole=False), transforms.Resize(side, interpolation, antialias=True)]
            steps.append(transforms.CenterCrop(size))
        normalise = transforms.Normalize(preprocessing["mean"], preprocessing["std"])
        self.transform = transforms.Compose([*steps, normalise])

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) in [0, 1] to the encoder's input."""
        changed: Tensor = self.transform(image)
        return changed

    def __repr__(self) -> str:
        """What it does, by which features are kept apart from those of another transform."""
        return f"{self.channels} channels: {self.transform}"


def evaluation_transform(preprocessing: Mapping[str, Any]) -> Transform:
    """Resize, centre crop and normalise, as timm does for evaluation."""
    if preprocessing["input_size"][0] != 3:
        return ChannelTransform(preprocessing, is_training=False)
    made = create_transform(**preprocessing, is_training=False)
    mode = preprocessing.get("crop_mode")
    if mode != "squash":  # which resizes to a fixed size
        made.transforms.insert(0, ShortenStrip(preprocessing["input_size"][1:], whole=mode == "border"))
    transform: Transform = made
    return transform


def training_transform(preprocessing: Mapping[str, Any]) -> Transform:
    """Random resized crop (area 0.08 to 1) and mirror: the augmentation of the papers' linear protocols."""
    kept = {key: preprocessing[key] for key in ("input_size", "interpolation", "mean", "std")}
    if kept["input_size"][0] != 3:
        return ChannelTransform(kept, is_training=True)
    made: Transform = create_transform(**kept, is_training=True, color_jitter=0.0)
    return made


def read_for(transform: Transform, source: ImageSource, index: int) -> Any:
    """Image ``index`` as a transform takes it: Pillow's RGB, or a tensor of as many channels as it is for.

    Raises:
        UnreadableImage: It cannot be read so.
    """
    channels = transform.channels if isinstance(transform, ChannelTransform) else None
    pixels = source.read_as(index, channels)
    if channels is None:
        return Image.fromarray(pixels)
    return torch.from_numpy(pixels.astype(np.float32) / FULL_SCALE).permute(2, 0, 1)


def blank_for(transform: Transform, side: int) -> Any:
    """A black square as a transform takes it."""
    if isinstance(transform, ChannelTransform):
        return torch.zeros(transform.channels, side, side)
    return Image.new("RGB", (side, side))
