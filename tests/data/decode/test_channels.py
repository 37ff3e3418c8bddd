"""Images of other than three channels, in 8 and 16 bits: from the file to an encoder that timm loads."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from conftest import small_recipe
from hostile import encode, exif, photo
from numpy.typing import NDArray
from PIL import Image

import sslkit
from sslkit.cli import main
from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.multichannel import finish_channels, resize_channels
from sslkit.data.augment.parameters import ViewParams
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.decode.channels import as_picture, decode_channels
from sslkit.data.decode.rgb import UnreadableImage, decode_rgb
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import load_encoder
from sslkit.evaluate.probes.knn import KnnProtocol
from sslkit.evaluate.probes.scoring import evaluate_finetune, evaluate_knn, evaluate_linear
from sslkit.parts.backbone import create_backbone
from sslkit.publish.export import export_encoder

VIEWS = ViewsConfig(policy="moco_v2", jitter=(0.4, 0.4, 0.0, 0.0), jitter_prob=0.8, gray_prob=0.0, blur_prob=0.5)
NOTHING = ViewParams((0, 0, 8, 8), None, (0, 1, 2, 3), False, 0.0, False, False, 0.0, None)


def values(channels: int, dtype: Any = np.uint16, size: tuple[int, int] = (24, 20), seed: int = 0) -> NDArray[Any]:
    """Smooth values over the whole range, (H, W, channels)."""
    top = np.iinfo(dtype).max
    planes = [
        cv2.resize(np.random.default_rng([seed, n]).random((4, 5)), size[::-1], interpolation=cv2.INTER_LINEAR)
        for n in range(channels)
    ]
    return np.asarray(np.stack(planes, axis=2) * top, dtype=dtype)


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4, 13])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_keeps_every_bit(channels: int, dtype: Any, planar: str) -> None:
    pixels = values(channels, dtype)
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    encoded = tiff(stored, photometric="minisblack", planarconfig=planar, compression="zlib")
    expected = pixels.astype(np.uint16) * (257 if dtype == np.uint8 else 1)
    assert np.array_equal(decode_channels(encoded, "x", channels), expected)
    with pytest.raises(UnreadableImage, match=rf"{channels} channels, but \[backbone\] in_chans is 5"):
        decode_channels(encoded, "x", 5)


def test_tiff_of_pages() -> None:
    pixels = values(4)
    encoded = tiff(pixels.transpose(2, 0, 1), photometric="minisblack")
    assert np.array_equal(decode_channels(encoded, "x", 4), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_them(kind: str) -> None:
    pixels = values(1)
    encoded = encode(Image.fromarray(pixels[..., 0]), kind)
    assert np.array_equal(decode_channels(encoded, "x", 1), pixels)


def test_other_formats() -> None:
    grey = values(1, np.uint8)
    for kind in ("PNG", "TIFF", "BMP", "JPEG2000"):
        found = decode_channels(encode(Image.fromarray(grey[..., 0]), kind), "x", 1)
        assert np.array_equal(found, grey.astype(np.uint16) * 257)
    pair = np.dstack([grey, grey[::-1]])
    found = decode_channels(encode(Image.fromarray(pair, "LA"), "PNG"), "x", 2)
    assert np.array_equal(found, pair.astype(np.uint16) * 257)
    deep = values(4)
    encoded = cv2.imencode(".png", deep[..., [2, 1, 0, 3]])[1].tobytes()
    assert np.array_equal(decode_channels(encoded, "x", 4), deep)
    bits = Image.fromarray(grey[..., 0]).convert("1")
    assert set(np.unique(decode_channels(encode(bits, "PNG"), "x", 1))) == {0, 65535}
    turned = decode_channels(encode(Image.fromarray(grey[..., 0]), "PNG", exif=exif(6)), "x", 1)
    assert turned.shape == (20, 24, 1)


@pytest.mark.parametrize(
    ("encoded", "channels", "reason"),
    [
        (encode(Image.fromarray(photo()), "JPEG"), 1, r"3 channels \(mode RGB\), but \[backbone\] in_chans is 1"),
        (encode(Image.fromarray(photo()).quantize(8), "PNG"), 1, "palette"),
        (encode(Image.fromarray(photo()).convert("F"), "TIFF"), 1, "no channels of 8 or 16 bits"),
        (b"no picture", 1, "not JPEG"),
        (b"II*\0" + bytes(90), 4, "damaged or truncated"),
        (encode(Image.fromarray(values(1)[..., 0]), "PNG")[:150], 1, "damaged or truncated"),
    ],
)
def test_what_cannot_be_read_so(encoded: bytes, channels: int, reason: str) -> None:
    if channels == 4:
        pytest.importorskip("tifffile")
    with pytest.raises(UnreadableImage, match=reason):
        decode_channels(encoded, "x", channels)


def test_without_tifffile_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"needs tifffile: pip install tifffile") as caught:
        decode_channels(b"II*\0" + bytes(90), "x", 4)
    assert not isinstance(caught.value, UnreadableImage)  # which would count as one bad image of many


def test_tiffs_that_are_something_else() -> None:
    with pytest.raises(UnreadableImage, match="values of type float32"):
        decode_channels(tiff(values(4).astype(np.float32), photometric="minisblack", planarconfig="contig"), "x", 4)
    with pytest.raises(UnreadableImage, match="unclear which are the channels"):
        decode_channels(tiff(np.zeros((3, 5, 8, 9), np.uint8), photometric="minisblack"), "x", 3)
    with pytest.raises(UnreadableImage, match="more than 268435455 values"):
        decode_channels(liar(), "x", 4)


def test_pages_are_channels_whoever_wrote_them() -> None:
    """Written one by one, by Pillow or by tifffile; and none is left out where fewer are wanted."""
    wanted = values(3)
    first, *others = (Image.fromarray(wanted[..., channel]) for channel in range(3))
    stream = io.BytesIO()
    first.save(stream, "TIFF", save_all=True, append_images=others)
    assert np.array_equal(decode_channels(stream.getvalue(), "x", 3), wanted)
    one_by_one = io.BytesIO()
    with pytest.importorskip("tifffile").TiffWriter(one_by_one) as writer:
        for channel in range(3):
            writer.write(wanted[..., channel], photometric="minisblack")
    assert np.array_equal(decode_channels(one_by_one.getvalue(), "x", 3), wanted)
    for pages in (stream, one_by_one):
        with pytest.raises(UnreadableImage, match="3 channels, but"):
            decode_channels(pages.getvalue(), "x", 4)
        with pytest.raises(UnreadableImage, match="3 pages, but"):
            decode_channels(pages.getvalue(), "x", 1)
    preview = io.BytesIO()
    first.save(preview, "TIFF", save_all=True, append_images=[first.resize((4, 4))])
    assert np.array_equal(decode_channels(preview.getvalue(), "x", 1), wanted[..., :1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2])
def test_where_white_is_zero_it_becomes_bright(channels: int, dtype: Any) -> None:
    """As some X-ray machines write: by the file's own word, in 8 as in 16 bits."""
    wanted = values(channels, dtype)
    dark = np.iinfo(dtype).max - wanted
    words = {"planarconfig": "contig"} if channels > 1 else {}
    encoded = tiff(dark if channels > 1 else dark[..., 0], photometric="miniswhite", **words)
    found = decode_channels(encoded, "x", channels)
    assert np.array_equal(found, wanted.astype(np.uint16) * (257 if dtype == np.uint8 else 1))


