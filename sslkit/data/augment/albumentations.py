"""All that sslkit uses of albumentations, by its public names.

`ColourTransforms` are the colour steps of the view policies. `UserTransforms` runs a pipeline of the user's own.
"""

import json
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import albumentations as A  # noqa: N812  (the library's own convention)
import cv2
import numpy as np

from sslkit.data.augment.user_pipeline import UserPipeline
from sslkit.data.decode.rgb import Pixels
from sslkit.errors import UserError, near_miss
from sslkit.random_draws import DrawPurpose

TRIALS = 4  # times that a new pipeline is run on noise


class ColourTransforms:
    """Colour steps on (H, W, 3) uint8 RGB with given numbers, as torchvision does them on Pillow images.

    albumentations draws the numbers of a transform itself when the transform is called. Here they are given, so the
    transforms' `apply` is called instead. It has had the same keywords since albumentations 1.4.
    """

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations only warns of unknown arguments
            self._jitter: Callable[..., Pixels] = A.ColorJitter().apply
            self._gray: Callable[..., Pixels] = A.ToGray(num_output_channels=3).apply
            self._solarize: Callable[..., Pixels] = A.Solarize().apply

    def brightness(self, pixels: Pixels, factor: float) -> Pixels:
        """Multiply by ``factor``."""
        return self._jitter(pixels, brightness=factor, contrast=1.0, saturation=1.0, hue=0.0, order=(0,))

    def contrast(self, pixels: Pixels, factor: float) -> Pixels:
        """Blend with the mean of the grey image."""
        return self._jitter(pixels, brightness=1.0, contrast=factor, saturation=1.0, hue=0.0, order=(1,))

    def saturation(self, pixels: Pixels, factor: float) -> Pixels:
        """Blend with the grey image."""
        return self._jitter(pixels, brightness=1.0, contrast=1.0, saturation=factor, hue=0.0, order=(2,))

    def gray(self, pixels: Pixels) -> Pixels:
        """Convert to grey, in three equal channels."""
        return self._gray(pixels)

    def solarize(self, pixels: Pixels) -> Pixels:
        """Invert values from 128 up."""
        return self._solarize(pixels, threshold=0.5)


class UserTransforms:
    """A pipeline of the user's own, with random numbers that depend on a key alone.

    Args:
        pipeline: The serialised pipeline.
        size: Height and width of the images it will get; it is tried on noise of this size.
        where: The recipe key that names it; opens each error.

    Raises:
        UserError: albumentations cannot build the pipeline, or it fails on noise.
    """

    def __init__(self, pipeline: UserPipeline, size: tuple[int, int], where: str) -> None:
        self._where = where
        for name in pipeline.class_names():
            self._check_class(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # albumentations only warns of unknown arguments
                self._compose: Any = A.from_dict(json.loads(pipeline.pipeline))
        except Exception as error:  # each transform checks its arguments in its own way
            raise UserError(f"{where}: albumentations cannot build this pipeline: {_in_one_line(error)}") from error
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        for trial in range(TRIALS):
            self(noise, (trial,))

    def __call__(self, pixels: Pixels, key: Sequence[int]) -> Pixels:
        """Apply the pipeline to (H, W, 3) uint8.

        Args:
            pixels: Left as they are.
            key: Seed, epoch, sample and view; the result is a function of it and ``pixels``.

        Returns:
            (S, S, 3) uint8, of any side.

        Raises:
            UserError: A transform fails, or the result is not a square uint8 RGB image.
        """
        seed, *rest = key
        generator = np.random.default_rng([seed, DrawPurpose.USER_PIPELINE, *rest])
        self._compose.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        cv2.setRNGSeed(int(generator.integers(2**31)))  # a few transforms draw from OpenCV's own generator
        try:
            result = self._compose(image=pixels.copy())["image"]
        except Exception as error:  # transforms fail in their own ways
            height, width = pixels.shape[:2]
            raise UserError(
                f"{self._where}: the pipeline fails on an image of {width} x {height} pixels: {_in_one_line(error)}"
            ) from error
        return self._checked(result)

    def _checked(self, result: Any) -> Pixels:
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8:
            kind = result.dtype if hasattr(result, "dtype") else type(result).__name__
            raise UserError(
                f"{self._where}: the pipeline must return uint8 pixels, not {kind}; leave out Normalize, ToFloat and "
                "ToTensorV2: views are normalised later, by [views] mean and std"
            )
        if result.ndim != 3 or result.shape[2] != 3 or result.shape[0] != result.shape[1]:
            raise UserError(
                f"{self._where}: the pipeline must return square RGB images, (side, side, 3), not {result.shape}; end "
                "it with a transform such as A.RandomResizedCrop((224, 224)) or A.Resize(224, 224)"
            )
        return result

    def _check_class(self, name: str) -> None:
        found = getattr(A, name, None)
        if not (isinstance(found, type) and issubclass(found, A.BasicTransform | A.BaseCompose)):
            known = [each for each in dir(A) if each[0].isupper()]
            raise UserError(
                f"{self._where}: albumentations {A.__version__} has no transform {name!r}{near_miss(name, known)}"
            )


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
