"""A ResNet as the checkpoint file that detectron2 reads, under detectron2's names.

The one file sslkit writes that is a pickle: detectron2 takes weights with foreign names only from a ``.pkl``
(its ``DetectionCheckpointer``). Ours holds text, a bool and float32 arrays, and its one callable is
``numpy.ndarray``, so that a reader can refuse everything else. sslkit itself never reads one.
"""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from sslkit.errors import RunError, UserError, check_path
from sslkit.evaluate.features.extraction import load_encoder
from sslkit.files.atomic import write_file, write_text
from sslkit.parts.backbone import family
from sslkit.publish.export import check_empty, new_folder
from sslkit.publish.redaction import public_recipe, refuse_tokens_in
from sslkit.recipe.resolve import Recipe, load_recipe

FILE = "detectron2.pkl"
PLAIN_NAME = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))(\.weight|\.norm\.(weight|bias|running_mean|running_var))"
)


class _PlainPickler(pickle.Pickler):
    """Arrays as ``numpy.ndarray(shape, dtype, bytes)``: readable by every NumPy, with no other callable."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def detectron2_name(name: str) -> str:
    """timm's name of a ResNet's tensor (also torchvision's) as detectron2's, as in MoCo's conversion script.

    ``layer1.0.bn2.weight`` becomes ``res2.0.conv2.norm.weight``.
    """
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"^layer([1-4])", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn([123])\b", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def detectron2_weights(state: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """A ResNet's tensors under detectron2's names; the counters of BatchNorm, which it has not, are left out.

    Args:
        state: timm's (or torchvision's) state dict of the encoder, without a classifier.

    Raises:
        UserError: A tensor that no plain ResNet has.
    """
    weights = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        renamed = detectron2_name(name)
        if not PLAIN_NAME.fullmatch(renamed):
            raise UserError(f"--format detectron2: takes plain ResNets only, which have no tensor {name!r}")
        weights[renamed] = tensor.detach().to("cpu", torch.float32).numpy()
    return weights


def export_detectron2(run: str | Path, folder: str | Path) -> dict[str, Any]:
    """Write a run's ResNet as ``detectron2.pkl``, with a page that says how detectron2 must be configured for it.

    Args:
        run: Run folder; its newest checkpoint's encoder is taken.
        folder: Where to write; must not exist or be empty.

    Returns:
        ``{"file": path, "tensors": number, "convolutions": number}``.

    Raises:
        UserError: No such run, a folder that holds something, or an encoder that is no plain ResNet.
    """
    check_path(run, "RUN")
    check_path(folder, "FOLDER")
    run, folder = Path(run), Path(folder)
    source = run / "encoder" / "model.safetensors"
    if not source.is_file() or not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: no run with an encoder (no {source}); train it first")
    check_empty(folder, "export")
    recipe = load_recipe(run / "recipe.toml")
    name = recipe.backbone.name
    if family(name) != "resnet":
        raise UserError(f"--format detectron2: takes ResNets only, and {name} is none; use --format timm")
    _, text = public_recipe(run / "recipe.toml")
    refuse_tokens_in(text, "recipe.toml", str(run / "recipe.toml"))
    model: Any = load_encoder(str(run)).module
    twin = _plain_twin(model, name)
    weights = detectron2_weights(model.state_dict())
    _prove(model, twin, name)
    content = io.BytesIO()
    _PlainPickler(content, protocol=5).dump({"model": weights, "__author__": "sslkit", "matching_heuristics": True})
    with new_folder(folder) as aside:
        write_file(aside / FILE, [content.getbuffer()])
        write_text(aside / "README.md", _page(recipe, model))
        write_text(aside / "recipe.toml", text)
    convolutions = sum(array.ndim == 4 for array in weights.values())
    return {"file": folder / FILE, "tensors": len(weights), "convolutions": convolutions}


def _plain_twin(model: Any, name: str) -> ResNet:
    """torchvision's ResNet of the same shape and weights: what detectron2 builds, with the stride in the 3 x 3."""
    stem = model.conv1
    if not isinstance(stem, nn.Conv2d) or stem.kernel_size != (7, 7) or stem.stride != (2, 2):
        raise UserError(f"--format detectron2: needs the plain 7 x 7 stem of stride 2, which {name} here has not")
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    deep = hasattr(stages[0][0], "conv3")
    middle = stages[0][0].conv2
    try:
        twin = ResNet(
            Bottleneck if deep else BasicBlock,
            [len(stage) for stage in stages],
            groups=middle.groups,
            width_per_group=middle.out_channels // middle.groups if deep else 64,
        )
        twin.fc = nn.Identity()
        twin.load_state_dict(model.state_dict())
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[-1].strip()[:150]
        raise UserError(f"--format detectron2: {name} is no plain ResNet: {first}") from error
    return twin


def _prove(model: nn.Module, twin: nn.Module, name: str) -> None:
    """The same features from both, or the encoder computes what detectron2's ResNet does not."""
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model.eval()(images), twin.eval()(images)
    if not torch.isfinite(expected).all():
        raise RunError(f"{name}: the encoder's features are not finite in evaluation; it is not usable")
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-3, atol=1e-4):
        raise UserError(f"--format detectron2: {name} computes other features than the plain ResNet of its weights")


def _page(recipe: Recipe, model: Any) -> str:
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    deep = hasattr(stages[0][0], "conv3")
    blocks = tuple(len(stage) for stage in stages)
    depth = sum(blocks) * (3 if deep else 2) + 2
    middle = stages[0][0].conv2
    means, stds = ([round(255 * value, 3) for value in values] for values in (recipe.views.mean, recipe.views.std))
    width = middle.out_channels // middle.groups
    resnet = f"    DEPTH: {depth}\n    NORM: SyncBN\n    STRIDE_IN_1X1: False\n"
    resnet += (
        f"    NUM_GROUPS: {middle.groups}\n    WIDTH_PER_GROUP: {width}\n" if deep else "    RES2_OUT_CHANNELS: 64\n"
    )
    return f"""# {recipe.backbone.name} for detectron2

`{FILE}` holds a `{recipe.backbone.name}` pretrained without labels by `{recipe.method_name}`, under detectron2's names.
It needs this configuration: detectron2's own defaults would normalise the pictures differently and freeze BatchNorm.

```yaml
MODEL:
  WEIGHTS: {FILE}
  PIXEL_MEAN: {means}
  PIXEL_STD: {stds}
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
{resnet}INPUT:
  FORMAT: RGB
```

`{FILE}` is a pickle, because detectron2 reads no other file with these names. Load it only from a source you trust; a
careful reader need allow no callable but `numpy.ndarray`. `sslkit export RUN FOLDER` without `--format` is the same
encoder in safetensors.
"""
