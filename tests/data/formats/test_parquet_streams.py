"""Parquet read as a stream: the same images as from a copy, exactly resumed, from here, an address and the Hub."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from conftest import cli_error, small_recipe
from dataset_hub import serve
from pyarrow import parquet

import sslkit
from sslkit.data.config import DataConfig
from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats import parquet_streams as streaming
from sslkit.data.sources.image_identity import names_digest
from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import read_lines
from sslkit.recipe.resolve import Recipe, build_recipe

COUNT = 150


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of the bundled pictures, as `datasets` writes them, ten to a row group."""
    root = tmp_path_factory.mktemp("parquet")
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    names, labels = source.class_names(), source.labels()
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for number, rows in enumerate(np.array_split(np.arange(COUNT), 3)):
        images = [{"bytes": source.encoded(int(row))[1], "path": None} for row in rows]
        cells = {"image": images, "label": [labels[row] for row in rows]}
        datasets.Dataset.from_dict(cells, features=kinds).to_parquet(root / f"train-{number}.parquet", batch_size=10)
    return root


def streamed(path: Path | str, **keys: object) -> ImageSource:
    return open_source(DataConfig(path=str(path), streaming=True, **keys))


def recipe_of(path: Path | str, max_steps: int = 0, **data: object) -> Recipe:
    keys = {"path": str(path), "split": "train", "streaming": True, "shuffle_buffer": 40, **data}
    return small_recipe(data=keys, train={"batch_size": 16, "max_steps": max_steps, "epochs": 2})


def losses(run: sslkit.Run) -> list[float]:
    return [row["loss"] for row in run.metrics()]


def test_images_and_labels_are_those_of_a_copy(files: Path) -> None:
    stream, copied = streamed(files), open_source(DataConfig(path=str(files)))
    assert len(stream) == COUNT
    assert stream.labels() == copied.labels()
    assert stream.class_names() == copied.class_names()
    assert all((stream.read(index) == copied.read(index)).all() for index in range(COUNT))
    some = np.array([149, 3, 77, 3])
    assert all((stream.subset(some).read(at) == copied.read(index)).all() for at, index in enumerate(some.tolist()))
    drawn = stream.sample(20, seed=1)
    assert len(set(drawn.tolist())) == 20
    assert stream.name(60) == f"row 0 of row group 1 of {files}/train-1.parquet"


def test_a_run_resumes_exactly_whatever_its_workers(files: Path, tmp_path: Path) -> None:
    whole = sslkit.train(recipe_of(files), tmp_path / "whole")
    assert len(losses(whole)) == 2 * (COUNT // 16)
    for steps, workers in ((5, 2), (12, 0), (0, 3)):
        resumed = sslkit.train(recipe_of(files, steps, workers=workers), tmp_path / "resumed")
    assert losses(resumed) == losses(whole)


def test_a_stream_that_is_another_is_refused(files: Path, tmp_path: Path) -> None:
    here = shutil.copytree(files, tmp_path / "photos")
    sslkit.train(recipe_of(here, 2), tmp_path / "run")
    (here / "train-2.parquet").unlink()
    with pytest.raises(UserError, match="has changed since this run started: it had 150 images, there are 100 now"):
        sslkit.train(recipe_of(here), tmp_path / "run")


def test_of_other_files_streaming_changes_nothing(class_folders: Path) -> None:
    plain = open_source(DataConfig(path=str(class_folders)))
    assert names_digest(streamed(class_folders)) == names_digest(plain)
    assert streamed("builtin:fashion_mnist").plan is None


def write(file: Path, cells: list[object], kind: pa.DataType, rows: int = 4) -> Path:
    parquet.write_table(pa.table({"image": pa.array(cells, kind)}), file, row_group_size=rows)
    return file


def test_plain_bytes_are_images_too_and_rows_without_any_are_unreadable(class_folders: Path, tmp_path: Path) -> None:
    encoded = [file.read_bytes() for file in sorted(class_folders.rglob("*.png"))[:6]]
    for kind in (pa.binary(), pa.large_binary()):
        source = streamed(write(tmp_path / "a.parquet", [*encoded, None, b""], kind))
        assert source.read(5).shape == (28, 28, 3)
        for bad in (6, 7):
            with pytest.raises(UnreadableImage, match=r"row \d of row group 1"):
                source.read(bad)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    named = [{"bytes": None, "path": str(next(class_folders.rglob("*.png")))}, {"bytes": encoded[0], "path": "x"}]
    source = streamed(write(tmp_path / "b.parquet", named, struct))
    assert source.read(1).shape == (28, 28, 3)
    with pytest.raises(UnreadableImage, match="does not open files that rows name"):
        source.read(0)


def test_a_damaged_row_group_costs_its_images(files: Path, tmp_path: Path) -> None:
    """All others are read, and a run replaces the images as it does single ones."""
    here = shutil.copytree(files, tmp_path / "photos")
    file = here / "train-1.parquet"
    place = parquet.read_metadata(file).row_group(2).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    file.write_bytes(content)
    source, bad = streamed(here), []
    for index in range(COUNT):
        try:
            source.read(index)
        except UnreadableImage:
            bad.append(index)
    assert bad == list(range(70, 80))
    recipe = recipe_of(here, max_bad_share=0.1)
    run = sslkit.train(recipe, tmp_path / "run")
    assert len(losses(run)) == 2 * (COUNT // 16)
    assert (tmp_path / "run" / "bad_samples.jsonl").read_text().count("row group 2") == 10


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda file: file.write_bytes(b"PAR1 no parquet"), "cannot be read as parquet"),
        (lambda file: write(file, [], pa.binary()), "holds no images"),
        (lambda file: write(file, ["a.png"], pa.string()), "holds string, not the bytes of images"),
        (lambda file: parquet.write_table(pa.table({"text": ["a"]}), file), "no column of images found"),
    ],
)
def test_what_is_no_stream_is_a_sentence(make: object, sentence: str, tmp_path: Path) -> None:
    make(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=sentence):
        streamed(tmp_path)


