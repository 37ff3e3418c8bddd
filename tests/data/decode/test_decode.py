"""Images nobody looked at: the good as Pillow gives them, the bad refused in words, and no memory for lies."""

import io
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hostile import bad_images, good_images, photo, png_of_size, webp_of_size, write_hostile_things
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from sslkit.data.decode.rgb import MAX_PIXELS, UnreadableImage, decode_rgb, read_file, read_header
from sslkit.data.formats.folder_listing import list_images, printable, table_of_folders, to_path, to_text
from sslkit.data.sources.image_source import DataConfig, open_source

GOOD, BAD = good_images(), bad_images()


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_is_decoded_as_pillow_does(name: str) -> None:
    with Image.open(io.BytesIO(GOOD[name])) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = decode_rgb(GOOD[name], name)
    assert pixels.shape == expected.shape
    assert pixels.dtype == np.uint8
    rounding = 1 if name in ("cmyk.jpg", "cmyk.tif", "colour16.tiff") else 0
    assert np.abs(pixels.astype(int) - expected).max() <= rounding


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_grey_keeps_its_high_byte(suffix: str) -> None:
    """Pillow's own conversion clips it to white."""
    import cv2  # noqa: PLC0415

    grey = photo()[..., 0]
    encoded = cv2.imencode(suffix, grey.astype(np.uint16) * 256 + 99)[1].tobytes()
    assert np.array_equal(decode_rgb(encoded, "x"), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_wrong_colour_profile_is_not_reported_by_libpng(mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    image, stream = Image.fromarray(photo()).convert(mode), io.BytesIO()
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"CMYK"
    image.save(stream, "PNG", icc_profile=bytes(profile))
    assert b"iCCP" in stream.getvalue()
    assert np.array_equal(decode_rgb(stream.getvalue(), "x", "white"), decode_rgb(png(image), "x", "white"))
    assert capfd.readouterr().err == ""
    import cv2  # noqa: PLC0415

    cv2.imdecode(np.frombuffer(stream.getvalue(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    assert "iCCP" in capfd.readouterr().err  # what a user would see


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_every_bad_kind_is_refused_in_words(name: str) -> None:
    content, words = BAD[name]
    with pytest.raises(UnreadableImage, match=words) as caught:
        decode_rgb(content, name)
    assert str(caught.value).startswith(f"cannot read {name} as an image: ")
    assert len(str(caught.value).splitlines()) == 1


def peak_of(content: bytes, queue: "multiprocessing.Queue[tuple[int, str]]") -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_rgb(content, "bomb")
    except UnreadableImage as error:
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error.reason))


@pytest.mark.full
@pytest.mark.parametrize(
    "content", [png_of_size(30_000, 30_000), webp_of_size(16_000, 16_000), png_of_size(9000, 9000)]
)
@pytest.mark.parametrize(
    ("start", "kibibytes"),
    [
        ("spawn", 20 * 1024),  # in a fresh process; the pixels would take 243 MB and up
        # Pillow, asked where OpenCV refuses, has four bytes a pixel cleared if the heap has been used before.
        ("fork", 4 * MAX_PIXELS // 1024 + 20 * 1024),
    ],
)
def test_a_lying_header_takes_little_memory(content: bytes, start: Literal["spawn", "fork"], kibibytes: int) -> None:
    context = multiprocessing.get_context(start)
    queue: multiprocessing.Queue[tuple[int, str]] = context.Queue()
    child = context.Process(target=peak_of, args=(content, queue))
    child.start()
    grown, _reason = queue.get(timeout=60)
    child.join()
    assert grown < kibibytes


def test_header_tells_size_mode_and_orientation() -> None:
    header = read_header(GOOD["turned6.jpg"], "x")
    assert (header.format, header.mode, header.orientation) == ("JPEG", "RGB", 6)
    assert (header.height, header.width) == photo().shape[:2]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(GOOD)),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    length=st.floats(0, 1),
)
def test_damage_gives_an_image_or_a_reason(name: str, cuts: list[tuple[float, int]], length: float) -> None:
    content = bytearray(GOOD[name])
    for where, value in cuts:
        content[int(where * (len(content) - 1))] = value
    if length < 0.5:
        content = content[: int(2 * length * len(content))]
    try:
        pixels = decode_rgb(bytes(content), name)
    except UnreadableImage as error:
        shape, reason = (1, 1, 3), error.reason
    else:
        shape, reason = pixels.shape, "none needed"
    assert len(shape) == 3
    assert shape[2] == 3
    assert reason


def test_what_is_no_regular_file_is_neither_waited_for_nor_read(tmp_path: Path) -> None:
    for name in write_hostile_things(tmp_path):
        with pytest.raises(OSError, match=r"not a regular|No such|symbolic links|bytes, more"):
            read_file(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path / "folder.jpg")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another")
def test_a_file_without_the_right_to_read_it(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(GOOD["plain.png"])
    (tmp_path / "secret.png").chmod(0)

    def read_as_nobody(queue: "multiprocessing.Queue[str]") -> None:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        os.fchdir(descriptor)  # the folders above are root's own
        os.setresuid(65534, 65534, 65534)
        try:
            read_file(Path("secret.png"))
        except OSError as error:
            queue.put(str(error.strerror))

    tmp_path.chmod(0o755)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_as_nobody, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == "Permission denied"
    child.join()


NAMES = [
    b"\xff\xfe.png",
    b"line\nbreak.png",
    b"quote\"'\\.png",
    b"star*[1]?.png",
    b"a#b%20c::d.png",
    "zoë 图.png".encode(),
]


def test_names_of_any_bytes_are_read_and_printed_on_one_line(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as stream:
            Image.fromarray(photo(number)).save(stream, "PNG")
    source = open_source(DataConfig(path=str(tmp_path)))
    assert {os.fsencode(to_path(path).name) for path in source.paths()} == set(NAMES)
    seen = {source.read(index).tobytes() for index in range(len(source))}
    assert seen == {photo(number).tobytes() for number in range(len(NAMES))}
    assert all(source.name(index).isprintable() for index in range(len(source)))
    assert "\\xff\\xfe.png" in " ".join(map(source.name, range(len(source))))


@given(st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_path_survives_being_text(name: bytes) -> None:
    path = os.fsdecode(name)
    text = to_text(path)
    text.encode("utf-8")
    assert os.fsencode(to_path(text)) == os.fsencode(Path(path))
    assert printable(text).isprintable()


def test_folders_are_walked_in_order_and_never_in_a_circle(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/x.jpg/9.png", "a/notes.txt", ".hidden/3.png", "__MACOSX/4.png", "b/plain"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(GOOD["plain.png"])
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b" / "2.png")  # a link to a file, without a suffix
    listing = list_images(tmp_path)
    table = table_of_folders(listing.folders, listing.classes)
    names = [os.path.relpath(cell["path"], tmp_path) for cell in table["image"]]
    assert names == ["a/x.jpg/9.png", "b/1.JPG", "b/2.png"]
    assert dict(listing.skipped) == {".txt": 1, "no suffix": 2}
    assert table.features["label"].names == ["b", "x.jpg"]
    assert table["label"] == [1, 0, 0]
