"""What is read off an encoder is the definition's, together as alone, in one pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features import readouts as readouts_module
from sslkit.evaluate.features.encoder import Encoder, fingerprint
from sslkit.evaluate.features.extraction import extract_features
from sslkit.evaluate.features.readouts import Readout, ReadoutModule, extract_readouts, features_key
from sslkit.evaluate.features.store import FeatureStore

SETTINGS: dict[str, Any] = {
    **{"input_size": (3, 32, 32), "mean": (0.3,) * 3, "std": (0.35,) * 3},
    **{"crop_pct": 1.0, "interpolation": "bilinear"},
}


def encoder_of(name: str, **model_args: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(timm.create_model(name, num_classes=0, **model_args), SETTINGS, name, name, model_args)


def read(encoder: Encoder, images: torch.Tensor, *words: str) -> torch.Tensor:
    encoder.module.eval()
    with torch.inference_mode():
        return ReadoutModule(encoder, [Readout.from_name(word) for word in words])(images)


def test_dinos_features_are_normed_tokens() -> None:
    """As get_intermediate_layers and eval_linear.py have them: class tokens; for ViT-B beside the patches' mean."""
    encoder, images = encoder_of("test_vit", img_size=32), torch.randn(2, 3, 32, 32)
    vit = encoder.module.eval()
    tokens, seen = [], vit.patch_embed(images)
    seen = vit.norm_pre(vit.patch_drop(vit._pos_embed(seen)))
    for block in vit.blocks:
        seen = block(seen)
        tokens.append(vit.norm(seen))
    class_tokens = [each[:, 0] for each in tokens]
    torch.testing.assert_close(read(encoder, images, "dino_vit_s"), torch.cat(class_tokens[-4:], dim=1))
    torch.testing.assert_close(read(encoder, images, "last3"), torch.cat(class_tokens[-3:], dim=1))
    patches = tokens[-1][:, 1:].mean(dim=1)
    torch.testing.assert_close(read(encoder, images, "dino_vit_b"), torch.cat([class_tokens[-1], patches], dim=1))
    plain = vit.forward_intermediates(images, indices=[1], norm=False, intermediates_only=True)[0]
    torch.testing.assert_close(read(encoder, images, "1"), plain.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("test_vit", {"img_size": 32}, ["out", "-2", "dino_vit_s", "dino_vit_b", "1"]),
        ("test_resnet", {}, ["-2", "out", "last2", "0"]),
        ("test_convnext", {}, ["out", "-1"]),
        ("test_mambaout", {}, ["-1", "out"]),
    ],
)
def test_together_as_alone(name: str, args: dict[str, Any], words: list[str]) -> None:
    encoder, images = encoder_of(name, **args), torch.randn(3, 3, 32, 32)
    together = ReadoutModule(encoder, [Readout.from_name(word) for word in words])
    assert encoder.module.training
    encoder.module.eval()
    with torch.inference_mode():
        parts = together(images).split(together.widths, dim=1)
        for word, part in zip(words, parts, strict=True):
            alone = encoder.module(images) if word == "out" else read(encoder, images, word)
            torch.testing.assert_close(part, alone, rtol=1e-6, atol=1e-6)


def test_one_pass_fills_the_store_for_every_reading(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, source = encoder_of("test_vit", img_size=32), open_source(DataConfig(path=str(class_folders)))
    store, passes = FeatureStore(tmp_path), []
    images = [0]
    encoder.module.patch_embed.register_forward_hook(lambda _m, given, _o: images.append(len(given[0])))
    before = fingerprint(encoder.module)

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        images.clear()
        features = extract_features(*args, **kwargs)
        passes.append(sum(images))
        return features

    monkeypatch.setattr(readouts_module, "extract_features", counted)
    readouts = [Readout(store=store), Readout(layer=-2, store=store), Readout(last_blocks=3, store=store)]
    together = extract_readouts(encoder, source, encoder.transform(), readouts)
    assert passes == [len(source)], "every image went through the first layer once"
    assert fingerprint(encoder.module) == before
    for readout, features in zip(readouts, together, strict=True):
        (alone,) = extract_readouts(encoder, source, encoder.transform(), [readout])
        assert torch.equal(alone, features)
        assert (tmp_path / features_key(encoder, source, str(encoder.transform()), str(readout))).is_dir()
    assert len(passes) == 1, "what the pass left is found by each readout alone"
    (fresh,) = extract_readouts(encoder, source, encoder.transform(), [Readout(layer=-2)])
    torch.testing.assert_close(fresh, together[1], rtol=1e-6, atol=1e-6)
    twice = extract_readouts(encoder, source.subset(np.arange(3)), encoder.transform(), [Readout(), Readout()])
    assert torch.equal(*twice)
    with pytest.raises(ValueError, match="readouts of one pass"):
        extract_readouts(encoder, source, encoder.transform(), [Readout(), Readout(crop_pct=0.5)])


def test_what_cannot_be_read_is_said() -> None:
    vit, resnet = encoder_of("test_vit", img_size=32), encoder_of("test_resnet")
    assert read(resnet, torch.zeros(2, 3, 32, 32), "last2").shape == (2, 192 + 96)
    for encoder, word, sentence in (
        (vit, "last99", "so last 99 blocks cannot be read"),
        (vit, "-99", "so block -99 cannot be read"),
        (resnet, "dino_vit_b", "test_resnet has no class token"),
        (vit, "dino_vit", r"unknown readout 'dino_vit'; must be out.*did you mean 'dino_vit"),
        (vit, "last0", "unknown readout 'last0'; must be out"),
        (vit, "", "unknown readout ''; must be out"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(encoder, torch.zeros(1, 3, 32, 32), word)
