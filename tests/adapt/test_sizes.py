"""The start at another image size is the network that a run of this size trains, and the anchor at its size too."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from sslkit.adapt.start_weights import at_size
from sslkit.engine.setup import build_method
from sslkit.evaluate.features.encoder import Encoder
from sslkit.publish.encoder_folder import timm_config
from sslkit.recipe.resolve import build_recipe

NETWORKS = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "test_vit": {},
}


def encoder_of(name: str, args: dict[str, Any]) -> Encoder:
    torch.manual_seed(3)
    module: Any = timm.create_model(name, num_classes=0, **args)
    for value in module.parameters():
        nn.init.normal_(value, std=0.2)
    config = {"input_size": module.pretrained_cfg["input_size"], "crop_pct": 0.9, "interpolation": "bicubic"}
    preprocessing = {**config, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Encoder(
        module=module.eval(), preprocessing=preprocessing, description=name, architecture=name, model_args=args
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_start_at_a_size_is_what_a_run_of_this_size_trains(name: str) -> None:
    start = encoder_of(name, NETWORKS[name])
    found = at_size(start, 64)
    assert found is not None
    trained = timm.create_model(name, num_classes=0, img_size=64, **NETWORKS[name]).eval()
    trained.load_state_dict(found.module.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(trained(images), found.module(images))
    assert found.module.pretrained_cfg is start.module.pretrained_cfg  # without the tensors it was built from
    assert timm_config(found.module, found.preprocessing, "mit")["architecture"] == name


def test_the_anchor_has_the_position_embedding_of_the_weights(tmp_path: Any) -> None:
    module: Any = encoder_of("test_vit", {}).module
    timm.models.save_for_hf(module, str(tmp_path), safe_serialization=True)
    recipe = build_recipe(
        {
            "method": {"name": "moco_v2", "queue_size": 32},
            "backbone": {"name": "test_vit", "pretrained": f"local-dir:{tmp_path}"},
            "adapt": {"anchor": 1.0, "anchor_size": 96},
            "data": {"path": "photos"},
            "views": {"policy": "moco_v2", "size": 32},
            "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
            "train": {"epochs": 10, "batch_size": 16},
        }
    )
    anchor: Any = build_method(recipe).anchor_backbone
    direct: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, img_size=96).eval()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(anchor.module(images), direct(images), atol=1e-5)
