"""Views cut from an image on the CPU.

Crops are resized as Pillow does it and colours changed by albumentations, or both as TensorFlow does it
(`tensorflow_views`), as the policy says.
"""

import warnings
from collections.abc import Callable

import albumentations as A  # noqa: N812  (the library's own convention)
import cv2
import numpy as np
import torch
from albumentations.augmentations.blur.functional import create_gaussian_kernel_1d
from albumentations.augmentations.pixel.functional import (
    adjust_brightness_torchvision,
    adjust_contrast_torchvision,
    adjust_saturation_torchvision,
)
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from sslkit.data.augment.multichannel import finish_channels, resize_channels
from sslkit.data.augment.parameters import SPREAD, Box, Draw, draw_view
from sslkit.data.augment.policies import LARGE_VIEWS, PerChannel, ViewsConfig
from sslkit.data.augment.tensorflow import change_colours, resize_by_taps
from sslkit.data.decode.channels import FULL_SCALE
from sslkit.data.decode.rgb import Pixels, Size

REDUCTIONS = (8, 4, 2)  # by which a JPEG can be decoded smaller, at a fraction of the work
ROOM = 1.25  # times a view's side that a reduced crop still has at least: sharpness stays within a few per cent


class ViewPipeline:
    """Cuts the views of an image.

    Args:
        config: Which transforms, with which numbers.
        seed: The run's seed, the first word of every draw's key.
    """

    def __init__(self, config: ViewsConfig, seed: int) -> None:
        cv2.setNumThreads(0)  # parallelism is the workers' business
        self.config, self.seed = config, seed
        self.sides = [config.size] * LARGE_VIEWS + [config.small_size] * config.small_crops
        self.pixel_bytes = 3 if config.channels == 3 else 2 * config.channels
        self.colours = Colours(config)

    def __call__(self, image: Pixels, epoch: int, sample: int, size: Size | None = None) -> list[Pixels]:
        """Cut ``image`` (H, W, 3) into its views, each (side, side, 3), all uint8 RGB; large ones first.

        Images of channels, (H, W, C) uint16, give such views.

        ``size`` is that of the image before `reduction`; none, if it was not reduced.
        """
        draws = self.draw(epoch, sample, size or image.shape[:2])
        return [self.finish(self.crop(image, draw, view, size), draw) for view, draw in enumerate(draws)]

    def cut(self, image: Pixels, epoch: int, sample: int, view: int) -> Pixels:
        """Cut one view, (side, side, 3); seed, epoch, sample and view always give the same one."""
        draw = draw_view(self.config, self.seed, epoch, sample, view, image.shape[:2])
        return self.finish(self.crop(image, draw, view), draw)

    def crops(
        self, image: Pixels, epoch: int, sample: int, size: Size | None = None
    ) -> tuple[list[Pixels], list[NDArray[np.float32]]]:
        """Views as far as they are cut on the CPU where an accelerator does the rest, and `Draw.numbers` for that."""
        draws = self.draw(epoch, sample, size or image.shape[:2])
        crops = [self.crop(image, draw, view, size) for view, draw in enumerate(draws)]
        return crops, [draw.numbers() for draw in draws]

    def draw(self, epoch: int, sample: int, size: Size) -> list[Draw]:
        """What chance decides of each view of an image of ``size``."""
        return [draw_view(self.config, self.seed, epoch, sample, view, size) for view in range(len(self.sides))]

    def reduction(self, epoch: int, sample: int, size: Size) -> int:
        """By how much an image of ``size`` may be reduced and every view still be shrunk from it: 8, 4, 2 or 1.

        Reducing averages pixels, so that only views that are antialiased anyway allow it.
        """
        if self.config.resize != "antialias" or min(size) < REDUCTIONS[-1] * ROOM * min(self.sides):
            return 1
        boxes = [draw.box for draw in self.draw(epoch, sample, size)]
        room = min(min(box[2:]) / (ROOM * side) for box, side in zip(boxes, self.sides, strict=True))
        return next((each for each in REDUCTIONS if each <= room), 1)

    def finish(self, pixels: Pixels, draw: Draw) -> Pixels:
        """Do to a crop all that follows."""
        return self.colours(pixels, draw) if pixels.dtype == np.uint8 else finish_channels(pixels, draw, self.config)

    def crop(self, image: Pixels, draw: Draw, view: int, size: Size | None = None) -> Pixels:
        """Cut a draw's box out of ``image`` and resize it to the view's side."""
        top, left, height, width = draw.box if size is None else reduced(draw.box, size, image.shape[:2])
        shrink = resize if image.dtype == np.uint8 else resize_channels
        box, side = image[top : top + height, left : left + width], self.sides[view]
        return shrink(box, side, self.config.interpolation, self.config.resize)


def reduced(box: Box, size: Size, small: Size) -> Box:
    """The same part of an image of ``size`` once it is ``small``, in whole pixels; at least one."""
    top, bottom = (round(edge * small[0] / size[0]) for edge in (box[0], box[0] + box[2]))
    left, right = (round(edge * small[1] / size[1]) for edge in (box[1], box[1] + box[3]))
    top, left = min(top, small[0] - 1), min(left, small[1] - 1)
    return top, left, max(bottom - top, 1), max(right - left, 1)


