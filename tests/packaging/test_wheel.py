"""What users install: a wheel, the same from a checkout and from the sdist, that works far from any checkout."""

import email.parser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from installing import PIP, ROOT, build_wheel, install, run
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import sslkit
from sslkit.recipe.resolve import shipped_recipes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONSUMER = """\
import sslkit
from sslkit.parts.schedules import cosine

recipe: sslkit.Recipe = sslkit.load_recipe("quickstart")
run: sslkit.Run = sslkit.train(recipe, "run")
momentum: float = cosine(1, 2, start=0.99, end=1.0)
sslkit.load_recipe(3)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else; what it depends on is found after it."""
    return install(wheel, tmp_path_factory.mktemp("installed") / "site")


def names_and_digests(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        [record] = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        lines = archive.read(record).decode().splitlines()
    return {name: digest for name, digest, _size in (line.rsplit(",", 2) for line in lines)}


def test_the_sdist_builds_the_same_wheel_and_passes_its_tests(wheel: Path, tmp_path: Path) -> None:
    run([*PIP, "install", "--target", str(tmp_path / "hatchling"), "hatchling"], tmp_path)
    tools = str(tmp_path / "hatchling")
    sdist_to = ["build", "--target", "sdist", "--directory", str(tmp_path)]
    run([sys.executable, "-m", "hatchling", *sdist_to], ROOT, PYTHONPATH=tools)
    [sdist] = tmp_path.glob("sslkit-*.tar.gz")
    (tmp_path / "again").mkdir()
    assert names_and_digests(build_wheel(sdist, tmp_path / "again")) == names_and_digests(wheel)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.glob("sslkit-*/")
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "tests/packaging/test_keeping.py"]
    run([sys.executable, *tests], unpacked, PYTHONPATH=str(unpacked))


def test_the_wheel_holds_all_it_needs_and_nothing_more(wheel: Path) -> None:
    names = set(names_and_digests(wheel))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"sslkit", f"sslkit-{sslkit.__version__}.dist-info"}
    assert "sslkit/py.typed" in names
    assert {f"sslkit/recipes/{name}.toml" for name in shipped_recipes()} <= names
    assert not [name for name in names if name.endswith(".pyc") or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_is_valid(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name)
    metadata = Metadata.from_email(text, validate=True)
    assert str(metadata.version) == sslkit.__version__
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    message = email.parser.BytesParser().parsebytes(text)
    assert str(message.get_payload()).startswith("# sslkit")
    assert "torch" in {Requirement(words).name for words in message.get_all("Requires-Dist", [])}


def test_a_stranger_pretrains_from_the_wheel(site: Path, tmp_path: Path) -> None:
    elsewhere = {"PYTHONPATH": str(site), "COLUMNS": "200"}
    where = run([sys.executable, "-c", "import sslkit; print(sslkit.__file__)"], tmp_path, **elsewhere)
    assert Path(where.strip()).is_relative_to(site)

    command = [str(site / "bin/sslkit")]
    run(["sed", "-i", f"1s|.*|#!{sys.executable}|", *command], tmp_path)
    assert run([*command, "--version"], tmp_path, **elsewhere) == f"sslkit {sslkit.__version__}\n"
    assert "pretrain" in run([*command, "--help"], tmp_path, **elsewhere)
    assert "mocov3_vits" in run([*command, "recipes"], tmp_path, **elsewhere)
    assert "queue_size = 65536" in run([*command, "recipes", "show", "mocov2_r50"], tmp_path, **elsewhere)
    small = ["--set", "train.max_steps=4", "--set", "data.split=test", "--set", "monitor.every_epochs=0"]
    run([*command, "pretrain", "quickstart", *small, "--output", "run"], tmp_path, **elsewhere)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4
    assert (tmp_path / "run/encoder/model.safetensors").is_file()


def test_types_reach_those_who_install_it(site: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER, encoding="utf-8")
    untyped = shutil.copytree(site, tmp_path / "untyped")
    (untyped / "sslkit/py.typed").unlink()
    seen = check_types(site, tmp_path)
    assert 'consumer.py:7: error: Argument 1 to "load_recipe" has incompatible type "int"' in seen
    assert "Found 1 error in 1 file" in seen
    assert "missing library stubs or py.typed marker" in check_types(untyped, tmp_path)


def check_types(site: Path, folder: Path) -> str:
    """What mypy says of the consumer, for an interpreter that has nothing but the wheel: torch's types stay unknown."""
    venv.create(folder / "python", with_pip=False)
    options = ["--strict", "--python-executable", str(folder / "python/bin/python"), "--cache-dir", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "consumer.py"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        timeout=280,
        check=False,
    )
    return done.stdout
