"""What is read off an encoder, which block and how pooled: any number of readings from one pass over the images."""

import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError, near_miss
from sslkit.evaluate.features.extraction import Encoder, extract_features, features_key
from sslkit.evaluate.features.store import FeatureStore
from sslkit.evaluate.features.transforms import Transform
from sslkit.evaluate.input_checks import check_finite

NAMED: dict[str, dict[str, Any]] = {
    "out": {},
    "dino_vit_s": {"last_blocks": 4},
    "dino_vit_b": {"last_blocks": 1, "patch_mean": True},
}


@dataclass(frozen=True)
class Reading:
    """How features are read off an encoder.

    Attributes:
        layer: Mean over positions of this block's output (timm's index); None is the model's own pooled output.
        last_blocks: Normed class tokens of so many last blocks instead, side by side, as DINO has them for ViT-S with
            4; of nets without such a token, the blocks' means over positions. 0 for none.
        patch_mean: Whether the last block's normed patch tokens, averaged, stand beside them, as DINO has them for
            ViT-B with ``last_blocks`` 1 (arXiv:2104.14294, appendix F.2, and DINO's eval_linear.py).
        crop_pct: Share of the shorter side that the centre crop keeps; 0 is the model's own.
        workers: Processes that decode images.
        batch_size: Images at a time.
        store: Where features are kept and looked for; None extracts them anew.
    """

    layer: int | None = None
    last_blocks: int = 0
    patch_mean: bool = False
    crop_pct: float = 0.0
    workers: int = 0
    batch_size: int = 256
    store: FeatureStore | None = None

    @staticmethod
    def named(word: str) -> "Reading":
        """``out``, a block's number such as ``-2``, ``last4`` or any number of last blocks, or a name in `NAMED`."""
        if word in NAMED:
            return Reading(**NAMED[word])
        if re.fullmatch(r"-?\d{1,4}", word):
            return Reading(layer=int(word))
        if re.fullmatch(r"last[1-9]\d{0,3}", word):
            return Reading(last_blocks=int(word.removeprefix("last")))
        raise UserError(
            f"--layer: {word!r} is not {', '.join(NAMED)}, a block's number, or last and a number such as last4"
            + near_miss(word, NAMED)
        )

    def __str__(self) -> str:
        """Its name in tables."""
        if self.last_blocks:
            return f"last {self.last_blocks} blocks" + (" and patch mean" if self.patch_mean else "")
        return "output" if self.layer is None else f"block {self.layer}"

    def settings(self) -> dict[str, Any]:
        """Its part of a protocol: layer and pooling; the crop is the encoder's."""
        return {"layer": str(self)}

    def taken_alike(self, other: "Reading") -> bool:
        """Whether both can come from one pass: they differ in nothing but what is read."""
        return replace(self, layer=None, last_blocks=0, patch_mean=False) == replace(
            other, layer=None, last_blocks=0, patch_mean=False
        )

    @property
    def of_blocks(self) -> bool:
        """Whether it looks at blocks, not at the model's own output."""
        return bool(self.last_blocks) or self.layer is not None

    def blocks(self, count: int) -> list[int]:
        """Which of a model's ``count`` blocks it needs, ascending."""
        if self.last_blocks:
            return list(range(count - self.last_blocks, count))
        return [] if self.layer is None else [self.layer % count]


