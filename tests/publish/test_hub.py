"""What is taken from the Hub is one commit, and the score names it; a Hub on this machine's own loop proves it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_client import Client
from hub_server import Hub, serving
from safetensors.torch import save, save_file
from torch import nn

from sslkit.evaluate import load_encoder
from sslkit.evaluate.features.encoder import fingerprint
from sslkit.publish.encoder_folder import timm_config

REPO = "user/encoder"
SIDE = 32
SETTINGS = {"input_size": (3, SIDE, SIDE), "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


def encoder(folder: Path, seed: int) -> Path:
    """A folder that timm loads, with weights of its own."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=0, img_size=SIDE, num_heads=2)
    config = timm_config(model, SETTINGS | {"crop_pct": 1.0, "crop_mode": "center"}, "apache-2.0")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def fingerprint_of(folder: Path) -> str:
    return fingerprint(load_encoder(str(folder)).module)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    client = Client(hub.environment(home))
    yield client
    client.close()


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("versions")
    return [encoder(root / str(seed), seed) for seed in range(4)]


def score(client: Client, data: Path, name: str, *more: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a kNN evaluation, and the fingerprints of what was scored."""
    code, said, complaint, weights = client.ask("eval", "knn", name, "--data", str(data), "--no-cache", "--json", *more)
    assert code == 0, complaint
    return json.loads(said)["scores"], weights


@pytest.mark.full
def test_the_row_names_the_commit_that_was_scored(
    hub: Hub, client: Client, home: Path, versions: list[Path], class_folders: Path
) -> None:
    name = f"hf_hub:{REPO}"
    first = hub.commit(REPO, versions[0])
    rows, weights = score(client, class_folders, name)
    assert rows[0]["encoder_revision"] == first
    assert rows[0]["encoder"] == f"{name}@{first[:12]}"
    assert weights == [fingerprint_of(versions[0])]
    assert [row["encoder_revision"] for row in rows[1:]] == ["", ""]

    second = hub.commit(REPO, versions[1])
    rows, weights = score(client, class_folders, f"{name}@{first}", "--baseline", name)
    assert [rows[0]["encoder_revision"], rows[-1]["encoder_revision"]] == [first, second]
    assert weights == [fingerprint_of(versions[0]), fingerprint_of(versions[1])]

    # A commit that comes while an encoder is being fetched, whose files are as long as those that it replaces.
    late: list[str] = []

    def commit_meanwhile(path: str) -> None:
        if not late and "/resolve/" in path:
            late.append(hub.commit(REPO, versions[2]))

    third = hub.commit(REPO, versions[3])
    hub.before_answer = commit_meanwhile
    rows, weights = score(client, class_folders, name)
    hub.before_answer = lambda path: None
    assert late
    assert rows[0]["encoder_revision"] == third
    assert weights == [fingerprint_of(versions[3])]
    rows, weights = score(client, class_folders, name)
    assert rows[0]["encoder_revision"] == late[0]
    assert weights == [fingerprint_of(versions[2])]

    # Without a network, what was fetched last is scored and named.
    offline = Client(hub.environment(home) | {"HF_HUB_OFFLINE": "1"})
    hub.asked.clear()
    rows, weights = score(offline, class_folders, name)
    assert rows[0]["encoder_revision"] == late[0]
    assert weights == [fingerprint_of(versions[2])]
    rows, weights = score(offline, class_folders, f"{name}@{first}")
    assert rows[0]["encoder_revision"] == first
    code, _, complaint, _ = offline.ask("eval", "knn", "hf_hub:user/other", "--data", str(class_folders))
    assert code == 2
    assert complaint.count("\n") == 1
    offline.close()
    assert not hub.asked


@pytest.mark.full
def test_timms_own_weights_are_of_a_commit_too(hub: Hub, client: Client, class_folders: Path) -> None:
    name = "test_vit.r160_in1k"
    torch.manual_seed(5)
    model = timm.create_model("test_vit", num_classes=1000)
    repo = f"timm/{name}"
    commits = []
    for _ in range(2):
        nn.init.normal_(model.cls_token)
        config = json.dumps({"architecture": "test_vit", "pretrained_cfg": {}, "again": len(commits)}).encode()
        commits.append(hub.commit(repo, {"config.json": config, "model.safetensors": save(model.state_dict())}))
        rows, _ = score(client, class_folders, name)
        assert rows[0]["encoder"] == name
        assert rows[0]["encoder_revision"] == commits[-1]


def test_pretraining_begins_at_one_commit(hub: Hub, client: Client, versions: list[Path]) -> None:
    first = hub.commit("user/start", versions[0])
    hub.commit("user/start", versions[1])
    assert client.ask("backbone", f"hf_hub:user/start@{first}")[3] == fingerprint_of(versions[0])
    assert client.ask("backbone", "hf-hub:user/start")[3] == fingerprint_of(versions[1])


def test_a_stem_for_small_images_is_loaded_from_the_hub(hub: Hub, client: Client, class_folders: Path) -> None:
    model = timm.create_model("resnet18", num_classes=0)
    config = timm_config(model, SETTINGS | {"crop_pct": 1.0, "crop_mode": "center"}, "apache-2.0")
    weights = model.state_dict() | {"conv1.weight": torch.rand(64, 3, 3, 3)}
    files = {"config.json": json.dumps(config | {"small_stem": True}).encode(), "model.safetensors": save(weights)}
    revision = hub.commit("user/small", files)
    rows, _ = score(client, class_folders, "hf_hub:user/small")
    assert rows[0]["encoder_revision"] == revision


def hostile(good: Path) -> dict[str, tuple[dict[str, bytes], str]]:
    """Repositories, and words of the sentence that refuses them."""
    config, weights = json.loads((good / "config.json").read_text()), (good / "model.safetensors").read_bytes()

    def of(change: dict[str, Any]) -> dict[str, bytes]:
        return {"config.json": json.dumps(config | change).encode(), "model.safetensors": weights}

    def preprocessing(**change: Any) -> dict[str, bytes]:
        return of({"pretrained_cfg": config["pretrained_cfg"] | change})

    return {
        "larger": (of({"model_args": {"depth": 90_000}}), "with its weights"),
        "elsewhere": (preprocessing(hf_hub_filename="evil.bin"), "would load weights from elsewhere"),
        "a-file": (preprocessing(file="/etc/passwd"), "would load weights from elsewhere"),
        "custom": (preprocessing(custom_load=True), "would load weights from elsewhere"),
        "another-model": (of({"architecture": "hf_hub:user/encoder"}), "must be the name of a timm model"),
        "only-code": (
            {"config.json": of({})["config.json"], "pytorch_model.bin": b"cos\nsystem\n"},
            "cannot be downloaded",
        ),
        "torn": ({**of({}), "model.safetensors": weights[:-7]}, "not a complete safetensors file"),
        "no-words": ({**of({}), "config.json": b"[" * 100_000}, "not readable as JSON"),
        "empty": ({}, "cannot be downloaded"),
    }


def test_repositories_of_strangers_are_refused_in_a_sentence(
    hub: Hub, client: Client, versions: list[Path], class_folders: Path
) -> None:
    cases = hostile(versions[0])
    for name, (files, words) in cases.items():
        hub.commit(f"evil/{name}", files)
        code, said, complaint, _ = client.ask("eval", "knn", f"hf_hub:evil/{name}", "--data", str(class_folders))
        assert code == 2, (name, complaint)
        assert all(line.startswith("data: ") for line in said.splitlines()), name
        assert words in complaint, name
        assert len(complaint.strip().splitlines()) == 1
    for name in ("hf_hub:nobody/nothing", f"hf_hub:{REPO}@{'0' * 40}", "hf_hub:../x", "hf_hub:a@b@c", "hf_hub:"):
        code, _, complaint, _ = client.ask("eval", "knn", name, "--data", str(class_folders))
        assert code == 2, name
        assert complaint.startswith(f"sslkit: {name}: ")
    code, _, complaint, _ = client.ask("backbone", "hf_hub:evil/larger")
    assert (code, complaint.partition(":")[0]) == ("UserError", "[backbone] pretrained")
