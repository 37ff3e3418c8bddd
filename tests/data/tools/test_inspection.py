"""``sslkit data check`` on a folder of which we know what is in it, and the search for duplicates."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hostile import bad_images, encode, exif, good_images, photo, png_of_size, write_hostile_things
from numpy.typing import NDArray
from PIL import Image

from sslkit.cli import main
from sslkit.data.tools.duplicates import NEAR, difference_hash, exact_groups, near_groups

SIZE = (48, 64)  # height, width: large enough to have a likeness of its own


def picture(seed: int) -> Image.Image:
    return Image.fromarray(photo(seed, SIZE))


def jpeg(seed: int, quality: int = 90) -> bytes:
    return encode(picture(seed), "JPEG", quality=quality)


def readable() -> dict[str, bytes]:
    """A dozen good images, each of its own kind, none like another."""
    alpha = Image.fromarray(photo(20, SIZE)).convert("L")
    frames = [picture(22).quantize(32)]
    return {
        "cmyk.jpg": encode(picture(11).convert("CMYK"), "JPEG"),
        "sixteen.png": cv2.imencode(".png", photo(12, SIZE).astype(np.uint16)[..., 0] * 256 + 9)[1].tobytes(),
        "palette.png": encode(picture(13).quantize(32), "PNG"),
        "alpha.png": encode(Image.merge("RGBA", (*picture(14).split(), alpha)), "PNG"),
        "animated.gif": encode(picture(15).quantize(32), "GIF", save_all=True, append_images=frames),
        "turned.jpg": encode(picture(16), "JPEG", exif=exif(6)),
        "grey.jpg": encode(picture(17).convert("L"), "JPEG"),
        "pixel.png": encode(picture(18).crop((0, 0, 1, 1)), "PNG"),
        "long.png": encode(Image.fromarray(photo(19, (40, 400))), "PNG"),
        "plain.jpg": jpeg(10),
    }


UNREADABLE = {
    "truncated.jpg": (jpeg(10)[:-300], "damaged or truncated"),
    "empty.jpg": (b"", "the file is empty"),
    "bomb.png": (png_of_size(30_000, 30_000), "more than 89478485 pixels"),
    "page.jpg": (b"<html>404 Not Found</html>", "not JPEG"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten good ones, two copies and a recompressed one, five bad ones, a name that is not UTF-8, a text."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for name, content in readable().items():
        (root / name).write_bytes(content)
    for name, (content, _) in UNREADABLE.items():
        (root / name).write_bytes(content)
    (root / "dead.jpg").symlink_to(root / "nothing")
    (root / "notes.txt").write_text("no image")
    shutil.copy(root / "plain.jpg", root / "sub" / "copy.jpg")
    shutil.copy(root / "plain.jpg", root / "sub" / "copy again.jpg")
    (root / "recompressed.jpg").write_bytes(jpeg(10, quality=40))
    with open(os.fsencode(root) + b"/caf\xe9.jpg", "wb") as stream:
        stream.write(jpeg(21))
    return root


def check(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(folder), "--workers", "0", *options])
    said = capsys.readouterr()
    assert all(line.startswith("data: ") for line in said.err.splitlines())
    return int(ended.value.code or 0), said.out


def found_in(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(check(folder, capsys, "--json", *options)[1])
    return found


def below(folder: Path, name: str) -> str:
    return name.removeprefix(f"{folder}/")


def test_what_is_found_is_what_was_put_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = found_in(folder, capsys)
    assert (found["images"], found["readable"]) == (19, 14)
    assert found["left_out"] == {".txt": 1}
    bad = {below(folder, image["name"]): image["reason"] for image in found["unreadable"]["images"]}
    assert found["unreadable"]["count"] == len(bad) == 5
    for name, (_, reason) in UNREADABLE.items():
        assert bad[name].startswith(reason), name
    assert bad["dead.jpg"] == "No such file or directory"
    assert found["formats"] == {"JPEG": 8, "PNG": 5, "GIF": 1}
    assert found["modes"] == {"RGB": 8, "CMYK": 1, "I;16": 1, "P": 2, "RGBA": 1, "L": 1}
    assert found["exif_rotated"] == 1
    # Both grey ones, for the one pixel has a colour.
    assert found["grey_share"] == pytest.approx(2 / 14)
    assert [below(folder, image["name"]) for image in found["tiny"]["images"]] == ["pixel.png"]
    assert [below(folder, image["name"]) for image in found["long"]["images"]] == ["long.png"]
    assert found["huge"]["count"] == 0
    assert found["quantiles"]["width"]["1"] == 400
    assert found["quantiles"]["height"]["1"] == 64  # of the one that is turned
    assert 0.3 < min(found["mean"]) < max(found["mean"]) < 0.7


def test_duplicates_are_found_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = found_in(folder, capsys)
    exact, near = found["exact_duplicates"], found["near_duplicates"]
    assert (exact["groups"], exact["surplus"]) == (1, 2)
    assert {below(folder, name) for name in exact["images"][0]} == {"plain.jpg", "sub/copy.jpg", "sub/copy again.jpg"}
    assert (near["groups"], near["surplus"]) == (1, 1)  # of the three equal ones, one stands for all
    assert "recompressed.jpg" in {below(folder, name) for name in near["images"][0]}


def test_a_name_of_any_bytes_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(os.fsencode(folder) + b"/caf\xe9.jpg", "wb") as stream:
        stream.write(b"<html>")
    found = found_in(folder, capsys)
    assert f"{folder}/caf\\xe9.jpg" in {image["name"] for image in found["unreadable"]["images"]}
    assert "caf\\xe9.jpg: not JPEG" in check(folder, capsys)[1]


def test_strict_fails_where_something_is_found_and_only_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, capsys)[0] == 0
    assert check(folder, capsys, "--strict")[0] == 2
    for name in (*UNREADABLE, "dead.jpg"):
        (folder / name).unlink()
    assert check(folder, capsys, "--strict")[0] == 2  # for the copies
    for name in ("copy.jpg", "copy again.jpg"):
        (folder / "sub" / name).unlink()
    code, out = check(folder, capsys, "--strict")
    assert code == 0
    assert "12 images, 12 readable" in out
    assert "recompressed.jpg" in out  # is said, and is no error


def test_workers_find_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found_in(folder, capsys, "--workers", "2") == found_in(folder, capsys)


def test_every_kind_of_file_that_was_made_to_hurt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them in one folder: pipes and devices are not waited for, holes are not read."""
    for name, content in good_images().items():
        (tmp_path / name).write_bytes(content)
    for name, (content, _) in bad_images().items():
        (tmp_path / name).write_bytes(content)
    things = write_hostile_things(tmp_path)
    found = found_in(tmp_path, capsys)
    assert found["readable"] == len(good_images())
    bad = {below(tmp_path, image["name"]) for image in found["unreadable"]["images"]}
    assert bad == {*bad_images(), *things}
    assert found["exif_rotated"] >= 7  # JPEGs, whose header says so


