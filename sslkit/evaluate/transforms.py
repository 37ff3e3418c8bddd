"""From an image to an encoder's input: timm's transforms for RGB, the same steps on tensors for other channels."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from sslkit.data.channels import FULL_SCALE
from sslkit.data.source import ImageSource

Transform = Callable[[Any], Tensor]


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
            steps = [transforms.Resize(side, interpolation, antialias=True), transforms.CenterCrop(size)]
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
    made: Transform = create_transform(**preprocessing, is_training=False)
    return made


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
