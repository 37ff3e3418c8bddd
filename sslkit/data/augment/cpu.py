"""Views made on the CPU: crops, resized as Pillow or TensorFlow does it, and the steps that follow."""

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from sslkit.data.augment.albumentations import UserTransforms, sz_lut
from sslkit.data.augment.blur_kernels import CUTOFF, gaussian_kernel, small_kernel
from sslkit.data.augment.multichannel import finish_channels, flip_rotate_erase, resize_channels
from sslkit.data.augment.parameters import Box, ViewKey, ViewParams, draw_params
from sslkit.data.augment.tensorflow import CONTRAST, HUE, SATURATION, change_colours, resize_by_taps
from sslkit.data.augment.views_config import PerChannel, ViewPolicy, ViewsConfig
from sslkit.data.decode.channels import FULL_SCALE
from sslkit.data.decode.rgb import Pixels, Size

REDUCTIONS = (8, 4, 2)  # factors by which a JPEG can be decoded smaller, at a fraction of the time
LEVELS = np.arange(256, dtype=np.float32)
SOLARIZED = np.where(LEVELS >= 127.5, 255.0 - LEVELS, LEVELS)
WHOLE_IMAGE = (768, 1024)  # size of the noise that a pipeline which crops is tried on
MARGIN = 1.25  # times a view's side that a crop of a reduced image still has, so that views stay as sharp


class ViewPipeline:
    """Makes the views of an image.

    Args:
        config: The ``[views]`` table. If a pipeline file of it does not work, `UserError` is raised.
        seed: The run's seed, first in the key of every random number.
    """

    def __init__(self, config: ViewsConfig, seed: int) -> None:
        cv2.setNumThreads(0)  # the data workers are the parallelism
        self.config, self.seed = config, seed
        self.policies = config.view_policies()
        self.sides = [policy.size for policy in self.policies]
        self.pixel_bytes = 3 if config.channels == 3 else 2 * config.channels
        self._roles = config.roles()
        self._transforms = {role: ViewTransforms(config.policy_of(role)) for role in {*self._roles}}
        self._user = {role: _user_transforms(config, role) for role in {*self._roles}}

    def __call__(self, image: Pixels, epoch: int, sample: int, size: Size | None = None) -> list[Pixels]:
        """Make all views of an image, in the order of `ViewsConfig.roles`.

        Args:
            image: (H, W, 3) uint8 RGB, or (H, W, C) uint16; views have the same type and channels.
            epoch: The epoch.
            sample: The image's position in the data.
            size: Height and width of the image before it was reduced; None if it was not.
        """
        return [self.make_view(image, epoch, sample, view, size) for view in range(len(self.policies))]

    def make_view(self, image: Pixels, epoch: int, sample: int, view: int, size: Size | None = None) -> Pixels:
        """Make one view; the arguments and the result are those of `__call__`."""
        key = (self.seed, epoch, sample, view)
        params = draw_params(self.policies[view], key, size or image.shape[:2])
        return self.finish(self.crop(image, params, view, size), params, key)

    def crop_views(
        self, image: Pixels, epoch: int, sample: int, size: Size | None = None
    ) -> tuple[list[Pixels], list[NDArray[np.float32]]]:
        """Crop all views, and give the parameters of the steps that an accelerator does; see `ViewParams.as_row`."""
        params = self.view_params(epoch, sample, size or image.shape[:2])
        crops = [self.crop(image, each, view, size) for view, each in enumerate(params)]
        return crops, [each.as_row() for each in params]

    def view_params(self, epoch: int, sample: int, size: Size) -> list[ViewParams]:
        """The random parameters of each view of an image of ``size``."""
        keys = [(self.seed, epoch, sample, view) for view in range(len(self.policies))]
        return [draw_params(policy, key, size) for policy, key in zip(self.policies, keys, strict=True)]

    def reduction(self, epoch: int, sample: int, size: Size) -> int:
        """The factor by which an image of ``size`` may be reduced so that every view is still shrunk: 8, 4, 2 or 1.

        Reducing averages pixels, so that only antialiased views allow it.
        """
        reducible = all(policy.resize == "antialias" and policy.crop_sampler != "none" for policy in self.policies)
        if not reducible or min(size) < REDUCTIONS[-1] * MARGIN * min(self.sides):
            return 1
        boxes = [params.box for params in self.view_params(epoch, sample, size)]
        room = min(min(box[2:]) / (MARGIN * side) for box, side in zip(boxes, self.sides, strict=True))
        return next((each for each in REDUCTIONS if each <= room), 1)

    def crop(self, image: Pixels, params: ViewParams, view: int, size: Size | None = None) -> Pixels:
        """Crop the box out of ``image`` and resize it to the view's side."""
        policy = self.policies[view]
        if policy.crop_sampler == "none":
            return image
        top, left, height, width = params.box if size is None else reduced(params.box, size, image.shape[:2])
        shrink = resize if image.dtype == np.uint8 else resize_channels
        return shrink(image[top : top + height, left : left + width], policy.size, policy.interpolation, policy.resize)

    def finish(self, crop: Pixels, params: ViewParams, key: ViewKey) -> Pixels:
        """Do all that follows the crop."""
        policy, role = self.policies[key[3]], self._roles[key[3]]
        if user := self._user[role]:
            return resize(user(crop, key), policy.size, policy.interpolation, policy.resize)
        if crop.dtype != np.uint8:
            return finish_channels(crop, params, policy)
        return self._transforms[role](crop, params)


