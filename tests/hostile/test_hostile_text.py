"""Untrusted recipes, logs, names and labels: refused or shown as text; tokens are never repeated."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
from conftest import cli_error, small_recipe
from PIL import Image
from reading import Page

import sslkit
from sslkit.cli import main
from sslkit.engine.logging.logger import RunLogger
from sslkit.errors import UserError, without_tokens
from sslkit.publish import export_encoder
from sslkit.recipe.resolve import build_recipe, load_recipe
from sslkit.report import read_runs, summarise, write_report

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT" + "xYzUvWqRtS"
PLAIN = '[method]\nname = "simclr"\n[backbone]\nname = "test_vit"\n[data]\npath = "x"\n[views]\nsize = 32\n'
RECIPES = {
    "deep lists": PLAIN + "[reference]\nx = " + "[" * 50_000 + "]" * 50_000,
    "deep tables": PLAIN + "[reference" + ".a" * 50_000 + "]\nx = 1",
    "deep inline tables": PLAIN + "[reference]\nx = " + "{a=" * 5000 + "1" + "}" * 5000,
    "nine deep": PLAIN + "[reference]\nx = [[[[[[[[[[1]]]]]]]]]]",
    "digits without end": PLAIN + "[train]\nepochs = " + "9" * 10_000,
    "65 bits": PLAIN + f"[reference]\nx = {2**63}",
    "hexadecimal without end": PLAIN + "[train]\nseed = 0x" + "f" * 10_000,
    "a date": PLAIN + "[reference]\nx = 1979-05-27T07:32:00Z",
    "bytes that are no text": PLAIN + '[reference]\nx = "\xff\xfe"',
    "not TOML": "import os; os.system('true')",
    "a billion blocks": PLAIN.replace('"test_vit"', '"test_vit"\nargs = {depth = 1000000000}'),
    "a checkpoint elsewhere": PLAIN.replace('"test_vit"', '"test_vit"\nargs = {checkpoint_path = "/etc/passwd"}'),
    "an overlay": PLAIN.replace('"test_vit"', '"test_vit"\nargs = {pretrained_cfg_overlay = {file = "x.pth"}}'),
    "an import": PLAIN.replace('"simclr"', '"os.system"'),
    "a path for a model": PLAIN.replace('"test_vit"', '"local-dir:/tmp"'),
    "a megabyte": PLAIN + "#" * 2_000_000,
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_are_none(case: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPES[case].replace('path = "x"', 'path = "builtin:fashion_mnist"'), encoding="latin-1")
    error = cli_error(["pretrain", str(file), "--output", str(tmp_path / "run")])
    assert len(error) < 1500
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_asks_for_more_memory_than_there_is(tmp_path: Path) -> None:
    recipe = ["pretrain", "--method", "moco_v2", "--backbone", "test_resnet", "--data", "builtin:fashion_mnist"]
    asked = ["views.size=32", "train.batch_size=64", "data.workers=0", "method.queue_size=64000000", "method.dim=65536"]
    error = cli_error(
        [*recipe, "--output", str(tmp_path / "run"), *(word for each in asked for word in ("--set", each))]
    )
    assert "memory" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["data.path", "reference.note", "backbone.args.x", "train.nonsense", "monitor.data"])
def test_a_token_in_a_recipe_is_refused_and_not_repeated(place: str, tmp_path: Path) -> None:
    given = [*("--method", "simclr", "--backbone", "test_vit", "--data", "x", "--output", str(tmp_path / "run"))]
    for value in (TOKEN, f"https://user:{TOKEN}@host/x"):
        error = cli_error(["pretrain", *given, "--set", f'{place}="{value}"'])
        assert "access token" in error
        assert TOKEN[5:20] not in error
    (tmp_path / "r.toml").write_text(PLAIN + f"[reference]\n{TOKEN} = 1\n")
    with pytest.raises(UserError, match="access token") as caught:
        load_recipe(tmp_path / "r.toml")
    assert TOKEN not in str(caught.value)


def test_tokens_of_the_environment_are_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens in the environment of a run, its report and its export do not appear in any output or file."""
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    recipe = small_recipe("simclr", "test_vit", backbone={"img_size": 32}, train={"max_steps": 2})
    sslkit.train(recipe, tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run"), "--no-gallery"])
    export_encoder(tmp_path / "run", tmp_path / "out")
    error = cli_error(["eval", "knn", f"{secrets['WANDB_API_KEY']}/{TOKEN}", "--data", "builtin:fashion_mnist"])
    assert "[WANDB_API_KEY]/[HF_TOKEN]" in error
    RunLogger(tmp_path / "run", 2, active=True).log_message(f"cannot log in with {TOKEN}")
    with pytest.raises(UserError, match="access token"):
        build_recipe({**recipe.as_tables(), "reference": {"key": secrets["WANDB_API_KEY"]}})
    said = capsys.readouterr()
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    for secret in secrets.values():
        assert secret not in said.out + said.err
        assert not [content for content in written if secret.encode() in content]
    assert without_tokens("hf_hub:user/repo and half_precision") == "hf_hub:user/repo and half_precision"


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with image and class names that contain markup."""
    root = tmp_path_factory.mktemp("words")
    generator = random.Random(0)
    for label in ("<img src=x onerror=alert(1)>", "</script><script>alert(2)<&script>", "\"quoted'=label{{7*7}}"):
        folder = root / "data" / label.replace("/", "\N{FRACTION SLASH}")
        folder.mkdir(parents=True)
        for index in range(16):
            pixels = bytes(generator.randrange(256) for _ in range(32 * 32 * 3))
            image = Image.frombytes("RGB", (32, 32), pixels)
            image.save(folder / f"<script>alert({index})<\N{FRACTION SLASH}script>.png")
    recipe = small_recipe(
        "moco_v2",
        "test_vit",
        backbone={"img_size": 32},
        data={"path": str(root / "data"), "split": "train"},
        reference={"source": "<script>alert(3)</script>", "knn_top1": 50.0},
    )
    sslkit.train(recipe, root / "<b onclick=alert(4)>run")
    return root / "<b onclick=alert(4)>run"


def test_names_and_labels_are_text_on_the_page(logged: Path) -> None:
    """An HTML parser finds no element, attribute or script that comes from a name."""
    score = {"by": "eval", "evaluation": "<i>knn</i>", "data": "<u>x</u>", "accuracy": 0.5, "step": 1, "epoch": 1}
    with (logged / "results.jsonl").open("a") as stream:
        stream.write(json.dumps({**score, "scores": [score, {**score, "encoder": "<s>e</s>"}]}) + "\n")
    with (logged / "diagnostics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 1, "alarms": ["<q>alarm</q>: x"], "<del>key</del>": 1}) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(logged)])
    assert ended.value.code == 0
    page = Page(logged / "report.html")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"i", "u", "s", "q", "del", "iframe", "object"}
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    for attrs, text in page.scripts:
        if attrs.get("type") == "application/json":
            json.loads(text)
        else:
            assert not [number for number in range(5) if f"alert({number})" in text]
    assert "<img src=x onerror=alert(1)>" in page.words()
    assert "<script>alert(3)</script>" in page.words()


@pytest.mark.full
@pytest.mark.parametrize("file", ["metrics.jsonl", "results.jsonl", "diagnostics.jsonl"])
def test_logs_of_garbage_never_break_the_report(logged: Path, file: str, tmp_path: Path) -> None:
    """The page is written, or one sentence names the line."""
    values = [None, True, "x" * 1000, [], {}, [1, [2]], 1e308, -1e308, 10**400, math.nan, "\ud800", {"a": {"b": []}}]
    keys = [*("loss", "accuracy", "evaluation", "interval", "scores", "alarms", "by", "data", "measure")]
    keys += ["embedding_std", "singular_values", "queue_age", "gradient/x", "momentum", "lr"]
    lots = [
        [{"step": 3, "epoch": 0.3, "by": "monitor", "accuracy": 0.5, key: value} for value in values] for key in keys
    ]
    lots += [[{"step": 3, "epoch": 0.3, key: value}] for key in ("step", "epoch") for value in values]
    texts = ["\n".join(map(json.dumps, lot)).encode() for lot in lots]
    texts += [b"{", b"\0", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"[]", b"3", b'"x"', b"null", b"\xff"]
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.toml", "metrics.jsonl", "results.jsonl", "diagnostics.jsonl"):
        if (logged / name).is_file():
            shutil.copy(logged / name, run / name)
    before = (run / file).read_bytes() if (run / file).is_file() else b""
    drawn, said = 0, list[str]()
    for text in texts:
        (run / file).write_bytes(before + text + b"\n")
        try:
            [record] = read_runs([run])
            write_report([record], [summarise(record)], tmp_path / "page.html", galleries=False)
            drawn += 1
        except UserError as error:
            said.append(str(error))
    assert drawn >= len(keys)
    assert all(file in sentence and len(sentence) < 500 for sentence in said)
