"""All that sslkit uses of albumentations, by its public names.

`UserTransforms` runs a pipeline of the user's own. `sz_lut` is the lookup of bytes that albumentations itself uses.
"""

import json
import random
import warnings
from collections.abc import Sequence
from typing import Any

import albumentations as A  # noqa: N812  (the library's own convention)
import cv2
import numpy as np
from albucore import sz_lut

from sslkit.data.augment.user_pipeline import UserPipeline
from sslkit.data.decode.rgb import Pixels
from sslkit.errors import UserError, first_line, near_miss
from sslkit.random_draws import DrawPurpose

__all__ = ["UserTransforms", "sz_lut"]
TRIALS = 4  # times that a new pipeline is run on noise


class UserTransforms:
    """A pipeline of the user's own, with random numbers that depend on a key alone.

    It is tried on noise of ``size`` (height, width), that of the images it will get. Errors begin with ``where``, the
    recipe key that names it. Raises `UserError` if albumentations cannot build the pipeline, or if it fails on noise.
    """

    def __init__(self, pipeline: UserPipeline, size: tuple[int, int], where: str) -> None:
        self._where = where
        bases = A.BasicTransform, A.BaseCompose
        known = [name for name, found in vars(A).items() if isinstance(found, type) and issubclass(found, bases)]
        if unknown := [name for name in pipeline.class_names() if name not in known]:
            near = near_miss(unknown[0], known)
            raise UserError(f"{where}: albumentations {A.__version__} has no transform {unknown[0]!r}{near}")
        try:
            with warnings.catch_warnings(action="error"):  # albumentations only warns of unknown arguments
                self._compose: Any = A.from_dict(json.loads(pipeline.pipeline))
        except Exception as error:  # each transform checks its arguments in its own way
            raise UserError(f"{where}: albumentations cannot build this pipeline: {_describe_error(error)}") from error
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        for trial in range(TRIALS):
            self(noise, (trial,))

    def __call__(self, pixels: Pixels, key: Sequence[int]) -> Pixels:
        """Apply the pipeline to (H, W, 3) uint8, which is left as it is: (S, S, 3) uint8, of any side.

        The result depends on the pixels and on ``key`` alone: seed, epoch, sample and view. Raises `UserError` if a
        transform fails, or if the result is not a square uint8 RGB image.
        """
        seed, *rest = key
        generator = np.random.default_rng([seed, DrawPurpose.USER_PIPELINE, *rest])
        self._compose.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        cv2.setRNGSeed(int(generator.integers(2**31)))  # a few transforms draw from OpenCV's own generator
        try:
            result = self._compose(image=pixels.copy())["image"]
        except Exception as error:  # transforms fail in their own ways
            problem = f"fails on an image of {pixels.shape[1]} x {pixels.shape[0]} pixels: {_describe_error(error)}"
            raise UserError(f"{self._where}: the pipeline {problem}") from error
        return self._checked(result)

    def _checked(self, result: Any) -> Pixels:
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8:
            kind = getattr(result, "dtype", type(result).__name__)
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


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error, 300)}"
