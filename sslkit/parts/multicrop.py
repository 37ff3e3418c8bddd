"""Multi-crop: large and small crops of an image through one encoder (SwAV, arXiv:2006.09882, section 3.2)."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from sslkit.parts.batch_slices import encode_together


def encode_by_size(encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Features (B, D) of every view. Consecutive views of one size go through the encoder in one pass.

    So each pass has batch statistics of one image size.
    """
    features: list[Tensor] = []
    for _, group in itertools.groupby(views, key=lambda view: view.shape[-1]):
        crops = list(group)
        features += encode_together(crops, encoder)
    return features
