"""Transparent pixels: composited over a colour, or alpha dropped, the same wherever images are read; and said."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import small_recipe
from kinds import H, W, alphas, colours, png, rgba, save, tiff, upright_cases
from numpy.typing import NDArray
from PIL import Image

import sslkit
from sslkit.cli import main
from sslkit.cli.options import find_background
from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.decode.rgb import decode_reduced, decode_rgb, is_transparent, read_header
from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.doctor.image_checks import check_alpha
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair
from sslkit.evaluate.protocol import data_settings
from sslkit.profiling.image_cost import image_costs
from sslkit.recipe.resolve import Recipe, build_recipe, read_tables

GREY = colours()[..., 0]
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "#8090a0": (128, 144, 160), "rgb(1, 2, 3)": (1, 2, 3)}
PLAIN = {name: encoded for name, encoded in upright_cases() if "turned" not in name}


def over(straight: NDArray[np.uint8], colour: tuple[int, ...]) -> NDArray[np.float64]:
    """(H, W, 4) composited over a colour, in real numbers."""
    share = straight[..., 3:].astype(float) / 255
    return straight[..., :3] * share + np.array(colour) * (1 - share)


def keyed(depth: int, grey: bool) -> tuple[bytes, NDArray[np.uint8]]:
    """A PNG whose first square is transparent by its colour, and what it shows as RGBA."""
    if depth == 4:
        nibbles = GREY >> 4
        pixels, key = nibbles[:, 0::2] << 4 | nibbles[:, 1::2], (int(nibbles[0, 0]),)
        shown, alpha = np.repeat(nibbles[..., None] * 17, 3, axis=2), np.where(nibbles == key[0], 0, 255)
    else:
        scale = 257 if depth == 16 else 1
        one = GREY if grey else colours()
        pixels = one.astype(np.uint16) * scale
        key = tuple(int(value) for value in np.atleast_1d(pixels[0, 0]))
        shown = np.repeat(one[..., None], 3, axis=2) if grey else one
        alpha = np.where((shown == shown[0, 0]).all(axis=2), 0, 255)
    return png(pixels, depth, 0 if grey else 2, key=key), np.dstack([shown, alpha]).astype(np.uint8)


def alpha_cases() -> dict[str, tuple[bytes, NDArray[np.uint8]]]:
    """By name: an image with transparent pixels, and what it shows as straight RGBA."""
    grey = np.dstack([GREY, GREY, GREY, alphas()])
    deep = rgba().astype(np.uint16) * 257
    webp = {"lossless": True, "exact": True}
    rest = {
        "palette.png": save(Image.fromarray(colours()).quantize(64), "PNG", transparency=3),
        "palette.gif": save(Image.fromarray(colours()).quantize(64), "GIF", transparency=3),
    }
    shown = {name: np.asarray(Image.open(io.BytesIO(each)).convert("RGBA")) for name, each in rest.items()}
    return {
        "rgba.png": (save(Image.fromarray(rgba()), "PNG"), rgba()),
        "rgba16.png": (png(deep, 16, 6), rgba()),
        "la.png": (save(Image.fromarray(grey[..., [0, 3]]), "PNG"), grey),
        "la16.png": (png(grey[..., [0, 3]].astype(np.uint16) * 257, 16, 4), grey),
        "rgba.webp": (save(Image.fromarray(rgba()), "WEBP", **webp), rgba()),
        "rgba.tiff": (save(Image.fromarray(rgba()), "TIFF"), rgba()),
        "rgba16.tiff": (tiff(deep, photometric="rgb", extrasamples=["unassalpha"]), rgba()),
        "la.tiff": (save(Image.fromarray(grey[..., [0, 3]]), "TIFF"), grey),
        "rgba.jp2": (save(Image.fromarray(rgba()), "JPEG2000"), rgba()),
        "la.jp2": (save(Image.fromarray(grey[..., [0, 3]]), "JPEG2000"), grey),
        **{name: (rest[name], shown[name]) for name in rest},
        **{
            f"key {depth} {grey}": keyed(depth, grey)
            for depth, grey in [(4, True), (8, True), (16, True), (8, False), (16, False)]
        },
    }


ALPHA = alpha_cases()


@pytest.mark.parametrize("background", COLOURS)
@pytest.mark.parametrize("name", ALPHA)
def test_transparent_pixels_show_the_background(name: str, background: str) -> None:
    encoded, straight = ALPHA[name]
    assert read_header(encoded, name).alpha
    assert is_transparent(encoded, name)
    assert straight[..., 3].min() < 255
    off = np.abs(decode_rgb(encoded, name, background) - over(straight, COLOURS[background]))
    assert off.max() <= 0.51, name
    assert np.array_equal(decode_rgb(encoded, name, "keep"), straight[..., :3])


def test_avif_with_alpha_over_white() -> None:
    encoded = save(Image.fromarray(rgba()), "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(decode_rgb(encoded, "x", "white") - over(rgba(), (255, 255, 255))).max() <= 3


@pytest.mark.filterwarnings("ignore")
def test_images_without_transparency_are_the_same_bits() -> None:
    seen = 0
    for name, encoded in PLAIN.items():
        if is_transparent(encoded, name):
            continue
        assert np.array_equal(decode_rgb(encoded, name, "black"), decode_rgb(encoded, name, "keep")), name
        seen += 1
    opaque = np.dstack([colours(), np.full((H, W), 255, np.uint8)])
    for kind in ("PNG", "WEBP", "TIFF"):
        encoded = save(Image.fromarray(opaque), kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert np.array_equal(decode_rgb(encoded, kind, "white"), colours())
        assert not is_transparent(encoded, kind)
    assert seen > 50


def test_a_transparent_image_is_turned_upright_over_its_background() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        encoded = save(Image.fromarray(rgba()), kind, exif=exif, **options)
        pixels, size = decode_reduced(encoded, kind, lambda _size: 1, "black")
        assert size == pixels.shape[:2] == (W, H)
        assert np.abs(pixels - np.rot90(over(rgba(), (0, 0, 0)), -1)).max() <= 0.51


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of eight images; half are transparent, two have alpha and are opaque."""
    root = tmp_path / "pictures"
    for number in range(16):
        pixels = np.roll(rgba(), 3 * number, axis=1).copy()
        pixels[..., 3] = 255 if number in (1, 3) else pixels[..., 3]
        image = Image.fromarray(pixels)
        place = root / ("even" if number % 2 == 0 else "odd") / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        (image if number % 2 == 0 or number < 4 else image.convert("RGB")).save(place)
    return root