def test_files_of_other_columns_and_too_large_row_groups_are_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.copytree(files, tmp_path / "photos")
    parquet.write_table(pa.table({"text": ["a"]}), here / "train-9.parquet")
    with pytest.raises(UserError, match=r"train-9.parquet has no column 'image'; there are \['text'\]"):
        streamed(here)
    monkeypatch.setattr(streaming, "MAX_GROUP", 1000)
    with pytest.raises(UserError, match=r"has a row group of .* which must fit into memory as a whole"):
        streamed(files)


def test_options_that_say_nothing_together_are_refused(files: Path, tmp_path: Path) -> None:
    mixed = {"path": "", "streaming": True, "mix": [{"path": str(files)}]}
    with pytest.raises(UserError, match="streaming reads one source"):
        build_recipe({"method": {"name": "moco_v2"}, "backbone": {"name": "resnet18"}, "data": mixed})
    said = cli_error(["pretrain", "mocov2_r50", "--set", "data.path=/nowhere/at/all", "--set", "data.streaming=true"])
    assert "no folder or file '/nowhere/at/all'" in said


def test_an_address_is_read_in_place_and_a_loss_of_it_is_a_sentence(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    for file in files.iterdir():
        memory.pipe(f"/photos/{file.name}", file.read_bytes())
    source = streamed("parquet", data_files="memory://photos/*.parquet")
    assert len(source) == COUNT
    assert (source.read(149) == streamed(files).read(149)).all()
    memory.rm("/photos", recursive=True)
    monkeypatch.setattr(streaming, "WAITS", (0.0,))
    with pytest.raises(UserError, match=r"memory://.*train-0.parquet can no longer be read: .* the same command"):
        source.read(0)
    with pytest.raises(UserError, match="no file matches memory://gone"):
        streamed("parquet", data_files="memory://gone/*.parquet")
    with pytest.raises(UserError, match="cannot list nosuch://photos"):
        streamed("parquet", data_files="nosuch://photos/*.parquet")


@pytest.mark.slow
def test_two_processes_share_a_stream_as_one_reads_it(files: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_of(files, workers=1).to_toml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "sslkit.pretrain", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [line["loss"] for line in read_lines(tmp_path / "two" / "metrics.jsonl")]
    assert both == pytest.approx(losses(sslkit.train(recipe_of(files), tmp_path / "one")), rel=1e-5)


HUB_RUN = """
import sys
from conftest import small_recipe
import sslkit
data = {"path": "me/photos", "split": "train", "streaming": True, "shuffle_buffer": 40, "workers": 2}
run = sslkit.train(small_recipe(data=data, train={"batch_size": 16, "max_steps": 0, "epochs": 2}), sys.argv[1])
print([row["loss"] for row in run.metrics()])
"""


@pytest.mark.full
def test_from_the_hub_nothing_is_copied_and_the_run_is_that_on_files(files: Path, tmp_path: Path) -> None:
    """The real client asks for pieces, is told to wait now and then, and the losses are those of files here."""
    with serve("me/photos", {f"data/{file.name}": file for file in sorted(files.iterdir())}) as hub:
        hub.failing = lambda number: number % 7 == 3
        env = {**os.environ} | {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
        }
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", HUB_RUN, str(tmp_path / "run")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == str(losses(sslkit.train(recipe_of(files), tmp_path / "here")))
    pieces = [size for _, _, size in hub.ranges if size < min(map(len, hub.files.values())) / 2]
    # Row groups of two epochs, a few for both of two workers, and of two looks at a sample before the first step.
    assert 2 * 15 <= len(pieces) <= 2 * 25 + 2 * 15
    assert not list((tmp_path / "hub").rglob("*.parquet"))
    assert not list((tmp_path / "hub").rglob("*.arrow"))


HUB_SPLITS = """
from sslkit.data.sources.image_source import DataConfig, open_source
for streaming in (True, False):
    sizes = [len(open_source(DataConfig(path="me/photos", split=split, streaming=streaming)))
             for split in ("train", "val", "validation", "dev", "all")]
    print(sizes)
"""


def test_splits_of_the_hub_are_found_by_any_of_their_names(class_folders: Path, tmp_path: Path) -> None:
    """The Hub's own name for ``valid`` is ``validation``."""
    cells = [{"bytes": file.read_bytes(), "path": None} for file in sorted(class_folders.rglob("*.png"))[:5]]
    features = datasets.Features({"image": datasets.Image()})
    for name, rows in (("train", cells), ("valid", cells[:2])):
        datasets.Dataset.from_dict({"image": rows}, features).to_parquet(str(tmp_path / f"{name}-0.parquet"))
    with serve("me/photos", {f"data/{file.name}": file for file in sorted(tmp_path.iterdir())}) as hub:
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
        env["HF_HOME"] = str(tmp_path / "hub")
        done = subprocess.run(
            [sys.executable, "-c", HUB_SPLITS], env=env, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["[5, 2, 2, 2, 7]"] * 2
