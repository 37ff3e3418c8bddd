"""Others' checkpoints, made with their authors' names and shapes, become timm folders with the same features."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import cli_error
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.publish import Imported, import_checkpoint

State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def lived_in(model: nn.Module) -> nn.Module:
    """BatchNorms with statistics of their own and scales that are not one, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 1.0, generator=generator)
            layer.num_batches_tracked.fill_(7)
    return model.eval()


def trunk(model: nn.Module) -> State:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("fc.", "head."))}


def features(model: nn.Module, size: int) -> Tensor:
    with torch.inference_mode():
        return model.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


def head(*layers: tuple[str, tuple[int, ...]]) -> State:
    return {name: torch.rand(shape) for name, shape in layers}


def moco_v2_full(query: State, key: State) -> State:
    """A training checkpoint of facebookresearch/moco with --mlp: names and shapes of its builder.py."""
    mlp = [("fc.0.weight", (2048, 2048)), ("fc.0.bias", (2048,)), ("fc.2.weight", (128, 2048)), ("fc.2.bias", (128,))]
    return {
        **under("module.encoder_q.", query | head(*mlp)),
        **under("module.encoder_k.", key | head(*mlp)),
        "module.queue": torch.rand(128, 64),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }


def small(name: str = "test_vit", **args: Any) -> nn.Module:
    torch.manual_seed(3)
    return lived_in(timm.create_model(name, num_classes=0, **args))


def match_counts(imported: Imported) -> dict[str, int]:
    whys = [match.why for match in imported.tensors]
    return {why: whys.count(why) for why in dict.fromkeys(whys)}


def save(content: Any, file: Path, *, old_format: bool = False) -> Path:
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    return file


@pytest.mark.full
def test_moco_v2_at_full_size_gives_torchvisions_features(tmp_path: Path) -> None:
    """In the format of 2020, too; torchvision is the authors' own model, and never seen by the importer."""
    torch.manual_seed(0)
    query = lived_in(resnet50())
    state = moco_v2_full(trunk(query), under("", trunk(resnet50())))
    content = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    file = save(content, tmp_path / "checkpoint_0199.pth.tar", old_format=True)
    imported = import_checkpoint(file, tmp_path / "out", license_id="cc-by-nc-4.0")
    assert (imported.checkpoint_format, imported.backbone, imported.released) == ("MoCo v1 or v2", "resnet50", "")
    assert sum(not match.why for match in imported.tensors) == len(trunk(query)) == 318
    assert len(imported.tensors) == len(state)
    query.fc = nn.Identity()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0)
    assert torch.equal(features(loaded, 96), features(query, 96))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (config["license"], config["tag"], config["std"]) == ("cc-by-nc-4.0", "moco", [0.229, 0.224, 0.225])
    timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


@pytest.mark.full
def test_moco_v3_vit_small_has_twelve_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0)
    projector = head(
        *(("head.0.weight", (4096, 384)), ("head.1.weight", (4096,)), ("head.1.running_mean", (4096,))),
        *(("head.3.weight", (64, 4096)), ("head.7.running_var", (256,))),
    )
    state = under("module.base_encoder.", base.state_dict() | projector)
    state |= under("module.momentum_encoder.", {"cls_token": torch.rand(1, 1, 384)} | projector)
    state |= {"module.predictor.0.weight": torch.rand(64, 256)}
    imported = import_checkpoint(save({"state_dict": state}, tmp_path / "vit-s-300ep.pth.tar"), tmp_path / "out")
    assert imported.backbone == "vit_small_patch16_224"
    assert imported.model_args == {"img_size": 224, "num_heads": 12}
    assert match_counts(imported) == {
        "": 150,
        "the projector or prototypes": 5,
        "the momentum encoder, which the papers do not evaluate": 6,
        "the predictor": 1,
    }
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert loaded.blocks[0].attn.num_heads == 12
    six = timm.create_model("vit_small_patch16_224", num_classes=0)
    six.load_state_dict(base.state_dict())
    found = features(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0), 224)
    assert torch.equal(found, features(base, 224))
    assert not torch.allclose(found, features(six, 224), atol=1e-3)  # six heads load silently and are wrong
    # The same tensors without a layout that says whose they are.
    bare = save({"model": base.state_dict()}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="give --num-heads"):
        import_checkpoint(bare, tmp_path / "bare")
    assert import_checkpoint(bare, tmp_path / "bare", num_heads=12).checkpoint_format == "a bare encoder"