def opened(folder: Path, background: str | None = None) -> ImageSource:
    options = {} if background is None else {"background": background}
    return open_source(DataConfig.model_validate({"path": str(folder), **options}))


def transparent(source: ImageSource) -> int:
    return next(index for index in range(len(source)) if is_transparent(source.encoded(index)[1], ""))


def test_every_reader_of_a_source_sees_the_same(folder: Path) -> None:
    source = opened(folder)
    index = transparent(source)
    white, black, kept = (opened(folder, each) for each in ("white", "black", "keep"))
    assert source.background == "white"
    assert np.array_equal(source.read(index), white.read(index))
    assert not np.array_equal(white.read(index), black.read(index))
    assert not np.array_equal(white.read(index), kept.read(index))
    for each in (white, black, kept):
        for part in (each, each.without_labels(), each.subset(np.arange(len(each)))):
            assert np.array_equal(part.decode(*part.encoded(index), lambda _size: 1)[0], each.read(index))
    assert set(source.class_names()) == {"even", "odd"}
    pair = open_pair(DataConfig(path=str(folder), background="black"))
    assert (pair.train.background, pair.test.background) == ("black", "black")
    assert image_costs(black, ViewPipeline(small_recipe().views, 0), 0.01).images


def test_mixed_and_packed_sources_have_the_background(folder: Path, tmp_path: Path) -> None:
    mixed = open_source(DataConfig.model_validate({"mix": [{"path": str(folder)}] * 2, "background": "black"}))
    plain = opened(folder, "black")
    assert np.array_equal(mixed.read(transparent(plain)), plain.read(transparent(plain)))


@pytest.mark.parametrize("background", ["white", "black", "keep"])
@pytest.mark.parametrize("side", [16, 100])
def test_packed_images_decode_to_the_same(folder: Path, tmp_path: Path, background: str, side: int) -> None:
    options = ["--side", str(side), "--quality", "100", "--workers", "0", "--background", background]
    with pytest.raises(SystemExit) as ended:
        main(["prepare", str(folder), str(tmp_path / "packed"), *options])
    assert not ended.value.code
    facts = json.loads((tmp_path / "packed/train/prepared.json").read_text())
    assert (facts["background"], facts["shrunk"]) == (background, 16 if side == 16 else 0)
    packed, source = opened(tmp_path / "packed", background), opened(folder, background)
    for index in range(len(packed)):
        name = packed.name(index)
        (same,) = [each for each in range(len(source)) if source.name(each).endswith(Path(name).name)]
        expected = source.read(same)
        if side == 16:
            size = packed.read(index).shape[1::-1]
            smaller = Image.fromarray(expected).resize(size, Image.Resampling.BICUBIC)
            expected = decode_rgb(save(smaller, "JPEG", quality=100), "x")
        assert np.array_equal(packed.read(index), expected)


