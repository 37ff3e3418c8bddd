"""``--layer`` on families of timm whose blocks each have ways of their own: features of the layer, or one sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.volo import VOLO

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.readouts import Readout, ReadoutModule

SIZE = 32
VIT: dict[str, Any] = {"img_size": SIZE, "embed_dim": 16, "depth": 3, "num_heads": 2}


def volo() -> torch.nn.Module:
    layers, widths, heads = (1, 1, 1, 1), (8, 16, 16, 16), (1, 1, 1, 1)
    options: dict[str, Any] = {"mlp_ratio": 2.0, "stem_hidden_dim": 8, "num_classes": 0, "img_size": SIZE}
    return VOLO(layers=layers, embed_dims=widths, num_heads=heads, **options)


def of(name: str, **args: Any) -> Callable[[], torch.nn.Module]:
    return lambda: timm.create_model(name, num_classes=0, **args)


# Builder, side of its images, and whether timm gives the class tokens of its blocks (None: it has none).
FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], int, bool | None]] = {
    "PiT": (of("pit_ti_224"), 224, False),
    "CaiT": (of("cait_xxs24_224", **VIT), SIZE, False),
    "XCiT": (of("xcit_nano_12_p16_224", **VIT), SIZE, False),
    "VOLO": (volo, SIZE, False),
    "ConViT": (of("convit_tiny", local_up_to_layer=2, **VIT), SIZE, False),
    "Hiera": (of("hiera_tiny_224", embed_dim=8, stages=(1, 1, 1, 1)), 224, None),
    "ViT": (of("vit_tiny_patch16_224", **VIT), SIZE, True),
    "distilled DeiT": (of("deit_tiny_distilled_patch16_224", **VIT), SIZE, True),
    "BEiT": (of("beit_base_patch16_224", **VIT), SIZE, True),
    "EVA": (of("eva02_tiny_patch14_224", img_size=28, embed_dim=16, depth=3, num_heads=1), 28, True),
    "LeViT": (of("levit_128s"), 224, None),
    "Swin": (of("swin_tiny_patch4_window7_224", embed_dim=8, depths=[1] * 4, num_heads=[1] * 4), 224, None),
    "ResNet": (of("test_resnet"), SIZE, None),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Encoder, bool | None]:
    build, side, gives_tokens = FAMILIES[request.param]
    torch.manual_seed(0)
    return Encoder(build(), {"input_size": (3, side, side)}, request.param, request.param), gives_tokens


def read(encoder: Encoder, *words: str) -> torch.Tensor:
    images = torch.randn(2, *encoder.preprocessing["input_size"], generator=torch.Generator().manual_seed(1))
    encoder.module.eval()
    with torch.inference_mode():
        found: torch.Tensor = ReadoutModule(encoder, [Readout.from_name(word) for word in words])(images)
    return found


@pytest.mark.parametrize("word", ["0", "-1", "-2"])
def test_a_block_is_its_map_averaged(family: tuple[Encoder, bool | None], word: str) -> None:
    encoder, _ = family
    images = torch.randn(2, *encoder.preprocessing["input_size"], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        maps = encoder.module.eval().forward_intermediates(images, intermediates_only=True)
        expected = encoder.module.forward_intermediates(
            images, indices=[int(word) % len(maps)], norm=False, intermediates_only=True
        )[0].mean(dim=(2, 3))
        output = encoder.module(images)
    assert torch.equal(read(encoder, word), expected)
    together = read(encoder, word, "out")
    assert torch.equal(together[:, : expected.shape[1]], expected)
    torch.testing.assert_close(together[:, expected.shape[1] :], output)


@pytest.mark.parametrize("word", ["last1", "last2", "last3", "dino_vit_b", "dino_vit_s", "99", "-99"])
def test_everything_else_is_features_or_one_sentence(family: tuple[Encoder, bool | None], word: str) -> None:
    encoder, gives_tokens = family
    try:
        found = read(encoder, word, "out")
    except UserError as error:
        said = str(error)
    else:
        assert found.ndim == 2
        assert torch.isfinite(found).all()
        assert gives_tokens is not False
        return
    assert said.startswith("--layer: ")
    assert "\n" not in said
    assert word not in ("last1", "last2") or gives_tokens is False
