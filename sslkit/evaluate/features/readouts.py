"""Readouts: which layers of an encoder are the features, and how they are pooled. One pass extracts several."""

import hashlib
import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from sslkit.data.sources.image_identity import source_fingerprint
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError, first_line, near_miss
from sslkit.evaluate.features.devices import evaluation_device, feature_dtype
from sslkit.evaluate.features.encoder import Encoder, fingerprint
from sslkit.evaluate.features.extraction import extract_features
from sslkit.evaluate.features.store import FeatureStore
from sslkit.evaluate.features.transforms import Transform
from sslkit.evaluate.input_checks import check_finite

NAMED: dict[str, dict[str, Any]] = {
    "out": {},
    "dino_vit_s": {"last_blocks": 4},
    "dino_vit_b": {"last_blocks": 1, "patch_mean": True},
}
DECODER_VERSION = "2"  # increase when decoded pixels change, so that older stored features are not used


@dataclass(frozen=True)
class Readout:
    """Which features to read from an encoder, and how to extract them.

    Attributes:
        layer: Index of a block in timm's order; its output is averaged over positions. None reads the model's output.
        last_blocks: Concatenate the normalised class tokens of this many last blocks, as DINO does with 4 for ViT-S;
            for models without a class token, their averages over positions. 0 for none.
        patch_mean: Whether to append the mean of the last block's normalised patch tokens, as DINO does for ViT-B
            with ``last_blocks`` 1 (arXiv:2104.14294, appendix F.2, and DINO's eval_linear.py).
        crop_pct: Share of the shorter side that the centre crop keeps; 0 for the model's own.
        workers: Processes that decode images.
        store: Where features are stored; None extracts them every time.
    """

    layer: int | None = None
    last_blocks: int = 0
    patch_mean: bool = False
    crop_pct: float = 0.0
    workers: int = 0
    batch_size: int = 256
    store: FeatureStore | None = None

    @staticmethod
    def from_name(name: str) -> "Readout":
        """Parse ``out``, a block's index such as ``-2``, ``last`` and a number such as ``last4``, or a DINO readout."""
        if name in NAMED:
            return Readout(**NAMED[name])
        if re.fullmatch(r"-?\d{1,4}", name):
            return Readout(layer=int(name))
        if re.fullmatch(r"last[1-9]\d{0,3}", name):
            return Readout(last_blocks=int(name.removeprefix("last")))
        raise UserError(
            f"--layer: unknown readout {name!r}; must be {', '.join(NAMED)}, the index of a block such as -2, or last "
            f"and a number such as last4{near_miss(name, NAMED)}"
        )

    def __str__(self) -> str:
        """Name in tables, protocols and keys of stored features."""
        if self.last_blocks:
            return f"last {self.last_blocks} blocks" + (" and patch mean" if self.patch_mean else "")
        return "output" if self.layer is None else f"block {self.layer}"

    def settings(self) -> dict[str, Any]:
        """The readout's part of a protocol; the crop is recorded with the preprocessing."""
        return {"layer": str(self)}

    def shares_pass_with(self, other: "Readout") -> bool:
        """Whether one pass can extract both: they differ only in layers and pooling."""
        return self == replace(other, layer=self.layer, last_blocks=self.last_blocks, patch_mean=self.patch_mean)

    @property
    def reads_blocks(self) -> bool:
        """Whether it reads blocks instead of the model's output."""
        return bool(self.last_blocks) or self.layer is not None

    def blocks(self, count: int) -> list[int]:
        """Indices of the blocks to read from a model with ``count`` blocks, ascending."""
        if self.last_blocks:
            return list(range(count - self.last_blocks, count))
        return [] if self.layer is None else [self.layer % count]