def test_pgm_of_16_bits() -> None:
    wanted = values(1)
    height, width = wanted.shape[:2]
    encoded = f"P5\n{width} {height}\n65535\n".encode() + wanted.astype(">u2").tobytes()
    assert np.array_equal(decode_channels(encoded, "x", 1), wanted)


def test_a_tiff_that_is_no_rgb_is_said_in_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    encoded = tiff(values(13), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImage, match=r"a TIFF that is not grey .* args = \{ in_chans = n \}"):
        decode_rgb(encoded, "x")
    assert capfd.readouterr().err == ""


def liar() -> bytes:
    """A small file whose header claims 14 billion values."""
    encoded = bytearray(tiff(np.zeros((4, 40, 90), np.uint8), photometric="minisblack", planarconfig="separate"))
    for tag in (256, 257):  # width and length, of which the header now lies
        found = re.search(tag.to_bytes(2, "little") + rb"[\3\4]\x00\x01\x00\x00\x00", encoded)
        assert found
        encoded[found.end() : found.end() + 2] = (60_000).to_bytes(2, "little")
    return bytes(encoded)


def test_steps_are_what_they_say() -> None:
    """Each against the same arithmetic, written down another way."""
    pixels = values(5, size=(8, 8))
    exact = pixels.astype(np.float64)
    assert np.array_equal(finish_channels(pixels, NOTHING, VIEWS), pixels)

    def done(**changes: Any) -> NDArray[np.float64]:
        return finish_channels(pixels, replace(NOTHING, **changes), VIEWS).astype(float)

    assert np.abs(done(jitter=(1.7, 1.0, 1.0, 0.0)) - np.minimum(exact * 1.7, 65535)).max() <= 1
    mean = exact.mean(axis=(0, 1))
    assert np.abs(done(jitter=(1.0, 0.25, 1.0, 0.0)) - (mean * 0.75 + exact * 0.25)).max() <= 1
    assert np.array_equal(done(flip=True), exact[:, ::-1])
    assert np.array_equal(done(solarize=True), np.where(exact >= 32768, 65535 - exact, exact))
    assert (done(hole=(2, 3, 4, 5))[2:6, 3:8] == 0).all()
    for channel in range(5):
        blurred = cv2.GaussianBlur(exact[..., channel], (7, 7), 1.0)
        assert np.abs(done(sigma=1.0)[..., channel] - blurred).max() <= 1
    rounds = finish_channels(done(angle=90.0).astype(np.uint16), NOTHING, VIEWS)
    assert np.abs(rounds.astype(float) - np.rot90(exact)).max() <= 1