def resize(pixels: Pixels, side: int, interpolation: str, kind: str = "antialias") -> Pixels:
    """Resize (H, W, 3) to (side, side, 3), uint8.

    ``kind`` is ``[views] resize``. ``"antialias"`` are PyTorch's byte kernels, which are Pillow's within a level.
    """
    if pixels.shape[:2] == (side, side):
        return pixels
    if kind != "antialias":
        turned = resize_by_taps(pixels, side, interpolation, legacy=kind == "tensorflow_v1")
        return np.asarray(cv2.transpose(cv2.convertScaleAbs(turned)), dtype=np.uint8)
    # Its fast path wants four bytes a pixel and the strides of a batch: three times as fast, conversions included.
    batch = torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(batch, (side, side), mode=interpolation, antialias=True)
    return np.asarray(cv2.cvtColor(resized[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGBA2RGB), dtype=np.uint8)


class Colours:
    """All that follows the crop, in the paper's order, with the numbers of a draw."""

    def __init__(self, config: ViewsConfig) -> None:
        self.config = config
        self.adjust = (add_brightness, *ADJUST[1:]) if config.brightness == "add" else ADJUST
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an argument that albumentations does not know is only a warning to it
            self.gray = A.ToGray(num_output_channels=3)
            self.blur = A.GaussianBlur()
            self.solarize = A.Solarize()
            self.flip = A.HorizontalFlip()

    def __call__(self, pixels: Pixels, draw: Draw) -> Pixels:
        """Change (side, side, 3) pixels as drawn; the ones given stay as they are."""
        if self.config.transforms == "torchvision":
            pixels = self._change(pixels, draw)
        elif draw.jitter is not None or draw.gray or draw.sigma or draw.solarize:
            pixels = np.asarray(cv2.convertScaleAbs(change_colours(pixels, draw, self.config, 255.0)), dtype=np.uint8)
        if draw.flip:
            pixels = self.flip.apply(pixels)
        if draw.angle:
            pixels = rotate(pixels, draw.angle)
        if draw.hole:
            top, left, height, width = draw.hole
            pixels = pixels.copy()
            pixels[top : top + height, left : left + width] = 0
        return np.ascontiguousarray(pixels, dtype=np.uint8)

    def _change(self, pixels: Pixels, draw: Draw) -> Pixels:
        """Colours and blur as torchvision and Pillow do them, by albumentations' transforms."""
        if draw.gray and self.config.gray_first:
            pixels = self.gray.apply(pixels)
        if draw.jitter is not None:
            for number in draw.order:
                pixels = self.adjust[number](pixels, draw.jitter[number])
        if draw.gray and not self.config.gray_first:
            pixels = self.gray.apply(pixels)
        if int(SPREAD * draw.sigma):
            pixels = self.blur.apply(pixels, kernel=create_gaussian_kernel_1d(draw.sigma))
        elif draw.sigma:
            pixels = blur_slightly(pixels, draw.sigma)
        if draw.solarize:
            pixels = self.solarize.apply(pixels, threshold=0.5)
        return pixels


def blur_slightly(pixels: Pixels, sigma: float) -> Pixels:
    """Pillow's blur, for sigmas whose albumentations kernel would be a single pixel: at a quarter of Pillow's time.

    Three passes over each pixel's neighbours along rows, then three along columns, rounded after each. The kernel of a
    pass has a third of the Gaussian's variance; edges are repeated.
    """
    side = sigma**2 / 6.0
    kernel = np.array([[side, 1.0 - 2.0 * side, side]], dtype=np.float32)
    for along in (kernel, kernel.T):
        for _ in range(3):
            pixels = np.asarray(cv2.filter2D(pixels, -1, along, borderType=cv2.BORDER_REPLICATE), dtype=np.uint8)
    return pixels


def add_brightness(pixels: Pixels, share: float) -> Pixels:
    """Add a share of the full scale."""
    return np.asarray(np.rint(np.clip(pixels + np.float32(255.0 * share), 0.0, 255.0)), dtype=np.uint8)


def turn_hue(pixels: Pixels, turn: float) -> Pixels:
    """Turn the hue by a share of the circle, in 256 steps, as torchvision does with Pillow's images."""
    if turn == 0.0:
        return pixels
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)  # bytes overflow as hues do
    rows += np.tile(np.array([int(turn * 255) % 256, 0, 0], dtype=np.uint8), pixels.shape[1])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)


# By the numbers of `Draw.order`.
ADJUST: tuple[Callable[[Pixels, float], Pixels], ...] = (
    adjust_brightness_torchvision,
    adjust_contrast_torchvision,
    adjust_saturation_torchvision,
    turn_hue,
)


def rotate(pixels: Pixels, angle: float) -> Pixels:
    """Turn (side, side, 3) about its middle by ``angle`` degrees, counter-clockwise; what comes in is black."""
    middle = (pixels.shape[0] - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle, 1.0)
    return np.asarray(cv2.warpAffine(pixels, matrix, pixels.shape[:2][::-1]), dtype=np.uint8)


def normalise(pixels: Tensor, mean: PerChannel, std: PerChannel) -> Tensor:
    """Turn uint8 pixels (B, H, W, 3) into normalised floats (B, 3, H, W), channels-last in memory, on their device.

    So are uint16 pixels of any number of channels, whose full scale is 65535.
    """
    full_scale = 255.0 if pixels.dtype == torch.uint8 else float(FULL_SCALE)
    shift = torch.tensor(mean, device=pixels.device) * full_scale
    scale = torch.tensor(std, device=pixels.device) * full_scale
    return ((pixels.to(torch.float32) - shift) / scale).permute(0, 3, 1, 2)
