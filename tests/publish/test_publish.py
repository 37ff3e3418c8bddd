"""Publishing, by the real client over real HTTP to a Hub on this machine's own loop, which fails now and then."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import small_recipe
from hub_client import Client
from hub_server import Fault, Hub, serving
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

import sslkit

TOKEN = "hf_" + "x" * 30
VIT = {"img_size": 32, "args": {"num_heads": 2}}
RESULT = {
    **{"step": 2, "by": "eval", "evaluation": "knn k=20 temperature=0.07", "data": "builtin:fashion_mnist: 10 / 10"},
    **{"accuracy": 0.7, "measure": "top-1 accuracy", "interval": [0.6, 0.8], "protocol_hash": "6c44937d152a"},
    "scores": [{"encoder": "it", "accuracy": 0.7}, {"encoder": "raw | pixels", "accuracy": 0.65}],
}

# A process that has timm and transformers but not sslkit runs examples and prints each one's features of one batch.
STRANGER = """
import json, sys
sys.modules["sslkit"] = None
import torch
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for example in json.load(sys.stdin):
    exec(example)
    with torch.inference_mode():
        found = encoder(images)
    print(json.dumps((found.pooler_output if hasattr(found, "pooler_output") else found).double().tolist()))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = small_recipe("moco_v3", "test_vit", train={"max_steps": 2}, backbone={"name": "test_vit", **VIT})
    folder = tmp_path_factory.mktemp("runs") / "vit"
    sslkit.train(recipe, folder)
    (folder / "results.jsonl").write_text(json.dumps(RESULT) + "\n")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[Hub]:
    with serving() as hub:
        hub.token = TOKEN
        yield hub


@pytest.fixture
def hub(shared_hub: Hub) -> Iterator[Hub]:
    shared_hub.asked.clear()
    shared_hub.store.clear()
    yield shared_hub
    shared_hub.faults = lambda method, path: None
    shared_hub.before_answer = lambda path: None


