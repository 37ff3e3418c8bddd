"""``sslkit prepare``: nothing is lost or changed but size, order and files; whatever interrupts it, it goes on."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pytest
from hostile import bad_images, encode, exif, good_images, photo, write_hostile_things
from PIL import Image

from sslkit.cli import main
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.sources.image_identity import names_digest
from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.data.tools import packing as packing_module
from sslkit.data.tools.packing import KEPT_BYTES, Packing, pack, shrink, sufficient_side
from sslkit.errors import UserError

SIDE = 64


def open_folder(folder: Path, split: str = "train") -> ImageSource:
    return open_source(DataConfig(path=str(folder), split=split))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two splits of two classes, with large and small images, and everything that can be wrong with a file."""
    root = tmp_path / "photos"
    for split, count in (("train", 40), ("test", 6)):
        for number in range(count):
            folder = root / split / ("cat", "dog <b>")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            large = number % 3 == 0
            picture = Image.fromarray(photo(number, (200, 300) if large else (40, 60)))
            (folder / f"{number}.jpg").write_bytes(encode(picture, "JPEG", quality=90))
    return root


def pixels_of(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_every_image_and_label_is_there_once(photos: Path, tmp_path: Path) -> None:
    before = open_folder(photos)
    packed = pack(before, tmp_path / "packed/train", Packing(SIDE, shard_images=16))
    after = open_folder(tmp_path / "packed")
    assert (packed.images, packed.shrunk, packed.left_out) == (40, 14, [])
    assert len(list((tmp_path / "packed/train").glob("*.arrow"))) == 3
    assert after.class_names() == before.class_names() == ["cat", "dog <b>"]
    names = {before.name(index).removeprefix(f"{photos}/train/"): index for index in range(40)}
    found = [after.name(index) for index in range(40)]
    assert sorted(found) == sorted(names)
    assert found != sorted(names)  # shuffled
    labels = before.labels()
    assert after.labels() == [labels[names[name]] for name in found]
    for index, name in enumerate(found):
        old, new = before.encoded(names[name])[1], after.encoded(index)[1]
        height, width = pixels_of(old).shape[:2]
        if height <= SIDE:
            assert new == old
        else:
            assert pixels_of(new).shape == (SIDE, SIDE * width // height, 3)


def test_a_shrunk_image_is_what_pillow_shrinks_it_to() -> None:
    big = cv2.resize(photo(1, (30, 45)), (1800, 1200), interpolation=cv2.INTER_CUBIC)
    encoded = encode(Image.fromarray(big), "JPEG", quality=95)
    small = pixels_of(shrink(encoded, "big", Packing(SIDE, quality=100)))
    expected = np.asarray(Image.open(io.BytesIO(encoded)).resize((96, 64), Image.Resampling.BICUBIC))
    # Decoded at an eighth first, where a block of 8 x 8 pixels is its mean.
    assert np.abs(small.astype(int) - expected.astype(int)).mean() < 2.0
    turned = shrink(encode(Image.fromarray(big), "JPEG", exif=exif(6)), "turned", Packing(SIDE))
    assert pixels_of(turned).shape == (96, 64, 3)


def test_the_side_is_enough_for_every_crop() -> None:
    assert sufficient_side(ViewsConfig.model_validate(views(size=224, crop_scale=(0.2, 1.0)))) == 504
    assert sufficient_side(ViewsConfig.model_validate(views(size=224, crop_scale=(0.08, 1.0)))) == 792
    small = views(size=224, crop_scale=(0.5, 1.0), small_crops=6, small_size=96, small_scale=(0.05, 0.14))
    assert sufficient_side(ViewsConfig.model_validate(small)) == 432


def views(**given: object) -> dict[str, object]:
    return {"policy": "moco_v2", "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_prob": 0.8, "blur_prob": 0.5, **given}


def test_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for name, content in good_images().items():
        (root / name).write_bytes(content)
    bad = bad_images()
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
    things = write_hostile_things(root)
    packed = pack(open_folder(root), tmp_path / "packed/train", Packing(SIDE))
    assert packed.images == len(good_images())
    assert {each["name"] for each in packed.left_out} == {*bad, *things}
    facts = json.loads((tmp_path / "packed/train/prepared.json").read_text())
    assert facts["left_out"] == packed.left_out
    after = open_folder(tmp_path / "packed")
    assert len(after) == packed.images
    assert all(min(after.read(index).shape[:2]) <= SIDE for index in range(len(after)))


@pytest.mark.full
def test_workers_and_interruptions_change_no_byte(photos: Path, tmp_path: Path) -> None:
    source, packing = open_folder(photos), Packing(SIDE, shard_images=8)
    pack(source, tmp_path / "one/train", packing)
    pack(source, tmp_path / "two/train", packing, workers=2)
    # Killed from outside after the first shards.
    other = tmp_path / "three"
    slow = (
        "import sys, time\nfrom pathlib import Path\nfrom sslkit.data.tools import packing\n"
        "from sslkit.data.sources.image_source import DataConfig, open_source\n"
        "whole = packing._write_shard\n"
        "packing._write_shard = lambda *words: (whole(*words), time.sleep(0.5))\n"
        "source = open_source(DataConfig(path=sys.argv[1]))\n"
        f"packing.pack(source, Path(sys.argv[2]), packing.Packing({SIDE}, shard_images=8))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, str(photos), str(other / "train")], env=dict(os.environ))
    part = other / ".train.part"
    deadline = time.monotonic() + 60
    while len(list(part.glob("*.arrow"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (other / "train").exists()
    done = {file.name: file.stat().st_mtime_ns for file in part.glob("*.json") if file.name.startswith("shard")}
    assert done
    pack(source, other / "train", packing)
    shards = sorted(file.name for file in (tmp_path / "one/train").iterdir())
    for folder in ("two", "three"):
        assert sorted(file.name for file in (tmp_path / folder / "train").iterdir()) == shards
        for name in shards:
            assert (tmp_path / folder / "train" / name).read_bytes() == (tmp_path / "one/train" / name).read_bytes()
    kept = {name: (other / "train" / name.replace("json", "arrow")).stat().st_mtime_ns for name in done}
    assert all(abs(kept[name] - done[name]) < 10**9 for name in done)  # written once
    assert not part.exists()


def test_killed_at_its_very_end_it_has_nothing_left_to_decode(photos: Path, tmp_path: Path) -> None:
    """Just before the folder appears."""
    words = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom sslkit.data.tools import packing\n"
        "from sslkit.data.sources.image_source import DataConfig, open_source\n"
        "packing.os.rename = lambda *_words: os.kill(os.getpid(), signal.SIGKILL)\n"
        "source = open_source(DataConfig(path=sys.argv[1]))\n"
        f"packing.pack(source, Path(sys.argv[2]), packing.Packing({SIDE}, shard_images=8))\n"
    )
    done = subprocess.run([sys.executable, "-c", words, str(photos), str(tmp_path / "packed/train")])
    assert done.returncode == -signal.SIGKILL
    counted: list[int] = []
    packed = pack(
        open_folder(photos), tmp_path / "packed/train", Packing(SIDE, shard_images=8), progress=counted.append
    )
    assert counted == [40]
    assert packed.images == 40
    assert sorted(file.suffix for file in (tmp_path / "packed/train").iterdir()) == [".arrow"] * 5 + [".json"]


@pytest.mark.parametrize("inside", ["", "packed", "train/packed"])
def test_it_does_not_pack_into_what_it_packs(photos: Path, inside: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(photos.rglob("*"))
    with pytest.raises(SystemExit) as exited:
        main(["prepare", str(photos), str(photos / inside)])
    assert exited.value.code == 2
    assert "is inside the folder to pack" in capsys.readouterr().err
    if inside != "packed":
        with pytest.raises(UserError, match=r"exists already|is inside the folder"):
            pack(open_folder(photos), photos / inside / "train", Packing(SIDE))
    assert sorted(photos.rglob("*")) == before


def test_what_a_stranger_left_is_not_written_through(photos: Path, tmp_path: Path) -> None:
    """Links in the folder aside of an interrupted call, and one in place of the output."""
    mine, other = tmp_path / "mine", tmp_path / "packed"
    mine.write_text("precious")
    other.mkdir()
    (other / "train").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="exists already"):
        pack(open_folder(photos), other / "train", Packing(SIDE))
    (other / "train").unlink()
    part = other / ".train.part"
    part.mkdir()
    source, packing = open_folder(photos), Packing(SIDE)
    facts = {**dataclasses.asdict(packing), "images": len(source), "names_sha256": names_digest(source)}
    (part / "job.json").write_text(json.dumps(facts))
    for name in (".shard-00000.arrow.tmp", ".shard-00000.json.tmp", "shard-00000.arrow", "prepared.json"):
        (part / name).symlink_to(mine)
    assert pack(source, other / "train", packing).images == 40
    assert mine.read_text() == "precious"
    assert not any(file.is_symlink() for file in (other / "train").iterdir())


@pytest.mark.full
def test_one_process_packs_into_a_folder(photos: Path, tmp_path: Path) -> None:
    hold = (
        "import sys\nfrom pathlib import Path\nfrom sslkit.data.tools.packing import _exclusive_lock\n"
        "with _exclusive_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", hold, str(tmp_path / ".train.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is packing"):
            pack(open_folder(photos), tmp_path / "train", Packing(SIDE))
        holder.communicate("")
    assert pack(open_folder(photos), tmp_path / "train", Packing(SIDE)).images == 40


def test_what_no_jpeg_can_hold_and_what_hides_in_a_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shrunk image may be too long for JPEG; a small image may drag gigabytes along; batches are bounded in bytes."""
    root = tmp_path / "photos"
    root.mkdir()
    long = np.zeros((65 + SIDE, 70_000 * 2, 3), np.uint8)
    (root / "long.png").write_bytes(encode(Image.fromarray(long), "PNG"))
    for number in range(4):
        (root / f"{number}.png").write_bytes(encode(Image.fromarray(photo(number)), "PNG"))
    with (root / "tail.png").open("wb") as stream:
        stream.write(encode(Image.fromarray(photo(9)), "PNG"))
        stream.truncate(KEPT_BYTES + 1)
    monkeypatch.setattr(packing_module, "BATCH_BYTES", 3000)
    packed = pack(open_folder(root), tmp_path / "packed/train", Packing(SIDE))
    assert packed.images == 6
    assert packed.bytes_after < KEPT_BYTES
    after = open_folder(tmp_path / "packed")
    names = {after.name(index): index for index in range(6)}
    assert after.encoded(names["long.png"])[1] == (root / "long.png").read_bytes()
    assert np.array_equal(after.read(names["tail.png"]), photo(9))
    [shard] = (tmp_path / "packed/train").glob("*.arrow")
    assert sum(1 for _ in pa.ipc.open_stream(shard.read_bytes())) > 1


def test_another_call_begins_anew(photos: Path, tmp_path: Path) -> None:
    part = tmp_path / "packed/.train.part"
    part.mkdir(parents=True)
    (part / "job.json").write_text("{}")
    (part / "shard-00000.arrow").write_bytes(b"of something else")
    (part / "shard-00000.json").write_text("{}")
    assert pack(open_folder(photos), tmp_path / "packed/train", Packing(SIDE)).images == 40


def test_the_command_packs_all_splits(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", str(photos), str(tmp_path / "packed"), "--side", str(SIDE), "--workers", "1"]
    with pytest.raises(SystemExit) as exited:
        main(words)
    said = capsys.readouterr().out
    assert exited.value.code == 0
    assert "40 images, 14 of them shrunk" in said
    assert len(open_folder(tmp_path / "packed", "test")) == 6
    with pytest.raises(SystemExit) as exited:
        main(words)
    assert exited.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_shards_are_mapped_and_not_copied(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(open_folder(photos), tmp_path / "packed/train", Packing(SIDE))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_words, **_options: pytest.fail("copied"))
    source = open_folder(tmp_path / "packed")
    assert {Path(each["filename"]).parent.name for each in source.table.rows.cache_files} == {"train"}


def test_a_strangers_arrow_file_is_refused_or_read(photos: Path, tmp_path: Path) -> None:
    pack(open_folder(photos), tmp_path / "packed/train", Packing(SIDE))
    [shard] = (tmp_path / "packed/train").glob("*.arrow")
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"junk" * 100, b""):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot load"):
            open_folder(tmp_path / "packed")
    table = pa.ipc.open_stream(whole).read_all()
    with pa.ipc.new_file(shard, table.schema) as writer:
        writer.write_table(table)
    assert len(open_folder(tmp_path / "packed")) == 40
