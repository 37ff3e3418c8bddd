"""What is read off an encoder is the definition's, together as alone, in one pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features import readouts as reading_module
from sslkit.evaluate.features.extraction import Encoder, extract_features, features_key, fingerprint
from sslkit.evaluate.features.readouts import Reader, Reading, read_features
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
        return Reader(encoder, [Reading.named(word) for word in words])(images)


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
    together = Reader(encoder, [Reading.named(word) for word in words])
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

    monkeypatch.setattr(reading_module, "extract_features", counted)
    readings = [Reading(store=store), Reading(layer=-2, store=store), Reading(last_blocks=3, store=store)]
    together = read_features(encoder, source, encoder.transform(), readings)
    assert passes == [len(source)], "every image went through the first layer once"
    assert fingerprint(encoder.module) == before
    for reading, features in zip(readings, together, strict=True):
        (alone,) = read_features(encoder, source, encoder.transform(), [reading])
        assert torch.equal(alone, features)
        assert (tmp_path / features_key(encoder, source, str(encoder.transform()), str(reading))).is_dir()
    assert len(passes) == 1, "what the pass left is found by each reading alone"
    (fresh,) = read_features(encoder, source, encoder.transform(), [Reading(layer=-2)])
    torch.testing.assert_close(fresh, together[1], rtol=1e-6, atol=1e-6)
    twice = read_features(encoder, source.subset(np.arange(3)), encoder.transform(), [Reading(), Reading()])
    assert torch.equal(*twice)
    with pytest.raises(ValueError, match="readings of one pass"):
        read_features(encoder, source, encoder.transform(), [Reading(), Reading(crop_pct=0.5)])


def test_what_cannot_be_read_is_said() -> None:
    vit, resnet = encoder_of("test_vit", img_size=32), encoder_of("test_resnet")
    assert read(resnet, torch.zeros(2, 3, 32, 32), "last2").shape == (2, 192 + 96)
    for encoder, word, sentence in (
        (vit, "last99", "so that last 99 blocks cannot be read"),
        (vit, "-99", "so that block -99 cannot be read"),
        (resnet, "dino_vit_b", "test_resnet has no class token"),
        (vit, "dino_vit", r"'dino_vit' is not out.*did you mean 'dino_vit"),
        (vit, "last0", "'last0' is not out"),
        (vit, "", "'' is not out"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(encoder, torch.zeros(1, 3, 32, 32), word)