class Reader(nn.Module):
    """Several readings of one forward pass side by side: (B, 3, H, W) -> (B, sum of `widths`).

    Attributes:
        widths: Columns of each reading.

    Raises:
        UserError: No such block or token, or a model without intermediate outputs.
    """

    def __init__(self, encoder: Encoder, readings: Sequence[Reading]) -> None:
        """Share, not copy, the encoder's module, and try it on a random picture."""
        super().__init__()
        self.module, self.readings, self.count = encoder.module, list(readings), 0
        self.has_class_token = getattr(encoder.module, "cls_token", None) is not None
        self.with_tokens = self.has_class_token and any(reading.last_blocks for reading in readings)
        self.head_on_blocks = False
        was_training, device = self.module.training, next(self.module.parameters()).device
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, *encoder.preprocessing["input_size"], generator=generator).to(device)
        self.module.eval()
        try:
            with torch.inference_mode():
                if any(reading.of_blocks for reading in readings):
                    self._find_blocks(images, encoder.architecture)
                self.widths = [each.shape[1] for each in self._read(images)]
        finally:
            self.module.train(was_training)

    def _find_blocks(self, images: Tensor, name: str) -> None:
        """Count the blocks, try to read those that are wanted, and learn whether the model's output comes with them."""
        module: Any = self.module
        try:
            self.count = len(module.forward_intermediates(images, intermediates_only=True))
        except Exception as error:  # timm's models each have their own way to say that they cannot
            raise UserError(f"--layer: {name} has no blocks to read ({_first_line(error)})") from error
        for reading in self.readings:
            if reading.last_blocks > self.count or not -self.count <= (reading.layer or 0) < self.count:
                raise UserError(f"--layer: {name} has {self.count} blocks, so that {reading} cannot be read")
            if reading.patch_mean and not self.has_class_token:
                raise UserError(f"--layer: {name} has no class token beside which its patch tokens could stand")
        tokens = inspect.signature(module.forward_intermediates).parameters
        if self.with_tokens and not ("return_prefix_tokens" in tokens and hasattr(module, "norm")):
            raise UserError(
                f"--layer: timm does not give the class tokens of {name}'s blocks, which last and dino_vit read; take "
                f"a block's mean over positions instead, such as --layer {-min(2, self.count)}"
            )
        try:
            final, _, _ = self._maps(images)
        except Exception as error:
            wanted = ", ".join(str(reading) for reading in self.readings if reading.of_blocks)
            raise UserError(f"--layer: {wanted} of {name} cannot be read ({_first_line(error)})") from error
        with suppress(Exception):  # where the model stops at the last block that is wanted, its output comes apart
            self.head_on_blocks = torch.equal(module.forward_head(final), module(images))

    def forward(self, images: Tensor) -> Tensor:
        """All readings, in their order."""
        return torch.cat(self._read(images), dim=1)

    def _read(self, images: Tensor) -> list[Tensor]:
        module: Any = self.module
        output: Any = None
        maps: dict[int, Tensor] = {}
        prefixes: dict[int, Tensor] = {}
        if any(reading.of_blocks for reading in self.readings):
            final, maps, prefixes = self._maps(images)
            output = module.forward_head(final) if self.head_on_blocks else None
        if output is None and not all(reading.of_blocks for reading in self.readings):
            output = module(images)
        return [self._pool(reading, maps, prefixes) if reading.of_blocks else output for reading in self.readings]

    def _maps(self, images: Tensor) -> tuple[Any, dict[int, Tensor], dict[int, Tensor]]:
        """What the model goes on with after its blocks, and of each block that is wanted its map and prefix tokens."""
        module: Any = self.module
        wanted = sorted({block for reading in self.readings for block in reading.blocks(self.count)})
        options = {"return_prefix_tokens": True} if self.with_tokens else {}
        final, found = module.forward_intermediates(images, indices=wanted, norm=False, **options)
        prefixes = {}
        if self.with_tokens:
            prefixes = {block: prefix for block, (_, prefix) in zip(wanted, found, strict=True)}
            found = [patches for patches, _ in found]
        maps = dict(zip(wanted, found, strict=True))
        for block, each in maps.items():
            if not isinstance(each, Tensor) or each.ndim != 4:
                raise ValueError(f"block {block} gives no map of features")
        return final, maps, prefixes

    def _pool(self, reading: Reading, maps: dict[int, Tensor], prefixes: dict[int, Tensor]) -> Tensor:
        """Maps (B, C, H, W) and prefix tokens (B, P, C) of blocks to (B, D)."""
        blocks = reading.blocks(self.count)
        if not reading.last_blocks or not self.has_class_token:
            return torch.cat([maps[block].mean(dim=(2, 3)) for block in blocks], dim=1)
        norm: Any = self.module.norm
        parts = [norm(prefixes[block][:, 0]) for block in blocks]
        if reading.patch_mean:
            parts.append(norm(maps[blocks[-1]].flatten(2).transpose(1, 2)).mean(dim=1))
        return torch.cat(parts, dim=1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read_features(
    encoder: Encoder, source: ImageSource, transform: Transform, readings: Sequence[Reading], seed: int | None = None
) -> list[Tensor]:
    """Features of every image by each reading, (len(source), D) each, from one pass over the images.

    Readings that the store has are taken from there; the pass is for the others, and leaves each under its own name.

    Args:
        encoder: Read on a GPU if there is one; see `extract_features`.
        source: Images.
        transform: From a picture to the encoder's input.
        readings: What to read; how (crop, workers, batch, store) must be the same for all.
        seed: Of a random transform, whose features are not kept; None for one that draws nothing.

    Raises:
        UserError: Features are not finite.
    """
    first, device = readings[0], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = encoder.batch_size(first.batch_size)
    if not all(reading.taken_alike(first) for reading in readings):
        raise ValueError("readings of one pass differ in nothing but layer, last_blocks and patch_mean")

    def extract(wanted: Sequence[Reading], images: ImageSource) -> list[Tensor]:
        module = Reader(encoder, wanted) if any(reading.of_blocks for reading in wanted) else encoder.module
        features = extract_features(
            module, images, transform, device=device, batch_size=batch_size, workers=first.workers, seed=seed
        )
        check_finite(features, encoder.description)
        return list(features.split(module.widths, dim=1)) if isinstance(module, Reader) else [features]

    distinct = {str(reading): reading for reading in readings}
    if first.store is None or seed is not None:
        found = extract(list(distinct.values()), source)
        return [dict(zip(distinct, found, strict=True))[str(reading)] for reading in readings]
    by_key = {features_key(encoder, source, str(transform), name): reading for name, reading in distinct.items()}
    found = first.store.features_of_all(
        list(by_key),
        len(source),
        lambda keys, rows: extract([by_key[key] for key in keys], source.subset(np.array(rows))),
    )
    return [dict(zip(distinct, found, strict=True))[str(reading)] for reading in readings]