def resnet18_layouts() -> dict[str, tuple[Any, str]]:
    """Layouts of one small ResNet, by name: what is in the file, and its first word in the report."""
    query, key = trunk(lived_in(resnet18())), trunk(resnet18())
    other = head(("0.weight", (8, 512)), ("0.bias", (8,)))
    children = {"conv1": "0", "bn1": "1", **{f"layer{stage}": str(stage + 3) for stage in range(1, 5)}}
    sequence = {f"{children[name.partition('.')[0]]}.{name.partition('.')[2]}": value for name, value in query.items()}
    queue = {"queue": torch.rand(2, 8, 16), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    swav = under("module.projection_head.", other) | {"module.prototypes.weight": torch.rand(30, 8)}
    vissl = {"trunk": under("_feature_blocks.", query), "heads": under("0.clf.", other)}
    solo = under("backbone.", query) | under("momentum_backbone.", key) | under("projector.", other)
    solo |= under("momentum_projector.", other) | {"classifier.weight": torch.rand(10, 512)} | queue
    lightly = under("backbone.", key) | under("query_backbone.", query) | under("projection_head.layers.", other)
    lightly |= under("query_projection_head.layers.", other) | under("online_classifier.linear_layer.", other)
    byol = under("backbone.", key) | under("student_backbone.", query) | under("student_projection_head.layers.", other)
    examples = under("backbone.", sequence) | under("projection_head.layers.", other)
    examples |= under("backbone_momentum.", sequence)
    mm = under("backbone.", query) | under("neck.fc0.", other) | under("head.", other)
    mm |= under("data_preprocessor.", {"mean": torch.rand(3, 1, 1)})
    old_mm = under("encoder_q.0.", query) | under("encoder_q.1.mlp.", other) | under("encoder_k.0.", key)
    old_mm |= under("backbone.", query) | queue
    v3 = under("module.base_encoder.", query | under("fc.", other)) | under("module.momentum_encoder.", key)
    v1 = under("module.encoder_q.", query | head(("fc.weight", (128, 512)), ("fc.bias", (128,))))
    return {
        "compiled": ({"state_dict": under("module._orig_mod.base_encoder.", query)}, "MoCo v3"),
        "compiled within": (
            {"state_dict": under("backbone._orig_mod.", query) | under("projector.", other)},
            "solo-learn",
        ),
        "moco v1, cleaned": ({"state_dict": v1}, "MoCo v1 or v2"),
        "moco v3": ({"state_dict": v3}, "MoCo v3"),
        "swav": (under("module.", query) | swav, "SwAV"),
        "vissl": ({"classy_state_dict": {"base_model": {"model": vissl}}, "phase_idx": 5}, "VISSL"),
        "solo-learn": ({"state_dict": solo, "epoch": 3}, "solo-learn"),
        "solo-learn, older": (
            {"state_dict": under("encoder.", query) | under("projector.", other)},
            "solo-learn",
        ),
        "lightly moco": ({"state_dict": lightly, "pytorch-lightning_version": "2.0"}, "lightly"),
        "lightly byol": ({"state_dict": byol}, "lightly"),
        "lightly examples": ({"state_dict": examples}, "lightly"),
        "mmselfsup": ({"meta": {}, "state_dict": mm}, "mmselfsup"),
        "mmselfsup 0.x": ({"state_dict": old_mm}, "mmselfsup"),
        "backbone only": ({"state_dict": under("backbone.", query)}, "an encoder under backbone."),
        "half precision": (
            under("module.", {n: t.half() if t.is_floating_point() else t for n, t in query.items()}),
            "",
        ),
    }


@pytest.mark.full
@pytest.mark.parametrize("name", resnet18_layouts())
def test_every_layout_gives_the_trained_encoder(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    content, layout = resnet18_layouts()[name]
    torch.manual_seed(5)
    model = lived_in(resnet18())
    model.fc = nn.Identity()
    imported = import_checkpoint(save(content, tmp_path / "file.ckpt"), tmp_path / "out")
    assert imported.backbone == "resnet18"
    assert imported.checkpoint_format == (layout or "a bare encoder")
    kept = [match for match in imported.tensors if match.kept_as]
    assert {match.kept_as for match in kept} == set(model.state_dict())
    assert all(bool(match.why) != bool(match.kept_as) for match in imported.tensors)
    assert not [match for match in imported.tensors if match.why == "not part of the encoder"]
    if name == "half precision":
        model.load_state_dict({key: value.half().to(value.dtype) for key, value in model.state_dict().items()})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0)
    assert torch.equal(features(loaded, 64), features(model, 64))
    written = json.loads((tmp_path / "out" / "import.json").read_text())
    assert [match["name"] for match in written["fates"]] == [match.name for match in imported.tensors]
    assert loaded.pretrained_cfg["std"][0] == (0.228 if name == "swav" else 0.229)


def test_openmmlabs_vit_is_renamed(tmp_path: Path) -> None:
    model = small("test_vit", img_size=32)
    words = {"patch_embed.proj.": "patch_embed.projection.", ".mlp.fc1.": ".ffn.layers.0.0.", "blocks.": "layers."}
    words |= {".mlp.fc2.": ".ffn.layers.1.", ".norm1.": ".ln1.", ".norm2.": ".ln2."}
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        state["backbone." + (f"ln1.{name[5:]}" if name.startswith("norm.") else name)] = value
    state |= under("momentum_encoder.module.0.", dict(state)) | {"neck.fc0.weight": torch.rand(3, 3)}
    file = save({"state_dict": state}, tmp_path / "epoch_300.pth")
    imported = import_checkpoint(file, tmp_path / "out", backbone="test_vit")
    assert imported.checkpoint_format == "mmselfsup's MoCo v3"
    assert imported.model_args == {"img_size": 32}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0)
    assert torch.equal(features(loaded, 32), features(model, 32))