@pytest.fixture(scope="module")
def client(shared_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(shared_hub.environment(tmp_path_factory.mktemp("home")) | {"HF_TOKEN": TOKEN})
    yield client
    client.close()


def once(method: str, part: str, fault: Fault) -> Any:
    """The fault, at the first request of that kind."""
    left = [fault]
    return lambda asked, path: left.pop() if left and asked == method and part in path else None


def puts(hub: Hub) -> int:
    return sum(method == "PUT" for method, _ in hub.asked)


def features(run: Path) -> Tensor:
    encoder = timm.create_model("test_vit", num_classes=0, img_size=32, num_heads=2).eval()
    encoder.load_state_dict(load_file(run / "encoder" / "model.safetensors"))
    with torch.inference_mode():
        return encoder(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def as_a_stranger(examples: list[str], hub: Hub, home: Path) -> list[Tensor]:
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | hub.environment(home)
    command = [sys.executable, "-W", "ignore", "-c", STRANGER]
    done = subprocess.run(command, input=json.dumps(examples), text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    return [torch.tensor(row, dtype=torch.float64).float() for row in rows]


@pytest.mark.full
def test_what_is_published_is_what_was_trained_and_loads_without_sslkit(
    run: Path, hub: Hub, client: Client, tmp_path: Path
) -> None:
    code, said, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/first", "--license", "mit")
    assert code == 0, complaint
    files = hub.repos["user/first"][-1][1]
    there = {file.name: file.read_bytes() for file in (run / "publish").iterdir()}
    assert {name: files[name] for name in there} == there
    assert set(there) == {*("README.md", "SHA256SUMS", "config.json", "curves.png", "model.safetensors", "recipe.toml")}
    assert hub.repos["user/first"][-1][0] in said
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run / "publish", check=True)

    card = files["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    # The line breaks in the middle of the weights; the client goes on from there.
    hub.faults = once("GET", "model.safetensors", Fault(cut=700_000))
    found = as_a_stranger(blocks, hub, tmp_path / "home")
    assert [torch.equal(each, features(run)) for each in found] == [True, True]
    assert sum(method == "GET" and "safetensors" in path for method, path in hub.asked) == 2


@pytest.mark.full
def test_the_cards_head_is_for_programs(run: Path, client: Client, hub: Hub) -> None:
    assert client.ask("publish", str(run), "--repo-id", "user/carded", "--dry-run")[0] == 0
    assert not hub.asked
    card = ModelCard.load(run / "publish" / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.license == "apache-2.0"
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 70.0)
    assert "6c44937d152a" in result.metric_name
    assert r"raw \| pixels 65.0%" in card.text
    assert "60.0% to 80.0%" in card.text
    assert "| trained for | 2 steps |" in card.text
    other = RESULT | {"protocol_hash": "0123456789ab", "accuracy": 0.5}
    with (run / "results.jsonl").open("a") as lines:
        lines.write(json.dumps(other) + "\n")
    client.ask("publish", str(run), "--repo-id", "user/carded", "--dry-run")
    text = (run / "publish" / "README.md").read_text()
    assert "70.0%" in text  # another protocol's score takes no one's place
    assert "50.0%" in text


def test_publishing_again_adds_a_commit_and_sends_only_what_changed(run: Path, client: Client, hub: Hub) -> None:
    assert client.ask("publish", str(run), "--repo-id", "user/twice")[0] == 0
    assert puts(hub) == 1
    before = list(hub.repos["user/twice"])
    assert client.ask("publish", str(run), "--repo-id", "user/twice")[0] == 0
    assert hub.repos["user/twice"] == before  # nothing was new
    (run / "results.jsonl").write_text(json.dumps(RESULT | {"accuracy": 0.71}) + "\n")
    assert client.ask("publish", str(run), "--repo-id", "user/twice")[0] == 0
    assert hub.repos["user/twice"][:-1] == before
    assert b"71.0%" in hub.repos["user/twice"][-1][1]["README.md"]
    assert puts(hub) == 1


@pytest.mark.full
def test_a_branch_is_made_and_main_stays(run: Path, client: Client, hub: Hub, tmp_path: Path) -> None:
    branch = "feature/v2"
    code, said, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/forked", "--revision", branch)
    assert code == 0, complaint
    assert f"user/forked@{branch}" in said
    assert "model.safetensors" not in hub.at("user/forked", "main")[1]  # type: ignore[index]
    blocks = re.findall(r"```python\n(.*?)```", (run / "publish" / "README.md").read_text(), re.DOTALL)
    found = as_a_stranger(blocks, hub, tmp_path / "home")
    assert [torch.equal(each, features(run)) for each in found] == [True, True]


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "part", "fault"),
    [
        ("POST", "/repos/create", Fault(429, {"Retry-After": "0"})),
        ("POST", "/preupload/", Fault(503, {"Retry-After": "0"})),
        ("POST", "/validate-yaml", Fault(503, {"Retry-After": "0"})),
        ("PUT", "/store/", Fault(cut=1000)),
        ("POST", "/commit/", Fault(cut=100)),
        ("POST", "/commit/", Fault(412)),
        ("POST", "/preupload/", Fault(200, {"Content-Type": "text/html"})),
    ],
    ids=[
        *("busy at the door", "busy in the middle", "busy with the card", "broken upload", "broken commit"),
        *("overtaken", "not JSON"),
    ],
)
def test_what_goes_wrong_once_is_done_again(
    run: Path, client: Client, hub: Hub, method: str, part: str, fault: Fault
) -> None:
    repo = f"user/again-{part.strip('/').replace('/', '-')}"
    hub.faults = once(method, part, fault)
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", repo)
    assert code == 0, complaint
    assert hub.repos[repo][-1][1]["model.safetensors"] == (run / "publish" / "model.safetensors").read_bytes()


def test_an_interrupted_publication_goes_on(run: Path, client: Client, hub: Hub) -> None:
    hub.faults = lambda method, path: Fault(400) if "/commit/" in path else None
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/broken")
    assert code == 1
    assert complaint.count("\n") == 1
    assert f"{run / 'publish'} is ready" in complaint
    assert "model.safetensors" not in hub.repos["user/broken"][-1][1]
    hub.faults = lambda method, path: None
    hub.asked.clear()
    assert client.ask("publish", str(run), "--repo-id", "user/broken")[0] == 0
    assert puts(hub) == 0  # the weights had arrived
    assert "model.safetensors" in hub.repos["user/broken"][-1][1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("part", "fault", "code", "words"),
    [
        ("/repos/create", Fault(401), 2, "does not accept the token"),
        ("/preupload/", Fault(403), 2, "may not write there"),
        ("/preupload/", Fault(403, {"X-Error-Code": "GatedRepo"}), 2, "may not write there"),
        ("/preupload/", Fault(404, {"X-Error-Code": "RepoNotFound"}), 2, "does not exist, or this token cannot see it"),
        ("/repos/create", Fault(503, {"Retry-After": "0"}), 1, "busy (status 503)"),
        ("/preupload/", Fault(403, said={"error": "storage is full"}), 2, "(the Hub says: storage is full)"),
        ("/validate-yaml", Fault(400, said={"errors": [{"message": "no such licence"}]}), 2, "no such licence"),
    ],
    ids=["expired token", "no right", "gated", "missing", "always busy", "no room", "a licence it has not"],
)
def test_what_cannot_be_is_one_sentence(
    run: Path, client: Client, hub: Hub, part: str, fault: Fault, code: int, words: str
) -> None:
    hub.faults = lambda method, path: fault if part in path else None
    found, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/refused")
    assert (found, complaint.count("\n")) == (code, 1), complaint
    assert words in complaint
    assert "is ready, and the same command continues" in complaint
    assert TOKEN not in complaint
    assert (run / "publish" / "model.safetensors").is_file()


def test_a_wrong_checksum_sends_us_to_the_bytes(run: Path, client: Client, hub: Hub) -> None:
    wrong = {"ETag": '"0"', "X-Linked-Etag": '"0"'}
    hub.faults = lambda method, path: Fault(headers=wrong) if "/resolve/" in path else None
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/odd")
    assert code == 0, complaint

    def spoil(path: str) -> None:
        if "/resolve/" in path:
            hub.repos["user/spoilt"][-1][1]["model.safetensors"] = b"other bytes"

    hub.before_answer = spoil
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/spoilt")
    assert (code, complaint.count("\n")) == (1, 1)
    assert "other bytes" in complaint


def test_private_is_never_sent_to_a_public_repository(run: Path, client: Client, hub: Hub) -> None:
    before = hub.commit("user/public", {"x": b"x"})
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/public", "--private")
    assert code == 2
    assert "public" in complaint
    assert hub.repos["user/public"][-1][0] == before
    assert puts(hub) == 0
    assert client.ask("publish", str(run), "--repo-id", "user/hidden", "--private")[0] == 0
    assert "user/hidden" in hub.private


def test_a_silent_hub_is_a_broken_line(run: Path, client: Client, hub: Hub) -> None:
    client.ask("silence", "1")
    hub.faults = once("POST", "/preupload/", Fault(silent=4.0))
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/silent")
    client.ask("silence", "120")
    assert code == 0, complaint
    assert sum("/preupload/" in path for _, path in hub.asked) == 2


@pytest.mark.full
def test_what_was_changed_by_hand_is_not_thrown_away(run: Path, client: Client, hub: Hub) -> None:
    assert client.ask("publish", str(run), "--repo-id", "user/hand", "--dry-run")[0] == 0
    card = run / "publish" / "README.md"
    made, mine = card.read_text(), card.read_text() + "\nMy own words.\n"
    for file, text in ((card, mine), (run / "publish" / "notes.txt", "mine")):
        file.write_text(text)
        code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/hand")
        assert (code, file.read_text()) == (2, text)
        assert f"{file}: was changed or added manually" in complaint
        card.write_text(made)
    assert not hub.asked

    # On the Hub nothing is lost, and it is said where the words are.
    (run / "publish" / "notes.txt").unlink()
    assert "by hand" not in client.ask("publish", str(run), "--repo-id", "user/hand")[1]
    theirs = hub.commit("user/hand", hub.repos["user/hand"][-1][1] | {"README.md": mine.encode(), "LICENSE": b"MIT"})
    code, said, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/hand")
    assert code == 0, complaint
    assert f"it is still in commit {theirs}" in said
    assert hub.at("user/hand", theirs)[1]["README.md"] == mine.encode()  # type: ignore[index]
    assert hub.repos["user/hand"][-1][1]["LICENSE"] == b"MIT"
    code, said, _, _ = client.ask("publish", str(run), "--repo-id", "user/hand")
    assert "(unchanged)" in said
    assert "by hand" not in said


def test_nobody_learns_where_it_lay(run: Path, client: Client) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('"builtin:fashion_mnist"', '"/home/alice/secret proj/pets `a|b` é"'))
    result = RESULT | {"data": "/home/alice/secret proj/val: 10 / 10"}
    result["scores"] = [{"encoder": "it", "accuracy": 0.7}, {"encoder": "/home/alice/old", "accuracy": 0.65}]
    (run / "results.jsonl").write_text(json.dumps(result) + "\n")
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/x", "--license", "MIT", "--dry-run")
    assert code == 0, complaint
    for file in (run / "publish").iterdir():
        assert b"alice" not in file.read_bytes(), file
        assert b"secret" not in file.read_bytes(), file
    tables = tomllib.loads((run / "publish" / "recipe.toml").read_text())
    assert tables["data"]["path"] == "pets `a|b` é"
    assert tables["train"] == tomllib.loads(recipe.read_text())["train"]
    card = ModelCard.load(run / "publish" / "README.md")
    assert r"| data | `pets 'a\|b' é`, split" in card.text
    assert "| val: 10 / 10 |" in card.text
    assert "old 65.0%" in card.text
    assert card.data.license == "mit"  # the Hub knows SPDX's names in small letters only
    [found] = card.data.eval_results
    assert (found.dataset_type, found.dataset_name) == ("val", "val: 10 / 10")


