"""Untrusted text on the terminal: it cannot move the cursor, imitate a message, be read as markup, or end a command."""

import io
import json
import logging
import re
import tomllib
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import small_recipe
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import sslkit
from sslkit.cli import main
from sslkit.cli.check_commands import print_findings
from sslkit.cli.output import print_and_store, print_comparison
from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.doctor.findings import Finding, Report
from sslkit.engine.logging.logger import RunLogger
from sslkit.errors import UserError
from sslkit.evaluate.evaluation_result import EvaluationResult, Score
from sslkit.recipe.resolve import load_recipe
from sslkit.terminal import (
    PlainTable,
    error_messages,
    print_line,
    print_message,
    print_plain,
    print_traceback,
    sanitize_other_libraries,
)
from sslkit.text import escape

WORDS = {
    "escape": "a\x1b[31mred\x1b[0m",
    "title": "a\x1b]0;title\x07b",
    "line": "a\nsslkit: done: runs/forged (encoder in runs/forged/encoder)",
    "return": "a\rsslkit: all is well",
    "C1": "a\x9b2J",
    "turned": "a\u202egnp.exe",
    "line separator": "a\u2028b\u2029c",
    "backspace": "abc\x08\x08\x08xyz",
    "markup": "x[/]",
    "colour": "[bold red]x[/bold red]",
    "link": "[link=http://x]y[/link]",
    "brackets": "a[0]b [x] ['y']",
}


def assert_harmless(text: str) -> None:
    """Only printable characters and line ends, and no imitated message."""
    assert [unicodedata.name(char, hex(ord(char))) for char in text if not char.isprintable() and char != "\n"] == []
    assert not re.search("^sslkit: (done|all is well)", text, flags=re.M)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)
    return ended.value.code, printed.out, printed.err


def as_toml(word: str) -> str:
    return json.dumps(word)


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_the_door(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert escape(word).isprintable()
    if word.isprintable():
        assert escape(word) == word
    table = PlainTable(word, "b")
    table.add_row(word, word)
    Console(width=200).print(table)
    print_message(word)
    print_line(word)
    print_plain(word, to_stderr=False)
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)
    assert printed.out.count(escape(word)) == 5
    assert printed.err == f"sslkit: {escape(word)}\n"


def test_toml_reads_what_is_escaped() -> None:
    for word in ("\x1b", "\x9b", "\u202e", "\n", "\t", "\U000e0001"):
        assert tomllib.loads(f'x = "{escape(word)}"') == {"x": word}


