"""What an accelerator does to the crops of a batch, decided on the host: which step, on which samples, by what numbers.

Samples of one step must be neighbours in memory, so that a step is one call that works in place. A stage therefore
first brings the batch into an order in which they are. All orders and numbers of a batch are in one tensor, which is
uploaded with the crops: the device is never waited for.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.data.augment.blur_kernels import CUTOFF
from sslkit.data.augment.parameters import Columns
from sslkit.data.augment.tensorflow import BLUR_DIVIDER, unchanged
from sslkit.data.augment.tensorflow import LUMA as TENSORFLOW_LUMA
from sslkit.data.augment.views_config import ViewPolicy
from sslkit.data.batch import DevicePlan, Stage, StepGroup, ViewPlan

LUMA = (0.299, 0.587, 0.114)
HUE_SECTORS = (5.0, 3.0, 1.0)  # red, green and blue in `sslkit.data.augment.gpu`'s formula of the hue
JITTER = ("brightness", "contrast", "saturation", "hue")

Rows = NDArray[np.float32]


def plan_views(params: Sequence[Rows], policies: Sequence[ViewPolicy], sides: Sequence[int]) -> DevicePlan:
    """Plan the steps of each view of a batch.

    Args:
        params: (B, 18) of each view, rows of `ViewParams.as_row`.
        policies: How each view is made.
        sides: Side of each view in pixels.
    """
    packer = _Packer()
    views = tuple(_plan_view(*each, packer) for each in zip(params, policies, sides, strict=True))
    return DevicePlan(torch.cat(packer.parts), views)


class _Packer:
    """Collects orders and numbers for one tensor."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.length = 0

    def add(self, values: Tensor) -> slice:
        """Append int32 or float32 values; returns where they are."""
        flat = values.reshape(-1)
        self.parts.append(flat if flat.dtype == torch.int32 else flat.view(torch.int32))
        self.length += len(flat)
        return slice(self.length - len(flat), self.length)


def _plan_view(params: Rows, policy: ViewPolicy, side: int, packer: _Packer) -> ViewPlan:
    luma = TENSORFLOW_LUMA if policy.transforms == "tensorflow" else LUMA
    constants = packer.add(torch.tensor([*luma, *HUE_SECTORS]))
    unmoved = order = np.arange(len(params))
    stages = []
    for steps in _stages_of(params, policy, side):
        found = [(name, rows, numbers) for name, rows, numbers in steps if len(rows)]
        if not found:
            continue
        changed = np.concatenate([rows for _, rows, _ in found])
        wanted = np.concatenate([changed, np.setdiff1d(unmoved, changed, assume_unique=True)])
        ends = np.cumsum([len(rows) for _, rows, _ in found]).tolist()
        groups = tuple(
            StepGroup(name, slice(end - len(rows), end), packer.add(numbers))
            for (name, rows, numbers), end in zip(found, ends, strict=True)
        )
        stages.append(Stage(_move(order, wanted, packer), groups))
        order = wanted
    return ViewPlan(tuple(stages), _move(order, unmoved, packer), constants)


def _move(order: NDArray[np.intp], wanted: NDArray[np.intp], packer: _Packer) -> slice | None:
    """From where in ``order`` each row of ``wanted`` is taken; None if they are equal."""
    if np.array_equal(order, wanted):
        return None
    return packer.add(torch.from_numpy(np.argsort(order)[wanted].astype(np.int32)))


_Step = tuple[str, NDArray[np.intp], Tensor]  # name, samples, numbers


def _stages_of(params: Rows, policy: ViewPolicy, side: int) -> list[list[_Step]]:
    """The steps of each stage, in the order of the papers; groups may be empty."""
    none = torch.empty(0)
    gray = [("gray", np.flatnonzero(params[:, Columns.gray] > 0), none)]
    sigma, angle = params[:, Columns.sigma], params[:, Columns.angle]
    holed, turned = np.flatnonzero(params[:, Columns.hole][:, 2] > 0), np.flatnonzero(angle != 0)
    return [
        *([gray] if policy.gray_first else []),
        *(_jitter_steps(params, policy, place) for place in range(len(JITTER))),
        *([] if policy.gray_first else [gray]),
        _blur_steps(sigma, policy, side),
        [("solarize", np.flatnonzero(params[:, Columns.solarize] > 0), none)],
        [("flip", np.flatnonzero(params[:, Columns.flip] > 0), none)],
        [("rotate", turned, _turns(torch.from_numpy(angle[turned])))],
        [("erase", holed, torch.from_numpy(params[:, Columns.hole][holed]))],
    ]


def _jitter_steps(params: Rows, policy: ViewPolicy, place: int) -> list[_Step]:
    """The steps of colour jitter that come at ``place`` for some samples."""
    jittered = params[:, Columns.jittered] > 0
    steps = []
    for number, name in enumerate(JITTER):
        factor = params[:, Columns.brightness + number]
        comes = jittered & (params[:, Columns.order][:, place] == number) & (factor != unchanged(number, policy))
        rows = np.flatnonzero(comes)
        scale = 6.0 if name == "hue" else 255.0 if name == "brightness" and policy.brightness == "add" else 1.0
        steps.append((name, rows, torch.from_numpy(factor[rows] * np.float32(scale))))
    return steps


def _blur_steps(sigma: NDArray[np.float32], policy: ViewPolicy, side: int) -> list[_Step]:
    if policy.transforms == "tensorflow":
        radius = np.full_like(sigma, side // BLUR_DIVIDER)
        rows = np.flatnonzero((sigma > 0) & (radius > 0))
        return [("blur", rows, _kernels(sigma[rows], radius[rows]))]
    radius = np.floor(np.float32(CUTOFF) * sigma)
    slightly, more = np.flatnonzero((sigma > 0) & (radius == 0)), np.flatnonzero(radius > 0)
    weights = torch.from_numpy(sigma[slightly]) ** 2 / 6.0
    return [("blur_slightly", slightly, weights), ("blur", more, _kernels(sigma[more], radius[more]))]


def _kernels(sigma: NDArray[np.float32], radii: NDArray[np.float32]) -> Tensor:
    """The Gaussians of samples, each three times: (n, 3, 2 * radius + 1), of the largest radius."""
    if not len(sigma):
        return torch.empty(0)
    radius = int(radii.max())
    places = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (places / torch.from_numpy(sigma)[:, None]) ** 2)
    kernels[places.abs() > torch.from_numpy(radii)[:, None]] = 0.0
    return (kernels / kernels.sum(dim=1, keepdim=True))[:, None].repeat(1, 3, 1)


def _turns(angle: Tensor) -> Tensor:
    """Matrices (n, 2, 3) that rotate by degrees, counter-clockwise."""
    turn = angle * (math.pi / 180.0)
    zero = torch.zeros_like(turn)
    rows = [torch.stack([turn.cos(), -turn.sin(), zero], dim=1), torch.stack([turn.sin(), turn.cos(), zero], dim=1)]
    return torch.stack(rows, dim=1)