@pytest.mark.full
@pytest.mark.parametrize("repo", ["name", "a/b/c", "../x/y", "user/na me", "user/a--b", "user/x.git", ""])
def test_impossible_names(trained: Path, client: Client, hub: Hub, repo: str) -> None:
    code, _, complaint, _ = client.ask("publish", str(trained), "--repo-id", repo)
    assert code == 2
    assert "--repo-id" in complaint
    assert not hub.asked


def test_no_run(tmp_path: Path, client: Client, hub: Hub) -> None:
    code, _, complaint, _ = client.ask("publish", str(tmp_path), "--repo-id", "user/name")
    assert code == 2
    assert "not a run folder" in complaint


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}, "cannot be reached"),
        ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}, "HF_HUB_OFFLINE is set"),
        ({}, "hf auth login"),
    ],
    ids=["no network", "offline", "no token"],
)
def test_where_nobody_can_be_asked(run: Path, hub: Hub, tmp_path: Path, settings: dict[str, str], words: str) -> None:
    client = Client(hub.environment(tmp_path / "home") | settings)
    code, _, complaint, _ = client.ask("publish", str(run), "--repo-id", "user/name")
    client.close()
    assert code in (1, 2)
    assert words in complaint
    assert complaint.count("\n") == 1
    assert (run / "publish" / "model.safetensors").is_file()
    assert not hub.asked
