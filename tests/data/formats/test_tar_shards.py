"""Tar files as WebDataset packs them: the images of a folder in any kind of tar, and every way to be hostile."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import small_recipe
from hostile import encode, photo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sslkit
from sslkit.data.config import MixConfig
from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.tar_shards import expand_braces
from sslkit.data.sources.image_identity import images_digest, names_digest, source_fingerprint
from sslkit.data.sources.image_source import DataConfig, ImageSource, available_splits, open_source, skipped_files
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair

PICTURES = [encode(Image.fromarray(photo(seed)), "PNG") for seed in range(6)]


def write_tar(file: Path, members: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(file, "w", format=kind, errors="surrogateescape") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def samples(first: int, last: int) -> dict[str, bytes]:
    """Pictures with labels beside them, as `webdataset` writes them."""
    return {
        f"{index:06d}.{suffix}": content
        for index in range(first, last)
        for suffix, content in (
            ("png", PICTURES[index]),
            ("cls", b"%d" % (index % 2)),
            ("json", b'{"kind": "k%d", "note": [1]}' % (index % 3)),
        )
    }


def read(path: Path | str, **words: str) -> ImageSource:
    return open_source(DataConfig(path=str(path), **words))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_labels_and_names_of_every_kind_of_tar(kind: int, tmp_path: Path) -> None:
    long = "/".join(["folder" * 8] * 4) if kind != tarfile.USTAR_FORMAT else "/".join(["folder"] * 20)
    members = {f"{long}/{index}.PNG": picture for index, picture in enumerate(PICTURES)}
    file = write_tar(tmp_path / "a.tar", {**members, "readme.txt": b"no image", "._ghost.png": b"a Mac's"}, kind)
    source = read(file)
    assert [source.encoded(index)[1] for index in range(len(source))] == PICTURES
    assert source.name(3) == f"{file}/{long}/3.PNG"
    assert source.label_column is None
    assert np.array_equal(source.read(2), photo(2))


def test_patterns_folders_and_splits(tmp_path: Path) -> None:
    for part in range(3):
        write_tar(tmp_path / f"photos-train-{part:04d}.tar", samples(2 * part, 2 * part + 2))
    expected = [encoded for encoded in PICTURES for _ in range(1)]
    for path in (tmp_path, tmp_path / "photos-train-{0000..0002}.tar", tmp_path / "photos-*-000?.tar"):
        source = read(path)
        assert [source.encoded(index)[1] for index in range(6)] == expected
    by_loader = open_source(DataConfig(path="webdataset", data_files=[str(tmp_path / "photos-train-000{0,2}.tar")]))
    assert [by_loader.encoded(index)[1] for index in range(4)] == expected[:2] + expected[4:]
    write_tar(tmp_path / "photos-val-0000.tar", samples(0, 4))
    assert available_splits(DataConfig(path=str(tmp_path))) == ["train", "val"]
    pair = open_pair(DataConfig(path=str(tmp_path)))
    assert (len(pair.train), len(pair.test), pair.classes) == (6, 4, ["0", "1"])
    with pytest.raises(UserError, match=r"\[data\] split: .* none of 'test'"):
        read(tmp_path, split="test")
    with pytest.raises(UserError, match=r"no tar file .*0003\.tar"):
        read(tmp_path / "photos-train-{0002..0003}.tar")


def test_splits_by_name_in_a_folder_below_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "train-0.tar", samples(0, 4))
    write_tar(tmp_path / "data" / "test-0.tar", samples(4, 6))
    write_tar(tmp_path / "data" / "._train-0.tar", {}).write_bytes(b"a Mac's")
    (tmp_path / ".git").mkdir()
    for split, count in (("train", 4), ("test", 2)):
        assert len(read(tmp_path, split=split)) == count
    write_tar(tmp_path / "data" / "train-of-test-0.tar", samples(4, 6))
    with pytest.raises(UserError, match=r"and others, such as 'train-of-test-0\.tar'"):
        read(tmp_path)


def test_shards_that_are_links_and_shards_in_a_mix(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere.tar", tmp_path / "shards"
    folder.mkdir()
    (folder / "0.tar").symlink_to(write_tar(elsewhere, samples(0, 3)))
    source = read(folder)
    assert [source.encoded(index)[1] for index in range(3)] == PICTURES[:3]
    write_tar(folder / "1.tar", samples(3, 6))
    both = open_source(DataConfig(mix=[MixConfig(path=str(folder / f"{part}.tar")) for part in (1, 0)]))
    assert [both.encoded(index)[1] for index in range(6)] == PICTURES[3:] + PICTURES[:3]
    assert len(open_source(DataConfig(mix=[MixConfig(path=str(folder)), MixConfig(path=str(elsewhere))]))) == 9


def test_a_stray_tar_among_images_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PICTURES[0])
    write_tar(tmp_path / "backup.tar", samples(0, 4))
    assert len(read(tmp_path)) == 1
    assert skipped_files(DataConfig(path=str(tmp_path))) == {".tar": 1}


def test_labels_of_every_kind(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {**samples(0, 4), "x.txt": b"without an image"})
    assert read(file).labels() == ["0", "1", "0", "1"]
    assert read(file, label_column="kind").labels() == ["k0", "k1", "k2", "k0"]
    with pytest.raises(UserError, match=r"\[data\] label_column: no image has a \.txt file"):
        read(file, label_column="txt")
    with pytest.raises(UserError, match=r"has .* for 'note'; evaluation needs one class"):
        read(file, label_column="note").labels()
    partly = write_tar(tmp_path / "b.tar", {"0.png": PICTURES[0], "0.txt": b" cat\n", "1.png": PICTURES[1]})
    with pytest.raises(UserError, match="row 1 has the label None"):
        read(partly, label_column="txt").labels()


def test_two_images_of_a_sample_share_its_label(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"7.left.png": PICTURES[0], "7.cls": b"4", "7.right.png": PICTURES[1]})
    assert read(file).labels() == ["4", "4"]


def test_a_name_that_is_not_utf8_and_one_of_two_lines(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "@1+2/x.png"]
    file = write_tar(tmp_path / "a.tar", dict(zip(names, PICTURES, strict=False)), tarfile.GNU_FORMAT)
    source = read(file)
    assert [source.encoded(index)[1] for index in range(3)] == PICTURES[:3]
    assert [source.name(index).removeprefix(f"{file}/") for index in range(3)] == [
        r"caf\xe9.png",
        r"two\nlines.png",
        "@1+2/x.png",
    ]


def test_names_that_come_twice_are_two_images_and_two_labels_are_refused(tmp_path: Path) -> None:
    for name, content in (("0.png", PICTURES[0]), ("0.png", PICTURES[1])):
        with tarfile.open(tmp_path / "a.tar", "a") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = read(tmp_path / "a.tar")
    assert [source.encoded(index)[1] for index in range(2)] == PICTURES[:2]
    own = read(write_tar(tmp_path / "b.tar", {"0.png": PICTURES[0], "0.cls": b"1", "0.a.cls": b"2"}))
    assert own.labels() == ["1"]  # the one called like the image
    doubtful = read(write_tar(tmp_path / "c.tar", {"0.png": PICTURES[0], "0.a.cls": b"1", "0.b.cls": b"2"}))
    assert len(doubtful.without_labels()) == 1
    with pytest.raises(UserError, match=r"c\.tar has 2 labels for '0', '1' and '2'"):
        doubtful.labels()


def test_cut_short_shows_at_the_image_that_is(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", {f"{index}.png": picture for index, picture in enumerate(PICTURES)})
    content, places = whole.read_bytes(), [0]
    for picture in PICTURES:
        places.append(places[-1] + 512 + -(-len(picture) // 512) * 512)
    whole.write_bytes(content[: places[3] + 512 + len(PICTURES[3]) - 9])
    source = read(whole)
    assert len(source) == 4
    assert source.encoded(2)[1] == PICTURES[2]
    with pytest.raises(UnreadableImage, match=r"truncated: its tar file is 9 bytes too short"):
        source.read(3)
    whole.write_bytes(content[: places[4]])  # no end marker, as `head` leaves it
    assert len(read(whole)) == 4
    whole.write_bytes(content[: places[4] + 100])
    with pytest.raises(UserError, match=rf"truncated within a header \(at byte {places[4]}\)"):
        read(whole)
    whole.write_bytes(content[: places[2]] + b"junk" * 128 + content[places[2] + 512 :])
    with pytest.raises(
        UserError, match=rf"a\.tar is not a readable tar file: an invalid header \(at byte {places[2]}\)"
    ):
        read(whole)


def forged(field: slice, value: bytes) -> bytes:
    """A header with a field of its own and a sum that is right, an image behind it, and an end."""
    info = tarfile.TarInfo("0.png")
    info.size = len(PICTURES[0])
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[field] = value.ljust(field.stop - field.start, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + PICTURES[0].ljust(4096, b"\0") + bytes(1024)


SIZE, KIND = slice(124, 136), slice(156, 157)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (SIZE, b"\x80" + b"\x7f" * 11, "more than"),
        (SIZE, b"00077777777", "truncated"),
        (KIND, b"2", "a link in a tar file"),
        (KIND, b"1", "a link in a tar file"),
    ],
)
def test_lies_about_one_image_make_it_unreadable(field: slice, value: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        forged(field, value) if field is SIZE else forged(field, value)[:512] + bytes(1024)
    )
    source = read(tmp_path / "a.tar")
    with pytest.raises(UnreadableImage, match=reason):
        source.read(0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no images"),
        (b"x" * 2000, r"an invalid header \(at byte 0\)"),
        (b"short", "too short for a tar file"),
        (gzip.compress(b"x" * 5000, mtime=0), "is compressed with gzip, .* decompress it once to a plain .tar"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed with zstd"),
        (forged(SIZE, b"\xff" * 12), "a size that is not a number"),
        (forged(SIZE, b"-1"), "a size that is not a number"),
        (forged(KIND, b"x"), "invalid extended header"),
        (forged(KIND, b"S"), "holes"),
        (forged(KIND, b"5") + b"x", "an invalid header"),
    ],
)
def test_what_is_no_tar_file_is_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "a.tar")
    assert len(str(caught.value).splitlines()) == 1


def test_braces() -> None:
    assert expand_braces("a{08..11}-{x,y}.tar")[::3] == ["a08-x.tar", "a09-y.tar", "a11-x.tar"]
    with pytest.raises(UserError, match="more than 1000000 files"):
        expand_braces("a{0..9999999999}.tar")
    with pytest.raises(UserError, match="more than 1000000 files"):
        expand_braces("{0..9999}{0..9999}")


def test_a_run_on_tar_files_is_the_run_on_their_images(class_folders: Path, tmp_path: Path) -> None:
    """The same order, the same views, hence the same losses, bit for bit; and a digest that another set has not."""
    files = sorted(class_folders.rglob("*.png"))
    write_tar(tmp_path / "a.tar", {f"{index:03d}.png": file.read_bytes() for index, file in enumerate(files)})
    losses = []
    for path in (class_folders, tmp_path / "a.tar"):
        recipe = small_recipe(data={"path": str(path), "split": "train"}, train={"batch_size": 16, "max_steps": 2})
        run = sslkit.train(recipe, tmp_path / f"run-{len(losses)}")
        losses.append([row["loss"] for row in run.metrics()])
    assert losses[0] == losses[1]
    before, sums = images_digest(read(tmp_path / "a.tar")), source_fingerprint(read(tmp_path / "a.tar"))
    write_tar(tmp_path / "a.tar", {f"{index:03d}.png": file.read_bytes() for index, file in enumerate(files[::-1])})
    assert images_digest(read(tmp_path / "a.tar")) != before
    assert source_fingerprint(read(tmp_path / "a.tar")) != sums
    with pytest.raises(UserError, match="has changed since this run started"):
        sslkit.train(recipe, tmp_path / "run-1")


def test_memory_does_not_grow_with_the_bytes(tmp_path: Path) -> None:
    """Eight images of 2**28 bytes each, of holes: an index that read them would need two gigabytes."""
    with (tmp_path / "a.tar").open("wb") as stream:
        for index in range(8):
            info = tarfile.TarInfo(f"{index}.png")
            info.size = 2**28
            stream.write(info.tobuf())
            stream.seek(2**28, os.SEEK_CUR)
        stream.write(bytes(1024))
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sslkit.data.formats.tar_samples import index_shards\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert index_shards([Path(sys.argv[1])], None, None)[0].num_rows == 8\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, 'KiB'\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.tar")], check=True)


PIECES = st.lists(st.tuples(st.integers(0, 6 * 1024), st.binary(max_size=40)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=PIECES, length=st.integers(512, 9000))
def test_whatever_a_tar_holds_it_is_a_sentence_or_images(
    changes: list[tuple[int, bytes]], length: int, tmp_path: Path
) -> None:
    """Bytes overwritten anywhere, headers' sums made right again, the end cut off."""
    content = bytearray(write_tar(tmp_path / "whole.tar", samples(0, 2)).read_bytes())
    for at, piece in changes:
        content[at : at + len(piece)] = piece
        block = at - at % 512
        content[block + 148 : block + 156] = b" " * 8
        content[block + 148 : block + 156] = b"%06o\0 " % sum(content[block : block + 512])
    (tmp_path / "a.tar").write_bytes(content[:length])
    said = ""
    try:
        source = read(tmp_path / "a.tar")
        assert names_digest(source)
        for index in range(len(source)):
            assert source.name(index).isprintable()
            source.encoded(index)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