class ReadoutModule(nn.Module):
    """Concatenated readouts of one forward pass: (B, C, H, W) -> (B, sum of ``widths``, one per readout).

    Shares the encoder's module, and runs it once on random pixels. Raises `UserError` if there is no such block or
    token, or timm does not return intermediate outputs of the model.
    """

    def __init__(self, encoder: Encoder, readouts: Sequence[Readout]) -> None:
        super().__init__()
        self.module, self.readouts, self.num_blocks = encoder.module, list(readouts), 0
        self.has_class_token = getattr(encoder.module, "cls_token", None) is not None
        self.with_tokens = self.has_class_token and any(readout.last_blocks for readout in readouts)
        self.head_on_blocks = False
        was_training, device = self.module.training, next(self.module.parameters()).device
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, *encoder.preprocessing["input_size"], generator=generator).to(device)
        self.module.eval()
        try:
            with torch.inference_mode():
                if any(readout.reads_blocks for readout in readouts):
                    self._check_blocks(images, encoder.architecture)
                self.widths = [each.shape[1] for each in self._read(images)]
        finally:
            self.module.train(was_training)

    def _check_blocks(self, images: Tensor, name: str) -> None:
        """Count the blocks, read them once, and find out whether the same pass gives the model's output."""
        module: Any = self.module
        try:
            self.num_blocks = len(module.forward_intermediates(images, intermediates_only=True))
        except Exception as error:  # timm's models raise many types
            raise UserError(f"--layer: the blocks of {name} cannot be read ({first_line(error)})") from error
        for readout in self.readouts:
            if readout.last_blocks > self.num_blocks or not -self.num_blocks <= (readout.layer or 0) < self.num_blocks:
                raise UserError(f"--layer: {name} has only {self.num_blocks} blocks, so {readout} cannot be read")
            if readout.patch_mean and not self.has_class_token:
                raise UserError(f"--layer: {name} has no class token, which dino_vit_b reads; take a block's index")
        parameters = inspect.signature(module.forward_intermediates).parameters
        if self.with_tokens and not ("return_prefix_tokens" in parameters and hasattr(module, "norm")):
            raise UserError(
                f"--layer: timm does not return the class tokens of {name}'s blocks, which last and dino_vit read; "
                f"take the mean of a block instead, such as --layer {-min(2, self.num_blocks)}"
            )
        try:
            final, _, _ = self._block_outputs(images)
        except Exception as error:
            wanted = ", ".join(str(readout) for readout in self.readouts if readout.reads_blocks)
            raise UserError(f"--layer: {wanted} of {name} cannot be read ({first_line(error)})") from error
        with suppress(Exception):  # fails if the model stops at the last block read; its output then takes a pass
            self.head_on_blocks = torch.equal(module.forward_head(final), module(images))

    def forward(self, images: Tensor) -> Tensor:
        """All readouts, concatenated in order."""
        return torch.cat(self._read(images), dim=1)

    def _read(self, images: Tensor) -> list[Tensor]:
        module: Any = self.module
        output: Any = None
        maps: dict[int, Tensor] = {}
        prefixes: dict[int, Tensor] = {}
        if any(readout.reads_blocks for readout in self.readouts):
            final, maps, prefixes = self._block_outputs(images)
            output = module.forward_head(final) if self.head_on_blocks else None
        if output is None and not all(readout.reads_blocks for readout in self.readouts):
            output = module(images)
        return [self._pool(each, maps, prefixes) if each.reads_blocks else output for each in self.readouts]

    def _block_outputs(self, images: Tensor) -> tuple[Any, dict[int, Tensor], dict[int, Tensor]]:
        """The last block's output, and the feature map and the prefix tokens of each block that is read."""
        module: Any = self.module
        blocks = sorted({block for readout in self.readouts for block in readout.blocks(self.num_blocks)})
        options = {"return_prefix_tokens": True} if self.with_tokens else {}
        final, outputs = module.forward_intermediates(images, indices=blocks, norm=False, **options)
        prefixes = {}
        if self.with_tokens:
            prefixes = {block: prefix for block, (_, prefix) in zip(blocks, outputs, strict=True)}
            outputs = [patches for patches, _ in outputs]
        maps = dict(zip(blocks, outputs, strict=True))
        for block, each in maps.items():
            if not isinstance(each, Tensor) or each.ndim != 4:
                raise ValueError(f"block {block} returns no feature map")
        return final, maps, prefixes

    def _pool(self, readout: Readout, maps: dict[int, Tensor], prefixes: dict[int, Tensor]) -> Tensor:
        """Pool feature maps (B, C, H, W) and prefix tokens (B, P, C) to (B, D)."""
        blocks = readout.blocks(self.num_blocks)
        if not readout.last_blocks or not self.has_class_token:
            return torch.cat([maps[block].mean(dim=(2, 3)) for block in blocks], dim=1)
        norm: Any = self.module.norm
        parts = [norm(prefixes[block][:, 0]) for block in blocks]
        if readout.patch_mean:
            parts.append(norm(maps[blocks[-1]].flatten(2).transpose(1, 2)).mean(dim=1))
        return torch.cat(parts, dim=1)


def extract_readouts(
    encoder: Encoder, source: ImageSource, transform: Transform, readouts: Sequence[Readout], seed: int | None = None
) -> list[Tensor]:
    """Extract all readouts of all images in one pass, on a GPU if there is one: (len(source), D) for each.

    Readouts in the store are loaded from it; the others are extracted and stored, unless ``seed`` makes the transform
    random. They may differ only in layers and pooling. Raises `UserError` if features are not finite.
    """
    first, device = readouts[0], evaluation_device()
    if not all(readout.shares_pass_with(first) for readout in readouts):
        raise ValueError("readouts of one pass may differ only in layer, last_blocks and patch_mean")

    def extract(wanted: Sequence[Readout], images: ImageSource) -> list[Tensor]:
        module = ReadoutModule(encoder, wanted) if any(each.reads_blocks for each in wanted) else encoder.module
        options: Any = {"batch_size": encoder.batch_size(first.batch_size), "workers": first.workers, "seed": seed}
        features = extract_features(module, images, transform, device=device, **options).cpu()
        check_finite(features, encoder.description)
        return list(features.split(module.widths, dim=1)) if isinstance(module, ReadoutModule) else [features]

    distinct = {str(readout): readout for readout in readouts}
    if first.store is None or seed is not None:
        found = extract(list(distinct.values()), source)
    else:
        by_key = {features_key(encoder, source, str(transform), name): each for name, each in distinct.items()}
        found = first.store.load_or_extract(
            list(by_key),
            len(source),
            lambda keys, rows: extract([by_key[key] for key in keys], source.subset(np.array(rows))),
        )
    by_name = dict(zip(distinct, found, strict=True))
    return [by_name[str(readout)] for readout in readouts]


def features_key(encoder: Encoder, source: ImageSource, transform: str, readout: str) -> str:
    """Key of stored features: a hash of the weights, the images, the transform, the readout, precision and versions."""
    parts = [fingerprint(encoder.module), encoder.architecture, repr(sorted(encoder.model_args.items())), readout]
    parts += [transform, source_fingerprint(source), timm.__version__, torch.__version__, DECODER_VERSION]
    dtype = feature_dtype(evaluation_device())
    parts += [str(dtype)] if dtype is not torch.float32 else []  # keys from before there was a choice are float32
    return hashlib.sha256("\0".join([*parts, source.background]).encode()).hexdigest()[:32]