def test_a_difference_is_named_in_one_error(tmp_path: Path) -> None:
    state = trunk(resnet18())
    del state["layer3.1.bn2.bias"]
    state["layer4.2.conv9.weight"] = torch.rand(2, 2)
    state["bn1.weight"] = torch.rand(32)
    file = save(under("module.encoder_q.", state), tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        import_checkpoint(file, tmp_path / "out", backbone="resnet18")
    assert str(caught.value) == (
        f"{file}: its encoder (MoCo v1 or v2) does not fit timm's resnet18: 1 missing: layer3.1.bn2.bias; "
        "1 unexpected: layer4.2.conv9.weight; 1 wrong shape: bn1.weight (32,) instead of (64,)"
    )
    with pytest.raises(UserError, match=r"missing: .* and \d+ more"):
        import_checkpoint(file, tmp_path / "out", backbone="resnet50")
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_pretraining_checkpoint_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    linear = trunk(resnet18()) | head(("fc.weight", (1000, 512)), ("fc.bias", (1000,)))
    cases = {
        "linear-r-50-100ep.pth.tar": ({"state_dict": under("module.", linear)}, r"classifier of 1000 .* linear-"),
        "moco_v2_200ep_pretrain.pth.tar": (linear, "MD5 starts with 59fd9945"),
        "mmpretrain.pth": (
            {"state_dict": under("backbone.", trunk(resnet18())) | head(("head.fc.weight", (1000, 512)))},
            "classifier of 1000 classes .* mmpretrain's",
        ),
        "quantised.pth": (
            under("module.encoder_q.", {name: tensor.to(torch.int8) for name, tensor in trunk(resnet18()).items()}),
            r"quantised\.pth: .* is torch\.int8: the weights are quantised",
        ),
        "conv-stem.pth": (
            under("module.base_encoder.", {"patch_embed.proj.0.weight": torch.rand(4, 3, 3, 3)}),
            "convolutional stem",
        ),
        "cifar.ckpt": (
            under("backbone.", trunk(resnet18()) | {"conv1.weight": torch.rand(64, 3, 3, 3)}),
            "first convolution of 3 x 3",
        ),
        "wide.pth": (
            under("module.", trunk(resnet18()) | {"conv1.weight": torch.rand(128, 3, 7, 7)})
            | {"module.prototypes.weight": torch.rand(3, 3)},
            "name its timm model with --backbone",
        ),
        "strange.pth": (
            {"a": torch.rand(2), "b": torch.rand(2)},
            r"unknown checkpoint format \(2 tensors, such as 'a', 'b'",
        ),
        "empty.pth": ({"epoch": 3}, "has no tensors"),
        "twice.pth": (
            under("backbone.", trunk(resnet18()) | {"0.weight": torch.rand(64, 3, 7, 7)}),
            "two tensors of the file are",
        ),
    }
    for name, (content, match) in cases.items():
        with pytest.raises(UserError, match=match):
            import_checkpoint(save(content, tmp_path / name), out)
    with pytest.raises(UserError, match="not finite"):
        import_checkpoint(
            save(under("backbone.", {n: t * float("nan") for n, t in trunk(resnet18()).items()}), tmp_path / "nan"), out
        )
    with pytest.raises(UserError, match="no such file; give a checkpoint"):
        import_checkpoint(tmp_path / "absent.pth", out)
    with pytest.raises(UserError, match="timm has no model"):
        import_checkpoint(tmp_path / "cifar.ckpt", out, backbone="resnet_18")
    with pytest.raises(UserError, match="is not a ViT"):
        import_checkpoint(save(under("backbone.", trunk(resnet18())), tmp_path / "r.pth"), out, num_heads=3)
    assert not out.exists()
    assert cli_error(["import", str(tmp_path / "r.pth"), str(tmp_path)]).endswith("to a new or empty folder")


def test_a_byte_that_changed_on_the_way_is_noticed(tmp_path: Path) -> None:
    """PyTorch reads such a file without a word, and one changed weight makes no feature infinite."""
    file = save({"state_dict": under("module.encoder_q.", trunk(resnet18()))}, tmp_path / "x.pth")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)
    with pytest.raises(UserError, match=r"its entry .*/data/\d+ is damaged or was altered"):
        import_checkpoint(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_became_of_the_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, _ = resnet18_layouts()["solo-learn"]
    file = save(content, tmp_path / "x.ckpt")
    with pytest.raises(SystemExit) as ended:
        main(["import", str(file), str(tmp_path / "out")])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "solo-learn: resnet18" in printed
    assert "120" in printed
    assert "the queue of keys" in printed
    with pytest.raises(SystemExit):
        main(["import", str(file), str(tmp_path / "out2"), "--json"])
    assert len(json.loads(capsys.readouterr().out)["fates"]) == len(content["state_dict"])
