"""The anchor: a frozen copy of the backbone that a run starts from, whose features the student's keep near."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from sslkit.errors import UserError, first_line
from sslkit.parts.momentum_teacher import MomentumTeacher


class Anchor(MomentumTeacher):
    """A teacher of momentum 1 in eval mode, and the weight of its term in the loss.

    Args:
        start: The backbone to copy.
        weight: Weight of the term.
        size: Size in pixels to which the views are resized for the copy; 0 leaves them as they are.
        channels: Of the views.

    Raises:
        UserError: The backbone does not take images of this size.
    """

    def __init__(self, start: nn.Module, weight: float, size: int = 0, channels: int = 3) -> None:
        super().__init__(start, batch_statistics=False)
        self.weight, self.size = weight, size
        self.module.eval()
        if size:
            try:
                set_input_size: Any = getattr(self.module, "set_input_size", None)
                if set_input_size is not None:
                    set_input_size(img_size=(size, size))
                self.module(next(self.module.parameters()).new_zeros(1, channels, size, size))
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                reason = first_line(error)
                raise UserError(f"[adapt] anchor_size: {size} does not fit the backbone ({reason})") from error

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        """Features (B, D) of a view (B, C, H, W)."""
        if self.size and view.shape[-1] != self.size:
            view = interpolate(view, (self.size, self.size), mode="bicubic", align_corners=False)
        features: Tensor = super().forward(view)
        return features

    def distance(self, features: Sequence[Tensor], anchored: Sequence[Tensor]) -> Tensor:
        """1 - cosine similarity of the student's features and those of the start, mean over views and images: ()."""
        terms = []
        for own, start in zip(features, anchored, strict=True):
            work = torch.promote_types(own.dtype, torch.float32)
            terms.append(1.0 - cosine_similarity(own.to(work), start.to(work), dim=1).mean())
        return torch.stack(terms).mean()