def _user_transforms(config: ViewsConfig, role: str) -> UserTransforms | None:
    policy = config.policy_of(role)
    if policy.pipeline is None:
        return None
    table = f"[views.{role}]" if "transforms" in getattr(config, role).overrides() else "[views]"
    size = WHOLE_IMAGE if policy.crop_sampler == "none" else (policy.size, policy.size)
    return UserTransforms(policy.pipeline, size, f"{table} transforms")


def reduced(box: Box, size: Size, small: Size) -> Box:
    """The same part of an image of ``size`` after it is reduced to ``small``, in whole pixels; at least one."""
    top, bottom = (round(edge * small[0] / size[0]) for edge in (box[0], box[0] + box[2]))
    left, right = (round(edge * small[1] / size[1]) for edge in (box[1], box[1] + box[3]))
    top, left = min(top, small[0] - 1), min(left, small[1] - 1)
    return top, left, max(bottom - top, 1), max(right - left, 1)


def resize(pixels: Pixels, side: int, interpolation: str, kind: str = "antialias") -> Pixels:
    """Resize (H, W, 3) to (side, side, 3), uint8.

    ``kind`` is ``[views] resize``. ``"antialias"`` uses PyTorch's byte kernels, which are within a level of Pillow's.
    """
    if pixels.shape[:2] == (side, side):
        return pixels
    if kind != "antialias":
        transposed = resize_by_taps(pixels, side, interpolation, legacy=kind == "tensorflow_v1")
        return np.asarray(cv2.transpose(cv2.convertScaleAbs(transposed)), dtype=np.uint8)
    # PyTorch's fast path wants four bytes a pixel and a batch's strides: three times as fast, conversions included.
    batch = torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(batch, (side, side), mode=interpolation, antialias=True)
    return np.asarray(cv2.cvtColor(resized[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGBA2RGB), dtype=np.uint8)


class ByteColours:
    """Colour steps on (H, W, 3) uint8 RGB, which is left as it is: to the byte those of albumentations 2.

    They are what torchvision does to Pillow images, and round down between the steps. A step that maps each byte by
    itself waits in a table for the next one that does not, so that several take one pass.
    """

    def __init__(self, pixels: Pixels) -> None:
        self._pixels: Any = pixels
        self._owned = False  # whether the pixels may be overwritten
        self._table: NDArray[np.uint8] | None = None

    def pixels(self) -> Pixels:
        """The pixels after all steps."""
        if self._table is not None:
            own = self._pixels if self._owned else self._pixels.copy()
            self._replace(sz_lut(own, self._table, inplace=True))
            self._table = None
        return np.asarray(self._pixels, dtype=np.uint8)

    def look_up(self, values: NDArray[np.float32]) -> None:
        """Replace each byte by one of ``values`` (256,), bounded and rounded down."""
        table = np.minimum(np.maximum(values, 0.0), 255.0).astype(np.uint8)  # `np.clip` takes three times as long
        self._table = table if self._table is None else table[self._table]

    def to_gray(self) -> None:
        """Convert to grey: three equal channels."""
        self._replace(cv2.cvtColor(self._gray(), cv2.COLOR_GRAY2RGB))

    def scale_contrast(self, factor: float) -> None:
        """Scale the distance of values from the mean of the grey image."""
        if factor != 1.0:
            gray = self._gray()
            mean = cv2.sumElems(gray)[0] / gray.size
            self.look_up(LEVELS * np.float32(factor) + np.float32(mean * (1.0 - factor)))

    def scale_saturation(self, factor: float) -> None:
        """Scale the distance of values from grey."""
        if factor != 1.0:
            gray = cv2.cvtColor(self._gray(), cv2.COLOR_GRAY2RGB)
            self._replace(cv2.addWeighted(self._pixels, factor, gray, 1.0 - factor, 0.0, dst=gray))

    def shift_hue(self, shift: float) -> None:
        """Shift the hue by a share of the circle, in 256 steps, as torchvision does on Pillow images."""
        if shift != 0.0:
            hsv = cv2.cvtColor(self.pixels(), cv2.COLOR_RGB2HSV_FULL)
            rows = hsv.reshape(len(hsv), -1)  # bytes wrap around as hues do
            shifts = np.zeros(rows.shape[1], dtype=np.uint8)
            shifts[::3] = int(shift * 255) % 256
            rows += shifts
            self._replace(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv))

    def blur(self, sigma: float) -> None:
        """Blur by a Gaussian; see the function of this name."""
        self._replace(blur(self.pixels(), sigma))

    def _replace(self, pixels: Any) -> None:
        self._pixels, self._owned = pixels, True

    def _gray(self) -> Any:
        return cv2.cvtColor(self.pixels(), cv2.COLOR_RGB2GRAY)