def test_a_wrong_background_is_refused_in_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("whiet", "", "#12", "#11223344"):
        with pytest.raises(UserError, match=r'\[data\] background: must be "keep" or a colour such as "white"'):
            small_recipe(data={"background": word})
    for command in (["data", "check", str(folder)], ["prepare", str(folder), str(folder.parent / "p")]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--background", "whiet"])
        assert ended.value.code == 2
        assert "--background: must be" in capsys.readouterr().err
    assert small_recipe(data={"background": "#8090a0"}).as_tables()["data"]["background"] == "#8090a0"


def test_data_check_counts_alpha(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = []
    for background in ("white", "black"):
        with pytest.raises(SystemExit):
            main(["data", "check", str(folder), "--workers", "0", "--json", "--background", background])
        found = json.loads(capsys.readouterr().out)
        assert found["alpha"] == {"count": 10, "transparent": 8, "background": background}
        means.append(found["mean"][0])
    assert means[0] > means[1] + 0.1
    with pytest.raises(SystemExit):
        main(["data", "check", str(folder), "--workers", "0"])
    said = " ".join(capsys.readouterr().out.split())
    assert "alpha channel: 10, 8 of them with transparent pixels: composited over white ([data] background" in said


def test_the_doctor_says_what_becomes_of_alpha(folder: Path) -> None:
    white, kept = check_alpha(opened(folder)), check_alpha(opened(folder, "keep"))
    assert (white.verdict, kept.verdict) == ("ok", "warning")
    assert white.sentence.startswith("alpha channel in 10 of the 16 images looked at: composited over white")
    assert "alpha is dropped and the colours under it are kept" in kept.sentence
    assert check_alpha(open_source(DataConfig(path=str(folder), channels=4))).verdict == "not applicable"


def tiny(folder: Path, **data: str) -> Recipe:
    return small_recipe(
        "simclr",
        "test_resnet",
        data={"path": str(folder), "split": "train", **data},
        train={"batch_size": 8, "max_steps": 1, "epochs": 2},
        checkpoint={"every_steps": 1},
    )


def forget_background(run: Path) -> None:
    """Make of a run folder one of the time before there was the key."""
    for file in (run / "recipe.toml", *run.glob("checkpoints/*/state.json")):
        text = file.read_text()
        changed = re.sub(r'\nbackground = "\w+"|"background": "\w+", ', "", text)
        file.write_text(changed)
    assert "background" not in read_tables(run / "recipe.toml")["data"]


def test_a_run_says_it_and_an_older_one_goes_on_as_it_began(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sslkit.train(tiny(folder, background="keep"), tmp_path / "run").folder
    said = capsys.readouterr()
    assert "alpha channel in 10 of the 16 images looked at: alpha is dropped" in said.out + said.err
    assert sslkit.train(tiny(folder), tmp_path / "other").step == 1
    said = capsys.readouterr()
    assert "alpha channel in 10 of the 16 images looked at: composited over white" in said.out + said.err
    assert find_background("", str(run)) == "keep"
    assert find_background("black", str(run)) == "black"
    assert find_background("", str(tmp_path / "other")) == "white"
    assert find_background("", "resnet18") == "white"
    forget_background(run)
    assert find_background("", str(run)) == "keep"
    longer = build_recipe({**tiny(folder).as_tables(), "train": {**tiny(folder).as_tables()["train"], "max_steps": 2}})
    with pytest.raises(UserError, match=r"data.background: keep -> white"):  # asked for by its name
        sslkit.train(longer, run)
    tables = longer.as_tables()
    del tables["data"]["background"]
    assert sslkit.train(build_recipe(tables), run).step == 2
    said = capsys.readouterr()
    assert 'this run started with [data] background = "keep"' in said.out + said.err
    assert read_tables(run / "recipe.toml")["data"]["background"] == "keep"
    sslkit.train(tiny(folder), run)  # again, now that the key is written down
    assert read_tables(run / "recipe.toml")["data"]["background"] == "keep"


def test_scores_of_other_backgrounds_are_not_of_one_protocol(folder: Path, tmp_path: Path) -> None:
    settings = [data_settings(open_pair(DataConfig(path=str(folder), background=each))) for each in ("white", "black")]
    assert [each["background"] for each in settings] == ["white", "black"]
    assert "background" not in data_settings(open_pair(DataConfig(path="builtin:fashion_mnist")))
