"""Features that need no training: raw pixels and colour histograms. An encoder that does not beat them is of no use."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sslkit.data.sources.image_source import ImageSource
from sslkit.evaluate.features.extraction import extract_features

RAW_PIXELS, COLOUR_HISTOGRAMS = "raw pixels", "colour histograms"
MAX_SIDE, MIN_SIDE = 32, 8
SOME = 16  # images whose sides are read
BINS = 8  # of each channel; 4 and 6 are weaker on photographs
GREY = 0.01  # mean difference of the channels, in [0, 1], below which images are grey
CHUNK = 4096  # images at a time


class PixelTransform:
    """Resize a PIL image to ``side`` x ``side``; returns its RGB values in [0, 1], (3 * side * side,)."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Tensor:
        """Apply to an RGB image."""
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image).reshape(-1).astype(np.float32) / 255.0)


def raw_pixel_side(source: ImageSource) -> int:
    """Side of the raw-pixel features in pixels: the median of some images' shorter side, limited to 8 ... 32."""
    some = np.linspace(0, len(source) - 1, min(len(source), SOME)).astype(int)
    sides = [min(source.read(int(index)).shape[:2]) for index in some]
    return max(min(MAX_SIDE, int(np.median(sides))), MIN_SIDE)


def raw_pixels(source: ImageSource, side: int, workers: int = 0) -> Tensor:
    """RGB values of the images, resized to ``side`` x ``side``: (len(source), 3 * side * side), in [0, 1]."""
    return extract_features(nn.Identity(), source, PixelTransform(side), device=torch.device("cpu"), workers=workers)


def colour_histograms(pixels: Tensor) -> Tensor:
    """Square roots of the shares of `BINS` ** 3 colours: (N, 512) from `raw_pixels`.

    The inner product of two is their Bhattacharyya coefficient.
    """
    histograms = pixels.new_zeros(len(pixels), BINS**3)
    for rows, chunk in zip(histograms.split(CHUNK), pixels.split(CHUNK), strict=True):
        red, green, blue = (chunk.unflatten(1, (-1, 3)) * BINS).long().clamp_(max=BINS - 1).unbind(dim=2)
        colours = (red * BINS + green) * BINS + blue
        rows.scatter_add_(1, colours, pixels.new_ones(colours.shape) / colours.shape[1])
    return histograms.sqrt_()


def pixel_baselines(train: Tensor, test: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of training and test images by name, from their `raw_pixels`: these, and histograms if not grey."""
    found = {RAW_PIXELS: (train, test)}
    if are_coloured(train):
        found[COLOUR_HISTOGRAMS] = colour_histograms(train), colour_histograms(test)
    return found


def are_coloured(pixels: Tensor) -> bool:
    """Whether the first images of `raw_pixels` have colours."""
    triples = pixels[:CHUNK].unflatten(1, (-1, 3))
    return float((triples.amax(dim=2) - triples.amin(dim=2)).mean()) > GREY