class ViewTransforms:
    """All that follows the crop of an RGB view, in the paper's order, with the numbers of its `ViewParams`."""

    def __init__(self, policy: ViewPolicy) -> None:
        self.policy = policy

    def __call__(self, pixels: Pixels, params: ViewParams) -> Pixels:
        """Transform (side, side, 3) uint8 pixels, which are left as they are."""
        if self.policy.transforms == "torchvision":
            pixels = self._change_colours(pixels, params)
        elif params.jitter is not None or params.gray or params.sigma or params.solarize:
            pixels = np.asarray(cv2.convertScaleAbs(change_colours(pixels, params, self.policy, 255.0)), dtype=np.uint8)
        return np.ascontiguousarray(flip_rotate_erase(pixels, params), dtype=np.uint8)

    def _change_colours(self, pixels: Pixels, params: ViewParams) -> Pixels:
        """Colours and blur as torchvision and Pillow do them."""
        view = ByteColours(pixels)
        if params.gray and self.policy.gray_first:
            view.to_gray()
        if params.jitter is not None:
            for step in params.order:
                self._jitter(view, step, params.jitter[step])
        if params.gray and not self.policy.gray_first:
            view.to_gray()
        if params.sigma:
            view.blur(params.sigma)
        if params.solarize:
            view.look_up(SOLARIZED)
        return view.pixels()

    def _jitter(self, view: ByteColours, step: int, factor: float) -> None:
        if step == HUE:
            view.shift_hue(factor)
        elif step == CONTRAST:
            view.scale_contrast(factor)
        elif step == SATURATION:
            view.scale_saturation(factor)
        elif self.policy.brightness == "add":
            view.look_up(np.rint(LEVELS + np.float32(255.0 * factor)))
        elif factor != 1.0:
            view.look_up(LEVELS * np.float32(factor))


def blur(pixels: Pixels, sigma: float) -> Pixels:
    """Blur (side, side, 3) uint8 by a Gaussian.

    A kernel that ends at `CUTOFF` standard deviations is a single pixel for small sigmas. Those are blurred as Pillow
    does it, in a quarter of Pillow's time: three passes along rows, then three along columns, rounded after each.
    """
    if radius := int(CUTOFF * sigma):
        kernel = gaussian_kernel(sigma, radius)
        return np.asarray(cv2.sepFilter2D(pixels, -1, kernel, kernel), dtype=np.uint8)
    row = small_kernel(sigma).astype(np.float32)[None]
    for weights in (row, row.T):
        for _ in range(3):
            pixels = np.asarray(cv2.filter2D(pixels, -1, weights, borderType=cv2.BORDER_REPLICATE), dtype=np.uint8)
    return pixels


class Normaliser:
    """Normalises pixels on their device. Mean and standard deviation are uploaded once a device, at the first call.

    Keep one for a run: an upload in each step would make the host wait for the device.

    Args:
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel.
    """

    def __init__(self, mean: PerChannel, std: PerChannel) -> None:
        self.mean, self.std = mean, std
        self._uploaded: dict[tuple[torch.device, float], tuple[Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 pixels (B, H, W, 3) to floats (B, 3, H, W), channels-last in memory.

        uint16 pixels of any number of channels are normalised by their full scale, 65535.
        """
        shift, scale = self._constants(pixels.device, 255.0 if pixels.dtype == torch.uint8 else float(FULL_SCALE))
        return ((pixels.to(torch.float32) - shift) / scale).permute(0, 3, 1, 2)

    def _constants(self, device: torch.device, full_scale: float) -> tuple[Tensor, Tensor]:
        """What is subtracted and what is divided by, on ``device``."""
        key = device, full_scale
        if key not in self._uploaded:
            shift, scale = torch.tensor(self.mean) * full_scale, torch.tensor(self.std) * full_scale
            self._uploaded[key] = shift.to(device), scale.to(device)
        return self._uploaded[key]


def normalise(pixels: Tensor, mean: PerChannel, std: PerChannel) -> Tensor:
    """Normalise pixels once, as `Normaliser` does; the constants are uploaded in each call."""
    return Normaliser(mean, std)(pixels)