def test_a_folder_without_one_readable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert found_in(tmp_path, capsys)["readable"] == 0
    code, out = check(tmp_path, capsys, "--strict")
    assert code == 2
    assert "1 image, 0 readable" in out


def test_likenesses_of_copies_agree_and_of_others_do_not() -> None:
    pixels = photo(1, (200, 300))
    own = difference_hash(pixels)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=40)
    smaller = cv2.resize(pixels, (90, 60), interpolation=cv2.INTER_AREA)
    for copy in (np.asarray(Image.open(stream)), smaller):
        assert (own ^ difference_hash(copy)).bit_count() <= NEAR
    others = [difference_hash(photo(seed, (200, 300))) for seed in range(2, 30)]
    assert min((own ^ other).bit_count() for other in others) > NEAR


def test_the_likeness_of_a_rising_line_is_counted_by_hand() -> None:
    """Where grey rises along a row, every cell is darker than its right neighbour; where it falls, none is."""
    rising = np.repeat(np.linspace(0, 255, 72).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    assert difference_hash(rising) == 2**64 - 1
    assert difference_hash(np.ascontiguousarray(rising[:, ::-1])) == 0
    flat: NDArray[np.uint8] = np.full((20, 20, 3), 77, dtype=np.uint8)
    assert difference_hash(flat) == 0


def test_exact_groups_are_in_order_of_their_first() -> None:
    contents = np.frombuffer(b"".join(bytes([each] * 16) for each in (5, 1, 5, 2, 1, 5, 9)), np.dtype("V16"))
    assert [group.tolist() for group in exact_groups(contents)] == [[0, 2, 5], [1, 4]]
    assert exact_groups(contents[:2]) == []
    assert exact_groups(contents[:0]) == []


def brute_force(hashes: list[int]) -> list[list[int]]:
    """Connected components of the pairs that differ in few bits, by trying every pair."""
    groups = [{index} for index in range(len(hashes))]
    for one in range(len(hashes)):
        for other in range(one):
            if hashes[one] and hashes[other] and (hashes[one] ^ hashes[other]).bit_count() <= NEAR:
                joined = groups[one] | groups[other]
                for member in joined:
                    groups[member] = joined
    several = {frozenset(group) for group in groups if len(group) > 1}
    return sorted(sorted(group) for group in several)


def test_near_groups_are_those_of_every_pair() -> None:
    generator = np.random.default_rng(0)
    hashes = [int(each) for each in generator.integers(0, 2**64, 200, dtype=np.uint64)]
    for original in hashes[:60]:
        flipped = generator.choice(64, int(generator.integers(1, 6)), replace=False)
        hashes.append(original ^ sum(1 << int(bit) for bit in flipped))
    hashes += [0, 0, 0]
    found = [group.tolist() for group in near_groups(np.array(hashes, dtype=np.uint64))]
    assert found == brute_force(hashes)
    assert len(found) > 20
    assert near_groups(np.array([], dtype=np.uint64)) == []
    assert near_groups(np.array([7], dtype=np.uint64)) == []
