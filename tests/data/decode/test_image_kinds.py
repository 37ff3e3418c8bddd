"""Every kind of image: its size is that of its pixels, which are what Pillow gives, upright; or a reason why not."""

import io
from typing import Any

import cv2
import numpy as np
import pytest
from kinds import (
    ORIENTATIONS,
    H,
    W,
    alphas,
    bmp_16,
    chunk,
    colours,
    exif,
    packed_tiff,
    pgm,
    png,
    rgba,
    save,
    tiff,
    upright_cases,
)
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sslkit.data.decode.channels import decode_channels
from sslkit.data.decode.orientation import turn_upright
from sslkit.data.decode.rgb import Pixels, UnreadableImage, decode_reduced, decode_rgb, read_header

CASES = dict(upright_cases())
DEEP = colours()[..., 0].astype(np.uint16) * 256 + 7
TURN = chunk(b"eXIf", exif((6, 0))[6:])
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def by_pillow(encoded: bytes, mode: str = "RGB") -> Pixels:
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # Pillow clips 16 bits; ours keeps the high byte
            grey = (np.asarray(upright) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(upright.convert(mode))


def apart(one: NDArray[np.generic], other: NDArray[np.generic]) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.filterwarnings("ignore")
def test_size_and_pixels_are_those_of_pillow_in_every_kind() -> None:
    assert len(CASES) > 250
    wrong = []
    for name, encoded in CASES.items():
        expected = by_pillow(encoded)
        pixels, size = decode_reduced(encoded, name, lambda _size: 1)
        told = read_header(encoded, name).size
        if not (size == told == pixels.shape[:2] == expected.shape[:2]):
            wrong.append(f"{name}: size {size}, header {told}, pixels {pixels.shape}, Pillow {expected.shape}")
        elif apart(pixels, expected) > (1 if "JPEG CMYK" in name else 0):
            wrong.append(f"{name}: {apart(pixels, expected)} levels off")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("turn", ORIENTATIONS)
@pytest.mark.parametrize("by", [2, 4, 8])
def test_a_reduced_jpeg_has_the_size_and_the_turn_of_the_whole(turn: str, by: int) -> None:
    smooth = cv2.resize(colours(), (160, 96), interpolation=cv2.INTER_CUBIC)
    encoded = save(Image.fromarray(smooth), "JPEG", quality=95, exif=ORIENTATIONS[turn])
    whole = by_pillow(encoded)
    asked: list[tuple[int, int]] = []
    pixels, size = decode_reduced(encoded, "x", lambda told: asked.append(told) or by)
    assert asked == [size] == [whole.shape[:2]]
    small = cv2.resize(whole, None, fx=1 / by, fy=1 / by, interpolation=cv2.INTER_AREA)
    assert pixels.shape == small.shape
    assert np.abs(pixels.astype(int) - small).mean() < 3


@pytest.mark.filterwarnings("ignore")
def test_images_of_channels_are_turned_too() -> None:
    counted = 0
    for name, encoded in CASES.items():
        kind, mode, *rest = name.split()
        count = {"L": 1, "LA": 2, "RGBA": 4, "I;16": 1}.get(mode)
        if kind not in ("JPEG", "PNG", "TIFF") or count is None or "animated" in rest:
            continue
        values = decode_channels(encoded, name, count)
        with Image.open(io.BytesIO(encoded)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
        expected = expected.reshape(*expected.shape[:2], count)
        assert apart(values, expected if mode == "I;16" else expected * 257) == 0, name
        counted += 1
    assert counted > 60


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3, 4, 40])
def test_pixels_of_any_number_of_channels_are_turned_alike(turn: int, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    turned = turn_upright(pixels, turn)
    first = np.asarray(
        ImageOps.exif_transpose(
            Image.open(
                io.BytesIO(save(Image.fromarray((pixels[..., 0] >> 8).astype(np.uint8)), "PNG", exif=exif((turn, 0))))
            )
        )
    )
    assert np.array_equal(turned[..., 0] >> 8, first)
    assert turned.shape == (*first.shape, channels)


def test_a_16_bit_png_with_alpha_is_turned_in_channels() -> None:
    encoded = png(
        np.dstack([colours().astype(np.uint16) * 257, alphas().astype(np.uint16) * 257]),
        16,
        6,
        late=TURN,
    )
    assert apart(decode_channels(encoded, "x", 4), turn_upright(rgba().astype(np.uint16) * 257, 6)) == 0


@pytest.mark.parametrize(
    "late", [chunk(b"eXIf", exif((6, 0))[6:]), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)]
)
def test_an_orientation_behind_a_png_s_pixels_counts(late: bytes) -> None:
    encoded = png(colours(), 8, 2, late=chunk(b"tEXt", b"date:create\0now") + late)
    assert read_header(encoded, "x").size == (W, H)
    assert apart(decode_rgb(encoded, "x"), by_pillow(encoded)) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_in_xmp_alone_counts_as_for_pillow(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "PNG":
        encoded = png(colours(), 8, 2)
        encoded = encoded[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + encoded[33:]
    elif kind == "TIFF":
        encoded = tiff(colours(), photometric="rgb", extratags=[(700, 1, len(XMP), XMP)])
    else:
        encoded = save(Image.fromarray(colours()), kind, xmp=XMP, **options)
    pixels, size = decode_reduced(encoded, "x", lambda _size: 1)
    assert size == pixels.shape[:2] == (W, H)
    assert apart(pixels, by_pillow(encoded)) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tag",
    [(274, 3, 1, turn) for turn in (*range(10), 65535)]
    + [(274, 4, 1, 6), (274, 3, 2, (6, 6)), (274, 3, 2, (3, 3)), (274, 2, 0, "6"), (274, 1, 1, 6)],
)
@pytest.mark.parametrize("kind", ["grey", "colour", "deep"])
def test_any_orientation_tag_of_a_tiff(tag: tuple[int, ...], kind: str) -> None:
    pixels = {"grey": colours()[..., 0], "colour": colours(), "deep": DEEP}[kind]
    encoded = tiff(pixels, photometric="rgb" if kind == "colour" else "minisblack", extratags=[tag], metadata=None)
    read, size = decode_reduced(encoded, "x", lambda _size: 1)
    assert size == read.shape[:2] == read_header(encoded, "x").size
    assert apart(read, by_pillow(encoded)) == 0


def test_junk_where_exif_should_be_does_not_lose_the_image() -> None:
    for kind in ("PNG", "WEBP", "JPEG"):
        encoded = save(Image.fromarray(colours()), kind, exif=b"Exif\0\0junk and more junk")
        assert decode_rgb(encoded, "x").shape == (H, W, 3)


@pytest.mark.parametrize("maxval", [1, 15, 100, 254, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("plain", [False, True])
def test_white_of_a_pgm_is_its_maxval(maxval: int, channels: int, plain: bool) -> None:
    pixels = decode_rgb(pgm(maxval, channels, plain=plain), "x")
    expected = np.rint(np.rint(colours().astype(float) * maxval / 255) * 255 / maxval)
    assert apart(pixels, expected if channels == 3 else np.repeat(expected[..., :1], 3, axis=2)) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_white_of_a_tiff_is_its_largest_number(bits: int) -> None:
    most = 2**bits - 1
    values = colours()[..., 0].astype(np.int64) * most // 255
    encoded = packed_tiff(values, bits) if bits < 16 else tiff(values.astype(np.uint16))
    expected = values[..., None] * 255 / most
    assert np.abs(decode_rgb(encoded, "x") - expected).max() <= 1
    assert np.abs(decode_channels(encoded, "x", 1) - values[..., None] * 65535 / most).max() <= 1


@pytest.mark.parametrize("name", ["cmyk", "cmyk16", "rgb16", "planes", "white is zero", "deep, white is zero", "tiles"])
def test_what_a_tiff_of_another_layout_shows(name: str) -> None:
    cmyk = np.asarray(Image.fromarray(colours()).convert("CMYK"))
    deep_planes = np.ascontiguousarray(colours().transpose(2, 0, 1)).astype(np.uint16) * 257
    made = {
        "cmyk": lambda: tiff(cmyk, photometric="separated"),
        "cmyk16": lambda: tiff(cmyk.astype(np.uint16) * 257, photometric="separated"),
        "rgb16": lambda: tiff(colours().astype(np.uint16) * 257, photometric="rgb"),
        "planes": lambda: tiff(deep_planes, photometric="rgb", planarconfig="separate"),  # Pillow reads zeros
        "white is zero": lambda: tiff(255 - colours()[..., 0], photometric="miniswhite"),
        "deep, white is zero": lambda: tiff(65535 - DEEP, photometric="miniswhite"),
        "tiles": lambda: tiff(colours(), photometric="rgb", tile=(16, 16)),
    }
    expected = np.repeat(colours()[..., :1], 3, axis=2) if "white" in name else colours()
    assert apart(decode_rgb(made[name](), "x"), expected) <= 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["rgb", "rgba", "cmyk", "la"])
def test_a_tiff_of_planes_is_read_like_any_other(kind: str, depth: type, layout: str) -> None:
    """Pillow reads uncompressed planes of 16 bits as zeros."""
    cmyk = np.asarray(Image.fromarray(colours()).convert("CMYK"))
    pixels = {"rgb": colours(), "rgba": rgba(), "cmyk": cmyk, "la": rgba()[..., [0, 3]], "grey": colours()[..., :1]}[
        kind
    ]
    if kind == "la" and depth is np.uint16:
        return  # which is refused
    expected = colours() if pixels.shape[2] > 2 else np.repeat(colours()[..., :1], 3, axis=2)
    values = pixels.astype(depth) * depth(1 if depth is np.uint8 else 257)
    options: dict[str, Any] = {"extrasamples": ["unassalpha"]} if kind in ("rgba", "la") else {}
    photometric = {"rgb": "rgb", "rgba": "rgb", "cmyk": "separated"}.get(kind, "minisblack")
    values = np.ascontiguousarray(values.transpose(2, 0, 1)) if layout == "separate" else values
    for compression in (None, "deflate"):
        for order in "<>":
            more = {"planarconfig": layout, "byteorder": order, "compression": compression, **options}
            encoded = tiff(values, photometric=photometric, **more)
            assert apart(decode_rgb(encoded, "x"), expected) <= 1


@pytest.mark.parametrize("fields", [False, True])
def test_white_of_a_bmp_of_16_bits_is_white(fields: bool) -> None:
    encoded = bmp_16(fields)
    assert apart(decode_rgb(encoded, "x"), by_pillow(encoded)) == 0
    assert decode_rgb(encoded, "x").max() == 255


def test_associated_alpha_of_a_tiff_is_taken_out() -> None:
    multiplied = (colours().astype(int) * alphas()[..., None] // 255).astype(np.uint8)
    encoded = tiff(np.dstack([multiplied, alphas()]), photometric="rgb", extrasamples=["assocalpha"])
    assert apart(decode_rgb(encoded, "x"), by_pillow(encoded)) == 0
    assert apart(decode_rgb(encoded, "x")[:, : W // 3], colours()[:, : W // 3]) == 0


UNFIT = {
    "int16": (tiff(colours()[..., 0].astype(np.int16) * 20 - 1000), r"signed samples.*in_chans = 1"),
    "big-endian int16": (tiff(colours()[..., 0].astype(np.int16), byteorder=">"), r"signed samples.*in_chans = 1"),
    "int8": (tiff((colours()[..., 0].astype(int) - 128).astype(np.int8)), r"signed samples.*in_chans = 1"),
    "uint32": (tiff(colours()[..., 0].astype(np.uint32)), "samples of 32 bits.*in_chans = 1"),
    "int32": (tiff(colours()[..., 0].astype(np.int32)), "samples of 32 bits.*in_chans = 1"),
    "float32": (tiff(colours()[..., 0].astype(np.float32)), "samples of 32 bits.*in_chans = 1"),
    "float64": (tiff(colours()[..., 0].astype(np.float64)), "must be converted"),
    "pfm": (b"Pf\n%d %d\n-1.0\n" % (W, H) + colours()[..., 0].astype("<f4").tobytes(), "samples of 32 bits"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_into_8_bits_is_refused_with_the_way_out(name: str) -> None:
    encoded, words = UNFIT[name]
    with pytest.raises(UnreadableImage, match=words):
        decode_rgb(encoded, "scan.tif")


@pytest.mark.parametrize("kind", [np.int8, np.int16])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_the_way_out_keeps_every_signed_value(kind: type, channels: int, byteorder: str) -> None:
    limits = np.iinfo(kind)
    values = np.random.default_rng(0).integers(limits.min, limits.max + 1, (H, W, channels), dtype=kind)
    values[0, 0], values[0, 1], values[0, 2] = limits.min, limits.max, 0
    plain = values[..., 0] if channels == 1 else values
    options = {} if channels == 1 else {"planarconfig": "contig"}
    encoded = tiff(plain, photometric="minisblack", byteorder=byteorder, **options)
    read = decode_channels(encoded, "x", channels)
    moved = values.astype(int) - limits.min
    assert np.array_equal(read, moved * 257 if kind is np.int8 else moved)
