"""The encoders that an evaluation compares: the model, the same architecture with random weights, and baselines."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder, load_encoder
from sslkit.evaluate.features.readouts import Readout
from sslkit.progress import group

RAW_PIXELS = "raw pixels"

Compared = TypeVar("Compared", bound=Encoder | None)


@dataclass(frozen=True)
class TransferOptions:
    """Options of evaluations that train the whole encoder."""

    scratch: bool = True  # whether to train the architecture from random weights too
    baselines: Sequence[str | Encoder] = ()  # timm models, or encoders, to train too
    workers: int = 0  # processes that decode and augment
    log_message: Callable[[str], None] = lambda _message: None  # called with the progress, such as an epoch's loss


def frozen_encoders(
    model: str, baselines: Sequence[str | Encoder], readout: Readout, draws: int
) -> tuple[Encoder, Iterable[Encoder | None]]:
    """The encoder; and it, its random twins, None for the pixel baselines (RGB encoders only), and the baselines.

    There are as many random twins as ``draws``, each made when it is its turn.
    """
    loaded = [each if isinstance(each, Encoder) else load_encoder(each) for each in (model, *baselines)]
    encoder, *others = (_with_crop(each, readout) for each in loaded)
    pixels = [None] if encoder.channels == 3 else []
    twins = (encoder.random_twin(seed) for seed in range(draws))
    return encoder, chain([encoder], twins, pixels, others)


def in_turn(encoders: Iterable[Compared]) -> Iterator[Compared]:
    """The encoders one after the other; the progress that is shown meanwhile names each. None stands for raw pixels."""
    for encoder in encoders:
        with group(RAW_PIXELS if encoder is None else encoder.description):
            yield encoder


def trained_encoders(model: str, task: str, options: TransferOptions, seed: int) -> list[Encoder]:
    """The encoder, its random twin with weights from ``seed`` if asked for, and the baselines.

    Raises `UserError`, which names the ``task``, if the encoder does not take RGB images.
    """
    encoder = load_encoder(model)
    if encoder.channels != 3:
        raise UserError(
            f"{model}: {task} supports RGB encoders only, and this one takes {encoder.channels} channels; use kNN or "
            "linear evaluation"
        )
    twins = [replace(encoder.random_twin(seed), description="from scratch")] if options.scratch else []
    others = [each if isinstance(each, Encoder) else load_encoder(each) for each in options.baselines]
    return [encoder, *twins, *others]


def _with_crop(encoder: Encoder, readout: Readout) -> Encoder:
    if not readout.crop_pct:
        return encoder
    if not 0.1 <= readout.crop_pct <= 1.0:
        raise UserError(f"--crop-pct: must be between 0.1 and 1, not {readout.crop_pct:g}")
    return replace(encoder, preprocessing={**encoder.preprocessing, "crop_pct": readout.crop_pct})
