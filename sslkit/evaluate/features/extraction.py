"""Features of all images of a source."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import explain_death, prefetch_of
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError
from sslkit.evaluate.features.devices import feature_precision, fits_on
from sslkit.evaluate.features.encoder import fingerprint
from sslkit.evaluate.features.transforms import Transform, blank_input, finished_on, read_input
from sslkit.progress import stage

BLANK_SIDE = 256
PREFETCH = 2  # batches per worker, if shared memory allows


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Transformed images of a source with their positions.

    ``key`` is combined with the position to the seed of a random transform; None for a deterministic one. An
    unreadable image is an error, or, unless ``refuse``, a black image with its position minus the length of the source.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, key: tuple[int, ...] | None = None, *, refuse: bool = True
    ) -> None:
        self.source, self.transform, self.key, self.refuse = source, transform, key, refuse

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.make(index, self.key)

    def make(self, index: int, key: tuple[int, ...] | None) -> tuple[Tensor, int]:
        """The image at this position, with a random transform by ``key``."""
        if key is not None:
            # torchvision draws from torch, timm's crop from Python, timm's RandAugment from NumPy.
            seed = seed_from(*key, index)
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
        try:
            return self.transform(read_input(self.transform, self.source, index)), index
        except UnreadableImage:
            if self.refuse:
                raise
            return self.transform(blank_input(self.transform, BLANK_SIDE)), index - len(self.source)


def extract_features(
    module: nn.Module,
    source: ImageSource,
    transform: Transform,
    *,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    seed: int | None = None,
    unreadable: list[int] | None = None,
) -> Tensor:
    """Extract the features of all images in order: (len(source), D) float32. Labels are not read.

    The module, (B, C, H, W) -> (B, D), runs in eval mode, on GPUs in `feature_dtype`. Its mode and its weights are the
    same afterwards. ``seed`` is for a random transform. ``unreadable`` receives the positions of unreadable images,
    whose features are meaningless. The features stay on the device if it has room for them, else they are on the CPU.

    Raises:
        UnreadableImage: An image cannot be read and ``unreadable`` is None.
        UserError: The module's output is not (B, D), or shared memory is too small for the workers' batches.
        RunError: A worker died.
    """
    key = None if seed is None else (seed,)
    transform, finish = finished_on(device, transform)
    images = TransformedImages(source.without_labels(), transform, key, refuse=unreadable is None)
    loader, nbytes = image_loader(images, batch_size, workers, pin_memory=device.type == "cuda")
    was_training = module.training
    before = fingerprint(module)
    module.eval().to(device)
    features = _Features(len(source), device)
    # Not inference mode, which marks sharded weights.
    shown = stage("features", len(source), "image")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), explain_death(nbytes), shown as advance:
        for pixels, positions in loader:
            with feature_precision(device):
                output = module(finish(pixels.to(device, non_blocking=True)))
            if not isinstance(output, Tensor) or output.ndim != 2:
                kind = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
                raise UserError(
                    f"the model's output is {kind}, but it must be one vector per image; build the model with pooling "
                    "(global_pool)"
                )
            features.append(output.float())
            if unreadable is not None:
                unreadable += (positions[positions < 0] + len(source)).tolist()
            advance(len(positions))
    module.train(was_training)
    if fingerprint(module) != before:
        raise RuntimeError("the encoder changed while its features were extracted")
    return features.rows


class _Features:
    """Collects batches of features (B, D) of ``count`` images, on the device if they fit there, else on the CPU."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.rows, self.used = torch.empty(0), 0

    def append(self, batch: Tensor) -> None:
        """Add the features of the next images."""
        if not self.used:
            fits = fits_on(self.device, self.count * batch.shape[1] * batch.element_size())
            self.rows = batch.new_empty((self.count, batch.shape[1]), device=self.device if fits else "cpu")
        self.rows[self.used : self.used + len(batch)] = batch
        self.used += len(batch)


def image_loader(
    images: TransformedImages, batch_size: int, workers: int, **options: Any
) -> tuple["DataLoader[tuple[Tensor, int]]", int]:
    """A loader of batches, and the bytes of a batch in shared memory (0 without workers), which must have room."""
    nbytes = batch_bytes(images.transform, batch_size) if workers else 0
    options["prefetch_factor"] = prefetch_of(nbytes, workers, "--workers", PREFETCH)
    if "batch_sampler" not in options:
        options["batch_size"] = batch_size
    return DataLoader(images, num_workers=workers, worker_init_fn=start_worker, **options), nbytes


def batch_bytes(transform: Transform, batch_size: int) -> int:
    """Size in bytes of a batch of transformed images. The random state does not change."""
    with keep_random_state():
        return transform(blank_input(transform, BLANK_SIDE)).nbytes * batch_size


def seed_from(*key: int) -> int:
    """A 32-bit seed from several numbers, such as a seed and a position."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def keep_random_state(*, cuda: bool = False) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch on exit; of GPUs only if ``cuda`` is True."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=None if cuda else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