def test_bytes_of_names_stay_readable() -> None:
    assert printable(to_text("a\udcffb")) == r"a\xffb"


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_recipes(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In keys, values and comments of recipes, refused or shown."""
    plain = '[method]\nname = "simclr"\n[backbone]\nname = "test_vit"\n[data]\npath = "x"\n[views]\nsize = 32\n'
    file = tmp_path / "recipe.toml"
    comment = f"# {word}".replace("\n", " ").replace("\r", " ")
    file.write_bytes(f"{comment}\n{plain}[reference]\n{as_toml(word)} = {as_toml(word)}\n".encode())
    if not re.search("[\x00-\x08\x0e-\x1f]", comment):  # which TOML has not in comments
        code, out, _ = run(["recipes", "show", str(file)], capsys)
        assert code == 0
        again = tmp_path / "again.toml"
        again.write_text(out, encoding="utf-8")
        assert load_recipe(again).as_tables() == load_recipe(file).as_tables()
    for line in (
        f"[train]\n{as_toml(word)} = 1\n",
        f"[{as_toml(word)}]\nx = 1\n",
        f"[train]\nprecision = {as_toml(word)}\n",
        f"[data.mix]\n{as_toml(word)} = 1\n",
        f"[train]\nepochs = {word}",
    ):
        file.write_bytes(plain.encode() + line.encode())
        code, _, err = run(["pretrain", str(file), "--output", str(tmp_path / "run")], capsys)
        assert code == 2
        assert err.startswith("sslkit: ")
    code, _, err = run(["pretrain", str(file.parent / word), "--set", f"{word}=1"], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert run(["eval", "knn", word, "--data", word], capsys)[0] == 2
    assert run(["pretrain", f"--{word}"], capsys)[0] == 2


def test_each_mistake_of_a_recipe_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "simclr", "--backbone", "test_vit", "--data", "x", "--set", "train.a=1", "--set", "optim.b=2"]
    code, _, err = run(["pretrain", *words], capsys)
    assert code == 2
    assert [line.startswith("sslkit: command line [") for line in err.splitlines()] == [True, True]


@pytest.mark.full
@pytest.mark.parametrize("word", [WORDS[name] for name in ("escape", "line", "turned", "markup")])
def test_tensors_and_configurations(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    config: dict[str, Any] = {"architecture": "test_vit", "model_args": {"img_size": 32}, "pretrained_cfg": {"tag": ""}}
    (folder / "config.json").write_text(json.dumps(config))
    evaluate = ["eval", "knn", str(folder), "--data", "builtin:fashion_mnist"]
    save_file(state | {word: torch.zeros(3)}, folder / "model.safetensors")
    code, _, err = run(evaluate, capsys)
    assert code == 2
    assert " ".join(escape(line) for line in word.splitlines()) in err
    for key in ("architecture", "model_args", "pretrained_cfg"):
        (folder / "config.json").write_text(json.dumps({**config, key: word}))
        assert run(evaluate, capsys)[0] == 2
    (folder / "config.json").write_text(json.dumps({**config, "model_args": {word: word}}))
    assert run(evaluate, capsys)[0] == 2
    save_file({word: torch.zeros(3), f"backbone.{word}": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert run(["import", str(tmp_path / "x.safetensors"), str(tmp_path / "out")], capsys)[0] == 2


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_folders_of_images(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = len(word.splitlines()) > 1
    root = tmp_path / ("photos" if broken else word)
    for label in ("one", word):
        (root / label).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(root / label / f"{word}.png".replace("/", "-"))
        (root / label / f"{word}.jpg".replace("/", "-")).write_text("no image")
    code, out, _ = run(["data", "check", str(root), "--workers", "0"], capsys)
    assert code == 0
    assert escape(root.name) in out.replace("\n", "")
    if broken:  # of a folder's name, a line break is refused; of those in it, shown
        assert run(["data", "check", str(tmp_path / word), "--workers", "0"], capsys)[0] == 2
    assert run(["data", "check", str(root / "absent"), "--workers", "0"], capsys)[0] == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    sslkit.train(small_recipe("simclr", "test_vit", backbone={"img_size": 32}, train={"max_steps": 1}), folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", ["x[/]", "[bold]b[/bold]", "a\x1b[31m"])
def test_folders_that_are_written(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command succeeds, and the code that it prints is complete."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).symlink_to(trained)
    code, out, _ = run(["export", name, f"{name}-out"], capsys)
    assert code == 0
    assert f'timm.create_model("local-dir:{escape(name)}-out"' in out
    state = load_file(f"{name}-out/model.safetensors")
    save_file({f"backbone.{key}": value for key, value in state.items()}, "weights.safetensors")
    words = ["import", "weights.safetensors", f"{name}-in", "--backbone", "test_vit"]
    code, out, err = run(words, capsys)
    assert (code, escape(name) in out) == (0, True), err
    code, out, _ = run(["report", name, "--no-gallery", "--output", f"{name}.html"], capsys)
    assert (code, f"{escape(name)}.html" in out) == (0, True)
    code, out, _ = run(["publish", name, "--repo-id", "user/name", "--dry-run"], capsys)
    assert (code, escape(name) in out) == (0, True)
    assert run(["watch", name, "--once"], capsys)[0] == 0


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_tables_and_the_journal(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [Score(word, 0.5, (0.4, 0.6), word), Score("other", 0.5)]
    print_and_store(
        "absent", [EvaluationResult(word, word, {"a": word}, scores, word, [{word: word, "x": 0.5}])], as_json=False
    )
    measured = [Score(word, 0.5, None, "", {word: 0.5}, {word: (0.4, 0.6)})]
    print_and_store("absent", [EvaluationResult(word, word, {}, measured)], as_json=False)
    row = {"evaluation": word, "protocol_hash": word, "accuracy": 0.5, "interval": None, "measure": word}
    print_comparison([{word: row}], as_json=False)
    print_findings(
        Report([Finding(word, "fault", word), Finding(word, "not applicable", word)]), as_json=False, every=True
    )
    RunLogger(tmp_path, 0, active=True).log_message(word)
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)


def raised(make: Callable[[str], Exception], word: str) -> Exception:
    return make(f"{word} at hf_{'aB3dE6gH9jK2mN5pQ8sTxYzUvWqRtSaBcD'}")


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("make", [ValueError, OSError, UserError, RuntimeError], ids=lambda make: make.__name__)
def test_errors_of_others(make: Callable[[str], Exception], word: str) -> None:
    [sentence] = error_messages(raised(make, word))
    assert_harmless(sentence)
    assert "hf_a" not in sentence


def test_warnings_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Also with the libraries' own log handlers, as of datasets and huggingface_hub."""
    sanitize_other_libraries()
    token = f"hf_{'aB3dE6gH9jK2mN5pQ8sTxYzUvWqRtSaBcD'}"
    logger, stream = logging.getLogger("another.library"), io.StringIO()
    logger.propagate = False
    for handler in (logging.StreamHandler(stream), logging.lastResort):
        assert handler is not None
        logger.handlers = [handler]
        for word in WORDS.values():
            logger.warning("Unexpected keys (%s) %s", word, token)
            logger.error(word, exc_info=ValueError("x " + token))
            print_traceback(ValueError(word))
            assert_harmless(warnings.formatwarning(word, UserWarning, "x.py", 1))
    said = capsys.readouterr().err + stream.getvalue()
    assert_harmless(said)
    assert token not in said
    assert said.count("ValueError: x [token]") == 2 * len(WORDS)


def test_lines_of_a_message_in_a_traceback_are_indented(capsys: pytest.CaptureFixture[str]) -> None:
    """So that it cannot be taken for a message of sslkit; also in chained errors."""
    forged = "sslkit: done: runs/forged"
    print_traceback(ValueError(f"a\n{forged}"))
    assert capsys.readouterr().err.splitlines()[-2:] == ["ValueError: a", f"  {forged}"]
    stream = io.StringIO()
    logger = logging.getLogger("another.traceback")
    logger.propagate, logger.handlers = False, [logging.StreamHandler(stream)]
    sanitize_other_libraries()
    logger.error("x", exc_info=ValueError(f"a\n{forged}"))
    assert stream.getvalue().splitlines()[-2:] == ["ValueError: a", f"  {forged}"]


def test_nothing_is_printed_beside_the_door() -> None:
    """No other file calls print, makes Rich tables, or escapes text itself."""
    root = Path(sslkit.__file__).parent
    found = []
    for file in root.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        escapes = re.search(r"rich\.markup|[^.\w]Table\(\"|unicode_escape", text)
        if file.name != "terminal.py" and escapes:
            found.append(file.name)
        calls = re.findall(r"(?<![\w.])print\(.*", text)
        if file.name not in ("terminal.py", "app.py") and calls:
            found.append(f"{file.name}: {calls}")
    assert found == []
