"""Transforms from an image to an encoder's input: timm's for RGB, the same steps on tensors for other channels."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from sslkit.data.decode.channels import FULL_SCALE
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import upload

Transform = Callable[[Any], Tensor]

LONGEST = 8  # longest side kept, in units of the shorter side and of the input's aspect ratio


class ShortenStrip:
    """Crop very elongated images before they are resized to height and width ``size``, to bound the memory.

    A 1 x 20000 image resized to a shorter side of 256 would have 5 million columns. Its middle part of `LONGEST`
    times the shorter side is kept instead; the centre crop that follows takes the same pixels of it, up to one pixel.
    If the transform keeps the ``whole`` image by padding, an image whose shorter side would become less than a pixel is
    resized to one pixel instead. Other images are not changed.
    """

    def __init__(self, size: Sequence[int], *, whole: bool) -> None:
        self.size, self.whole = tuple(size), whole

    def __call__(self, image: Any) -> Any:
        """Apply to a PIL image or a tensor (C, H, W)."""
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
        kept += (longer - kept) % 2  # keeps the centre where it is
        start = (longer - kept) // 2
        box = (start, 0, kept, width) if height > width else (0, start, height, kept)
        return functional.crop(image, *box)

    def __repr__(self) -> str:
        """Part of the key of stored features."""
        return f"{type(self).__name__}({self.size}, whole={self.whole})"


class ChannelTransform:
    """Resize, crop and normalise a tensor (C, H, W) with values in [0, 1]; see the functions below."""

    def __init__(self, preprocessing: Mapping[str, Any], *, is_training: bool) -> None:
        self.channels, *size = preprocessing["input_size"]
        interpolation = transforms.InterpolationMode(preprocessing["interpolation"])
        if is_training:
            crop = transforms.RandomResizedCrop(size, interpolation=interpolation, antialias=True)
            steps = [crop, transforms.RandomHorizontalFlip()]
        else:
            side = math.floor(size[0] / (preprocessing.get("crop_pct") or 1.0))
            resize = transforms.Resize(side, interpolation, antialias=True)
            steps = [ShortenStrip(size, whole=False), resize, transforms.CenterCrop(size)]
        normalise = transforms.Normalize(preprocessing["mean"], preprocessing["std"])
        self.transform = transforms.Compose([*steps, normalise])

    def __call__(self, image: Tensor) -> Tensor:
        """Transform (C, H, W) in [0, 1] to the encoder's input."""
        transformed: Tensor = self.transform(image)
        return transformed

    def __repr__(self) -> str:
        """Part of the key of stored features."""
        return f"{self.channels} channels: {self.transform}"


class _Normalise:
    """The last steps of timm's transforms, ToTensor and Normalize, for bytes (B, C, H, W); the same bits."""

    def __init__(self, mean: Tensor, std: Tensor, device: torch.device) -> None:
        self.mean, self.std = (upload(each.float().view(-1, 1, 1), device) for each in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def finished_on(device: torch.device, transform: Transform) -> tuple[Transform, Callable[[Tensor], Tensor]]:
    """The transform of an image, and what is left to do with batches on the device.

    GPUs get timm's images as bytes, a quarter of the size, and normalise them. Elsewhere nothing is left.
    """
    steps = getattr(transform, "transforms", [])
    if device.type == "cpu" or [type(step) for step in steps[-2:]] != [MaybeToTensor, transforms.Normalize]:
        return transform, lambda pixels: pixels
    *first, _, last = steps
    mean, std = (torch.as_tensor(each) for each in (last.mean, last.std))
    return transforms.Compose([*first, transforms.PILToTensor()]), _Normalise(mean, std, device)


def evaluation_transform(preprocessing: Mapping[str, Any]) -> Transform:
    """timm's transform for evaluation: resize, centre crop, normalise."""
    if preprocessing["input_size"][0] != 3:
        return ChannelTransform(preprocessing, is_training=False)
    timm_transform = create_transform(**preprocessing, is_training=False)
    mode = preprocessing.get("crop_mode")
    if mode != "squash":  # squash resizes to a fixed size
        timm_transform.transforms.insert(0, ShortenStrip(preprocessing["input_size"][1:], whole=mode == "border"))
    transform: Transform = timm_transform
    return transform


def training_transform(preprocessing: Mapping[str, Any], **options: Any) -> Transform:
    """Random resized crop (area 0.08 to 1) and flip, as in the papers' linear protocols; ``options`` are timm's."""
    kept = {key: preprocessing[key] for key in ("input_size", "interpolation", "mean", "std")}
    if kept["input_size"][0] != 3:
        return ChannelTransform(kept, is_training=True)
    transform: Transform = create_transform(**kept, is_training=True, color_jitter=0.0, **options)
    return transform


def read_input(transform: Transform, source: ImageSource, index: int) -> Any:
    """Read an image as the transform takes it: a PIL RGB image, or a tensor with the transform's channels."""
    channels = transform.channels if isinstance(transform, ChannelTransform) else None
    pixels = replace(source, channels=channels).read(index)
    if channels is None:
        return Image.fromarray(pixels)
    return torch.from_numpy(pixels.astype(np.float32) / FULL_SCALE).permute(2, 0, 1)


def blank_input(transform: Transform, side: int) -> Any:
    """A black square image as the transform takes it."""
    if isinstance(transform, ChannelTransform):
        return torch.zeros(transform.channels, side, side)
    return Image.new("RGB", (side, side))
