"""Encoders as functions from images to features, and the features of a whole source."""

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import explain_death, prefetch_of
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.sharding import local_shard
from sslkit.errors import UserError, check_path, near_miss
from sslkit.evaluate.features.transforms import (
    Transform,
    blank_for,
    evaluation_transform,
    read_for,
    training_transform,
)
from sslkit.hub.availability import quick_hub, why_not
from sslkit.hub.revisions import is_hub_name, pin, pin_timm
from sslkit.hub.untrusted import check_model, encoder_state, named, read_encoder_config, tensor_shapes
from sslkit.parts.backbone import BackboneConfig, replace_stem_for_small_images
from sslkit.terminal import print_message

RAW_PIXEL_SIDE = 32
MOST_PIXELS = 256 * 3 * 512**2  # numbers in a batch of images
BLANK_SIDE = 256
AHEAD = 2  # batches that a worker makes ahead, where there is room
DECODING = "2"  # raised when the pixels of any image change, so that stored features of others are not found


@dataclass(frozen=True)
class Encoder:
    """A frozen feature extractor and the preprocessing it was made for.

    Attributes:
        module: (B, C, H, W) -> (B, D), C as ``preprocessing`` says.
        preprocessing: timm's data config: input_size, interpolation, mean, std, crop_pct, crop_mode.
        description: How to name it in tables.
        architecture: timm name it can be rebuilt from.
        model_args: Arguments it can be rebuilt with.
        small_stem: Whether its stem is `replace_stem_for_small_images`'s.
        revision: Commit on the Hugging Face Hub that the weights were loaded from; empty if from elsewhere.
    """

    module: nn.Module
    preprocessing: dict[str, Any]
    description: str
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    small_stem: bool = False
    revision: str = ""

    def transform(self) -> Transform:
        """Resize, centre crop and normalise, as timm does for evaluation."""
        return evaluation_transform(self.preprocessing)

    def training_transform(self) -> Transform:
        """Random resized crop (area 0.08 to 1) and mirror: the augmentation of the papers' linear protocols."""
        return training_transform(self.preprocessing)

    @property
    def channels(self) -> int:
        """Of the images that it takes."""
        return int(self.preprocessing["input_size"][0])

    def batch_size(self, wanted: int) -> int:
        """Images to take at a time: fewer where they are so large that ``wanted`` of them would fill the memory."""
        numbers = math.prod(int(side) for side in self.preprocessing["input_size"])
        return max(min(wanted, MOST_PIXELS // numbers), 1)

    def random_twin(self, seed: int = 0) -> "Encoder":
        """The same architecture with the weights timm draws for it: what training has to beat."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build(self.architecture, self.model_args, self.small_stem)
        return Encoder(module, self.preprocessing, "random init", self.architecture, self.model_args, self.small_stem)


def load_encoder(name: str) -> Encoder:
    """Load an encoder that is named as on the command line.

    What lies on the Hub is resolved to a commit first, and exactly that is loaded.

    Args:
        name: A run folder, an exported folder, ``hf_hub:user/repo`` (newest commit) or ``hf_hub:user/repo@revision``,
            ``local-dir:PATH``, or a timm name, whose pretrained weights are meant.

    Raises:
        UserError: Nothing of that name, or weights that do not fit.
    """
    check_path(name, "MODEL")
    folder = _encoder_folder(name)
    if folder is not None:
        return _load_folder(folder, name)
    if is_hub_name(name):
        with quick_hub():
            pinned = pin(name)
        return replace(_load_folder(pinned.folder, pinned.description), revision=pinned.revision)
    if not timm.is_model(name):
        miss = near_miss(name, timm.list_pretrained())
        raise UserError(f"{name}: no run folder, no exported folder and no timm model{miss}")
    with quick_hub():
        revision, arguments = pin_timm(name)
    return _load_from_timm(name, name, revision, arguments)


def build(architecture: str, model_args: dict[str, Any], small_stem: bool) -> nn.Module:
    """An encoder of this architecture with fresh weights."""
    module: nn.Module = timm.create_model(architecture, **{**model_args, "num_classes": 0})
    if small_stem:
        replace_stem_for_small_images(module, BackboneConfig(name=architecture, img_size=0))
    return module


def _encoder_folder(name: str) -> Path | None:
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if (path / "encoder" / "config.json").is_file():
        return path / "encoder"
    if (path / "config.json").is_file():
        return path
    if path.is_dir() or name.startswith("local-dir:"):
        raise UserError(f"{name or 'the empty name'}: holds no encoder (no config.json, no encoder/config.json)")
    return None


def _load_folder(folder: Path, name: str) -> Encoder:
    config = read_encoder_config(folder)
    check_model(config, tensor_shapes(folder / "model.safetensors"), name)
    try:
        module = build(config.architecture, config.model_args, config.small_stem)
        state = load_file(folder / "model.safetensors")
        taken, left_out = encoder_state(config, state, module.state_dict())
        module.load_state_dict(taken)
        data_config = resolve_data_config(pretrained_cfg={"architecture": config.architecture, **config.preprocessing})
    except Exception as error:  # unknown arguments make models raise anything
        lines = (str(error).strip() or type(error).__name__).splitlines()
        raise UserError(f"{name}: {folder} is not a loadable encoder: {' '.join(lines)[:300]}") from error
    if left_out:
        print_message(f"{name}: its classifier is left out ({named(left_out)})")
    return Encoder(module, data_config, name, config.architecture, config.model_args, config.small_stem)


def _load_from_timm(source: str, name: str, revision: str, arguments: Mapping[str, Any] | None = None) -> Encoder:
    try:
        with quick_hub():
            module = timm.create_model(source, pretrained=True, num_classes=0, **(arguments or {}))
    except Exception as error:  # a stranger's repository makes timm raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{name}: its pretrained weights cannot be had: {first}{why_not()}") from error
    config: Any = module.pretrained_cfg
    model_args = {key: value for key, value in getattr(module, "_model_args", {}).items() if key != "num_classes"}
    data_config = resolve_data_config(model=module)
    return Encoder(module, data_config, name, config["architecture"], model_args, revision=revision)


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Every image of a source through a transform, and its position.

    Args:
        source: Images.
        transform: To the encoder's input.
        key: What a random transform draws from, beside the position; None for one that draws nothing.
        refuse: Whether an unreadable image is an error; else a black one comes, with its position less its source's
            length.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, key: tuple[int, ...] | None = None, *, refuse: bool = True
    ) -> None:
        self.source, self.transform, self.key, self.refuse = source, transform, key, refuse

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.key is not None:
            # torchvision draws from torch, timm's crop from Python, its RandAugment from NumPy.
            draw = int(np.random.SeedSequence([*self.key, index]).generate_state(1)[0])
            torch.default_generator.manual_seed(draw)
            random.seed(draw)
            np.random.seed(draw)
        try:
            return self.transform(read_for(self.transform, self.source, index)), index
        except UnreadableImage:
            if self.refuse:
                raise
            return self.transform(blank_for(self.transform, BLANK_SIDE)), index - len(self.source)


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
    """Features of every image of ``source`` in order, (len(source), D) float32 on the CPU.

    The module runs in eval mode and leaves as it came: same mode, same bytes.

    Args:
        module: (B, 3, H, W) -> (B, D).
        source: Images; labels are not looked at.
        transform: Turns a picture into the module's input; random ones draw from (seed, index).
        device: Where the module computes.
        batch_size: Images at a time.
        workers: Processes that decode and transform.
        seed: Of a random transform; None for one that draws nothing.
        unreadable: Takes the positions of images that cannot be read, whose features are then meaningless; None makes
            such an image an error.

    Raises:
        UnreadableImage: An image cannot be read, and no list was given.
        UserError: Shared memory has no room for the workers' batches.
        RunError: A worker died.
    """
    key = None if seed is None else (seed,)
    images = TransformedImages(source.without_labels(), transform, key, refuse=unreadable is None)
    nbytes = batch_bytes(transform, batch_size) if workers else 0
    prefetch = prefetch_of(nbytes, workers, "--workers", AHEAD)
    loader = DataLoader(images, batch_size, num_workers=workers, worker_init_fn=start_worker, prefetch_factor=prefetch)
    was_training = module.training
    before = fingerprint(module)
    module.eval().to(device)
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        explain_death(nbytes),
    ):  # inference mode would mark weights in parts
        features = []
        for pixels, positions in loader:
            found = module(pixels.to(device))
            if not isinstance(found, Tensor) or found.ndim != 2:
                kind = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
                raise UserError(
                    f"the model's output is {kind}, where it should be one vector for each image: it was built without "
                    "pooling (global_pool)"
                )
            features.append(found.to("cpu", torch.float32))
            if unreadable is not None:
                unreadable += (positions[positions < 0] + len(source)).tolist()
    module.train(was_training)
    if fingerprint(module) != before:
        raise RuntimeError("the encoder changed while its features were extracted")
    return torch.cat(features)


def batch_bytes(transform: Transform, batch_size: int) -> int:
    """Bytes of a batch of a transform's results; random numbers are left as they were."""
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        nbytes = transform(blank_for(transform, BLANK_SIDE)).nbytes
    random.setstate(state[0])
    np.random.set_state(state[1])
    return int(nbytes) * batch_size


def features_key(encoder: Encoder, source: ImageSource, transform: str, reading: str) -> str:
    """Hexadecimal name of the features of an encoder, a source and a transform: equal only if all of them are."""
    said = [fingerprint(encoder.module), encoder.architecture, repr(sorted(encoder.model_args.items())), reading]
    said += [transform, source.fingerprint(), timm.__version__, torch.__version__, DECODING, source.background]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:32]


def raw_pixel_side(source: ImageSource) -> int:
    """Side in pixels at which raw pixels are compared: the first image's shorter side, within 8 to 32."""
    sides: tuple[int, ...] = source.read(0).shape[:2]
    return max(min(RAW_PIXEL_SIDE, *sides), 8)


def raw_pixels(source: ImageSource, side: int) -> Tensor:
    """The images themselves as features, resized to ``side`` x ``side`` pixels.

    Shape (len(source), 3 * side * side).
    """
    rows = []
    for index in range(len(source)):
        picture = Image.fromarray(source.read(index))
        if picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.BILINEAR)
        rows.append(np.asarray(picture))
    pixels = np.stack(rows)
    return torch.from_numpy(pixels.reshape(len(pixels), -1).astype(np.float32) / 255.0)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, names included; of those in parts, of what lies here."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(local_shard(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