def test_resizing_is_what_pillow_does() -> None:
    pixels = values(3, size=(60, 44))
    found = resize_channels(pixels, 16, "bicubic").astype(float)
    for channel in range(3):
        plane = Image.fromarray(pixels[..., channel].astype(np.float32))
        expected = np.asarray(plane.resize((16, 16), Image.Resampling.BICUBIC)).clip(0, 65535)
        assert np.abs(found[..., channel] - expected).max() <= 3
    assert len(np.unique(found % 257)) > 50  # more than 8 bits are left


def test_views_follow_the_draws_of_rgb() -> None:
    """The same boxes and the same steps, whatever the channels; only bits are kept that 8 have no room for."""
    rgb, deep = photo(size=(40, 50)), photo(size=(40, 50)).astype(np.uint16) * 257
    pipeline = ViewPipeline(ViewsConfig.of_policy("small_gray", jitter=(0, 0, 0, 0), size=24), 3)
    for sample in range(5):
        pairs = zip(pipeline(rgb, 0, sample), pipeline(deep, 0, sample), strict=True)
        assert all(np.abs(one.astype(float) * 257 - other).max() <= 257 for one, other in pairs)
    batch = torch.from_numpy(deep[None])
    one = normalise(batch, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert torch.allclose(one, normalise(torch.from_numpy(rgb[None]), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), atol=1e-5)


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 16-bit PNG, 24 of each, that tell themselves by their second channel's slope."""
    root = tmp_path_factory.mktemp("plates")
    for index in range(48):
        label = index % 2
        pixels = values(4, size=(36, 36), seed=index)
        pixels[..., 3] = np.linspace(20_000, 60_000, 36, dtype=np.uint16)[:: 1 if label else -1]
        folder = root / f"class{label}"
        folder.mkdir(exist_ok=True)
        (folder / f"{index:02d}.png").write_bytes(cv2.imencode(".png", pixels[..., [2, 1, 0, 3]])[1].tobytes())
    return root


def recipe_for(plates: Path, **tables: dict[str, Any]) -> Any:
    return small_recipe(
        "moco_v2",
        "test_resnet",
        **{
            "backbone": {"args": {"in_chans": 4}},
            "data": {"path": str(plates), "split": "train"},
            "views": {
                "mean": [0.5, 0.5, 0.5, 0.6],
                "std": [0.2, 0.2, 0.2, 0.2],
                "blur_prob": 0.5,
                "solarize_prob": 0.2,
            },
            "train": {"batch_size": 16, "max_steps": 3},
            "monitor": {"every_epochs": 1, "data": str(plates), "k": 3},
            **tables,
        },
    )


def test_a_run_its_export_and_its_evaluation(plates: Path, tmp_path: Path) -> None:
    recipe = recipe_for(plates)
    assert recipe.data.channels == 4
    run = sslkit.train(recipe, tmp_path / "run")
    assert all(np.isfinite(row["loss"]) for row in run.metrics())
    assert export_encoder(tmp_path / "run", tmp_path / "out")["loads_in_timm"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [4, 32, 32]
    assert len(config["pretrained_cfg"]["mean"]) == 4
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    encoder = load_encoder(str(tmp_path / "out"))
    images = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), encoder.module.eval()(images))
    data = DataConfig(path=str(plates))
    judged = evaluate_knn(str(tmp_path / "out"), data, KnnProtocol(3, recipe.monitor.temperature))
    assert [score.encoder for score in judged.scores] == [str(tmp_path / "out"), "random init"]
    assert judged.scores[0].accuracy == pytest.approx(run.results()[-1]["accuracy"])
    linear = evaluate_linear(str(tmp_path / "out"), data, "logistic")
    assert linear.scores[0].accuracy >= 0.5
    pretrained = {"pretrained": f"local-dir:{tmp_path / 'out'}"}
    continued = create_backbone(recipe_for(plates, backbone={"args": {"in_chans": 4}, **pretrained}).backbone_config())
    assert torch.equal(continued.eval()(images), model(images))
    with pytest.raises(UserError, match=r"takes images of 4 channels; add args = \{ in_chans = 4 \}"):
        create_backbone(small_recipe("moco_v2", "test_resnet", backbone=pretrained).backbone_config())
    with pytest.raises(UserError, match="fine-tuning supports RGB encoders only"):
        evaluate_finetune(str(tmp_path / "out"), data, "simclr")


