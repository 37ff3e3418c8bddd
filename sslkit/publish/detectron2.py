"""Export of a ResNet as a checkpoint file for detectron2.

The file is a pickle, the only one that sslkit writes, because detectron2 reads weights with converted names from a
``.pkl`` only. Its only callable is ``numpy.ndarray``, so a reader can refuse all others. sslkit never reads it.
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

from sslkit.errors import RunError, UserError
from sslkit.evaluate.features.encoder import load_encoder
from sslkit.files.atomic import write_file, write_text
from sslkit.parts.backbone import family
from sslkit.publish.encoder_folder import features_on_noise, new_folder
from sslkit.publish.export import check_export
from sslkit.publish.redaction import public_recipe, refuse_tokens_in
from sslkit.recipe.resolve import Recipe, load_recipe

FILE = "detectron2.pkl"
PLAIN_NAME = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))(\.weight|\.norm\.(weight|bias|running_mean|running_var))"
)


class _PlainPickler(pickle.Pickler):
    """Writes arrays as ``numpy.ndarray(shape, dtype, bytes)``, which all versions of NumPy read."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def detectron2_name(name: str) -> str:
    """Convert the name of a ResNet's tensor from timm's or torchvision's to detectron2's.

    Same as MoCo's conversion script: ``layer1.0.bn2.weight`` becomes ``res2.0.conv2.norm.weight``.
    """
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"^layer([1-4])", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn([123])\b", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def detectron2_weights(state: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """Convert the tensors of a ResNet without a classifier; raises `UserError` for a tensor of another model.

    BatchNorm's counters are left out, since detectron2 has none.
    """
    weights = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        renamed = detectron2_name(name)
        if not PLAIN_NAME.fullmatch(renamed):
            raise UserError(f"--format detectron2: supports plain ResNets only, which have no tensor {name!r}")
        weights[renamed] = tensor.detach().to("cpu", torch.float32).numpy()
    return weights


def export_detectron2(run: str | Path, folder: str | Path) -> dict[str, Any]:
    """Export the ResNet of a run's newest checkpoint to a new or empty folder, with the configuration that it needs.

    Returns ``{"file": path, "tensors": number, "convolutions": number}``. Raises `UserError` if there is no such
    run, the folder is not empty, or the encoder is not a plain ResNet.
    """
    run, folder = check_export(run, folder)
    recipe = load_recipe(run / "recipe.toml")
    name = recipe.backbone.name
    if family(name) != "resnet":
        raise UserError(f"--format detectron2: supports ResNets only, not {name}; use --format timm")
    _, text = public_recipe(run / "recipe.toml")
    refuse_tokens_in(text, "recipe.toml", str(run / "recipe.toml"))
    model: Any = load_encoder(str(run)).module
    twin = _plain_twin(model, name)
    weights = detectron2_weights(model.state_dict())
    _verify(model, twin, name)
    content = io.BytesIO()
    _PlainPickler(content, protocol=5).dump({"model": weights, "__author__": "sslkit", "matching_heuristics": True})
    with new_folder(folder) as temporary:
        write_file(temporary / FILE, [content.getbuffer()])
        write_text(temporary / "README.md", _readme(recipe, twin))
        write_text(temporary / "recipe.toml", text)
    convolutions = sum(array.ndim == 4 for array in weights.values())
    return {"file": folder / FILE, "tensors": len(weights), "convolutions": convolutions}


def _plain_twin(model: Any, name: str) -> ResNet:
    """torchvision's ResNet with these weights, which computes the same as detectron2's (stride in the 3 x 3)."""
    stem = model.conv1
    if not isinstance(stem, nn.Conv2d) or stem.kernel_size != (7, 7) or stem.stride != (2, 2):
        raise UserError(f"--format detectron2: needs the plain 7 x 7 stem of stride 2, which {name} does not have here")
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
        reason = str(error).strip().splitlines()[-1].strip()[:150]
        raise UserError(f"--format detectron2: {name} is not a plain ResNet: {reason}") from error
    return twin


def _verify(model: nn.Module, twin: nn.Module, name: str) -> None:
    """Check that both return the same features."""
    expected, found = features_on_noise(model, twin, (3, 96, 96))
    if not torch.isfinite(expected).all():
        raise RunError(f"{name}: not written, because the encoder's features are not finite (NaN or infinity)")
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-3, atol=1e-4):
        raise UserError(f"--format detectron2: {name} computes other features than a plain ResNet with its weights")


def _readme(recipe: Recipe, twin: ResNet) -> str:
    deep = isinstance(twin.layer1[0], Bottleneck)
    blocks = sum(map(len, (twin.layer1, twin.layer2, twin.layer3, twin.layer4)))
    widths = f"NUM_GROUPS: {twin.groups}\n    WIDTH_PER_GROUP: {twin.base_width}" if deep else "RES2_OUT_CHANNELS: 64"
    means, stds = ([round(255 * value, 3) for value in values] for values in (recipe.views.mean, recipe.views.std))
    return f"""# {recipe.backbone.name} for detectron2

`{FILE}` is a `{recipe.backbone.name}` pretrained without labels by `{recipe.method_name}`, with detectron2's names.
Use this configuration: detectron2's defaults would normalise the images differently and freeze BatchNorm.

```yaml
MODEL:
  WEIGHTS: {FILE}
  PIXEL_MEAN: {means}
  PIXEL_STD: {stds}
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    DEPTH: {blocks * (3 if deep else 2) + 2}
    NORM: SyncBN
    STRIDE_IN_1X1: False
    {widths}
INPUT:
  FORMAT: RGB
```

`{FILE}` is a pickle, the only format from which detectron2 reads these weights. Load it only from a source that you
trust; a reader needs to allow no callable except `numpy.ndarray`. `sslkit export RUN FOLDER` without `--format` exports
the same encoder in safetensors.
"""
