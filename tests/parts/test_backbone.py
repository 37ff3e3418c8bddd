"""What MoCo v3 asks of a ViT, and what create_backbone refuses."""

import pytest
import torch
from golden.arithmetic import vit_init_bounds, vit_trunk_count
from golden.formulas import sincos2d

from sslkit.errors import UserError
from sslkit.parts.backbone import BackboneConfig, create_backbone, family, feature_dim


def v3_vit(name: str, **changes: object) -> torch.nn.Module:
    fields = {"img_size": 224, "init": "moco_v3", "pos_embed": "sincos2d", "freeze_patch_embed": True} | changes
    return create_backbone(BackboneConfig(name=name, **fields))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def vit_small() -> torch.nn.Module:
    torch.manual_seed(0)
    return v3_vit("vit_small_patch16_224", args={"num_heads": 12})


def test_vit_small_counts_and_heads(vit_small: torch.nn.Module) -> None:
    assert sum(p.numel() for p in vit_small.parameters()) == vit_trunk_count(384) == 21_665_664
    assert sum(p.numel() for p in vit_small.parameters() if p.requires_grad) == 21_294_720
    assert all(block.attn.num_heads == 12 for block in vit_small.blocks)


def test_vit_small_initialisation(vit_small: torch.nn.Module) -> None:
    bounds = vit_init_bounds(384)
    block = vit_small.blocks[3]
    for weight, bound in [
        (block.attn.qkv.weight, bounds["qkv"]),
        (block.attn.proj.weight, bounds["proj"]),
        (block.mlp.fc1.weight, bounds["fc1"]),
        (block.mlp.fc2.weight, bounds["fc2"]),
        (vit_small.patch_embed.proj.weight, bounds["patch_embed"]),
    ]:
        assert bound * 0.995 < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    biases = [p for n, p in vit_small.named_parameters() if n.endswith("bias")]
    assert all(torch.count_nonzero(bias) == 0 for bias in biases)
    assert vit_small.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)


def test_position_embedding_is_the_papers(vit_small: torch.nn.Module) -> None:
    table = vit_small.pos_embed.detach()
    assert torch.count_nonzero(table[0, 0]) == 0
    torch.testing.assert_close(table[0, 1:].double(), sincos2d(14, 14, 384), rtol=0, atol=1e-6)
    assert table.double().sum().item() == pytest.approx(34713.824, abs=0.01)
    torch.testing.assert_close(table[0, 1:].square().sum(dim=1), torch.full((196,), 192.0))
    assert not vit_small.pos_embed.requires_grad
    assert not vit_small.patch_embed.proj.weight.requires_grad


def test_families() -> None:
    assert family("resnet50") == family("test_resnet") == "resnet"
    assert family("vit_tiny_patch16_224") == family("deit_small_patch16_224") == "vit"
    assert family("convnext_tiny") == family("swin_tiny_patch4_window7_224") == "other"


def test_zero_init_last_is_honoured() -> None:
    for zero in (False, True):
        model = create_backbone(BackboneConfig(name="resnet18", img_size=32, zero_init_last=zero))
        assert (torch.count_nonzero(model.layer1[0].bn2.weight) == 0) == zero


def test_small_stem_keeps_resolution() -> None:
    model = create_backbone(BackboneConfig(name="resnet18", img_size=32, small_stem=True))
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "resnet5O"}, "did you mean 'resnet50'"),
        ({"name": "resnet18", "pos_embed": "sincos2d"}, r"\[backbone\] pos_embed"),
        ({"name": "resnet18", "freeze_patch_embed": True}, r"\[backbone\] freeze_patch_embed"),
        ({"name": "test_vit", "small_stem": True}, r"\[backbone\] small_stem"),
        ({"name": "resnet18", "args": {"depht": 3}}, "depht"),
        ({"name": "vit_tiny_patch16_224", "args": {"num_heads": 7}}, "timm cannot build"),
    ],
)
def test_refusals(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_backbone(BackboneConfig(img_size=32, **fields))  # type: ignore[arg-type]


def test_image_size_refused() -> None:
    model = create_backbone(BackboneConfig(name="test_vit", img_size=32))
    with pytest.raises(UserError, match=r"\[views\] size: .* 30 x 30"):
        feature_dim(model, 30)
    assert feature_dim(model, 32) == 64