def test_an_image_of_other_channels_is_an_unreadable_one(plates: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index, file in enumerate(sorted(plates.rglob("*.png"))):
        (tmp_path / "photos" / f"{index}.png").write_bytes(file.read_bytes())
    (tmp_path / "photos" / "rgb.png").write_bytes(encode(Image.fromarray(photo()), "PNG"))
    recipe = recipe_for(tmp_path / "photos", monitor={"every_epochs": 0, "data": ""})
    sslkit.train(recipe, tmp_path / "run")
    source = open_source(recipe.data)
    with pytest.raises(UnreadableImage, match=r"3 channels \(mode RGB\)"):
        source.read(len(source) - 1)


def test_check_prints_the_statistics(plates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(plates), "--channels", "4", "--json", "--workers", "0"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    files = [decode_channels(file.read_bytes(), "x", 4) / 65535 for file in sorted(plates.rglob("*.png"))]
    every = np.stack(files).reshape(-1, 4)
    assert found["mean"] == pytest.approx(every.mean(axis=0), abs=1e-6)
    assert found["std"] == pytest.approx(every.std(axis=0), abs=1e-5)
    assert found["unreadable"]["count"] == 0


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"views": {"mean": [0.5]}}, r"\[views\] mean: 1 numbers, where images have 4 channels .* --channels 4"),
        ({"views": {"std": [0.2, 0.2, 0.2]}}, r"\[views\] std: 3 numbers"),
        ({"views": {"jitter": [0.4, 0.4, 0.0, 0.1]}}, r"\[views\] jitter: saturation and hue"),
        ({"views": {"gray_prob": 0.2}}, r"\[views\] gray_prob"),
        ({"views": {"device": "accelerator"}}, r"\[views\] device"),
        ({"data": {"channels": 2}}, r"\[data\] channels: 2, but the backbone takes 4"),
        ({"backbone": {"args": {"in_chans": 0}}}, r"\[backbone\] args: in_chans must be a whole number from 1 to 512"),
        ({"backbone": {"args": {}}, "data": {"channels": 4}}, r"\[data\] channels: 4, but the backbone takes 3"),
    ],
)
def test_refusals(tables: dict[str, dict[str, Any]], words: str, tmp_path: Path) -> None:
    mean, std = [0.5] * 4, [0.2] * 4
    base: dict[str, dict[str, Any]] = {"views": {"mean": mean, "std": std}, "backbone": {"args": {"in_chans": 4}}}
    merged = {table: {**base.get(table, {}), **tables.get(table, {})} for table in {*base, *tables}}
    with pytest.raises(UserError, match=words):
        small_recipe(**merged)


def test_pictures_for_the_eye() -> None:
    assert np.array_equal(as_picture(photo()), photo())
    two = values(2)
    shown = as_picture(two)
    assert shown.dtype == np.uint8
    assert (shown.min(), shown.max()) == (0, 255)
    assert np.array_equal(shown[..., 0], shown[..., 2])
    assert as_picture(values(13)).shape == (24, 20, 3)


def test_the_page_of_views(plates: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(recipe_for(plates).to_toml())
    with pytest.raises(SystemExit) as ended:
        main(["views", str(tmp_path / "r.toml"), "--output", str(tmp_path / "views.html")])
    assert ended.value.code == 0
    assert "data:image" in (tmp_path / "views.html").read_text()
