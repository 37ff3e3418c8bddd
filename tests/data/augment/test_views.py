"""View policies by their statistics over many draws, and every draw as a function of its key."""

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp, kstest, uniform
from sklearn.datasets import load_sample_images
from torch.nn.functional import interpolate
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

from sslkit.data.augment.cpu import ViewPipeline, ViewTransforms, resize, shift_hue
from sslkit.data.augment.device_plan import plan_views
from sslkit.data.augment.gpu import finish_on, finish_view
from sslkit.data.augment.multichannel import finish_channels
from sslkit.data.augment.parameters import ViewParams, draw_params
from sslkit.data.augment.view_layers import ROLES
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.batch import Batch
from sslkit.data.decode.rgb import decode_reduced, decode_rgb
from sslkit.data.loading.loader import ViewDataset
from sslkit.data.sources.image_source import DataConfig, open_source

DRAWS = 2000


def policy(name: str, **changes: object) -> ViewsConfig:
    return ViewsConfig.of_policy(name, **{"size": 32, **changes})


def rates(name: str, view: int) -> dict[str, float]:
    """How often each step is drawn."""
    how = policy(name).view_policies()[view]
    draws = [draw_params(how, (0, 0, sample, view), (40, 40)) for sample in range(DRAWS)]
    return {
        "jitter": sum(draw.jitter is not None for draw in draws) / DRAWS,
        "gray": sum(draw.gray for draw in draws) / DRAWS,
        "blur": sum(draw.sigma > 0 for draw in draws) / DRAWS,
        "solarize": sum(draw.solarize for draw in draws) / DRAWS,
        "flip": sum(draw.flip for draw in draws) / DRAWS,
        "hole": sum(draw.hole is not None for draw in draws) / DRAWS,
        "rotation": sum(draw.angle != 0 for draw in draws) / DRAWS,
    }


NEVER = {"hole": 0.0, "rotation": 0.0}
PAPERS = {
    ("moco_v1", 0): {**NEVER, "jitter": 1.0, "gray": 0.2, "blur": 0.0, "solarize": 0.0, "flip": 0.5},
    ("moco_v2", 0): {**NEVER, "jitter": 0.8, "gray": 0.2, "blur": 0.5, "solarize": 0.0, "flip": 0.5},
    ("moco_v3", 0): {**NEVER, "jitter": 0.8, "gray": 0.2, "blur": 1.0, "solarize": 0.0, "flip": 0.5},
    ("moco_v3", 1): {**NEVER, "jitter": 0.8, "gray": 0.2, "blur": 0.1, "solarize": 0.2, "flip": 0.5},
}


@pytest.mark.parametrize(("name", "view"), PAPERS)
def test_transforms_fire_as_often_as_the_paper_says(name: str, view: int) -> None:
    measured = rates(name, view)
    expected = PAPERS[name, view]
    assert measured.keys() == expected.keys()
    for kind, rate in expected.items():
        assert abs(measured[kind] - rate) <= 3 * np.sqrt(rate * (1 - rate) / DRAWS), kind


def test_numbers_are_distributed_as_torchvision_draws_them() -> None:
    """Kolmogorov and Smirnov compare our draws with torchvision's own for the same policy."""
    config = ViewsConfig.of_policy("moco_v3")
    draws = [draw_params(config.policy_of("global1"), (0, 0, sample, 0), (375, 500)) for sample in range(DRAWS)]
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500)
    boxes = [RandomResizedCrop.get_params(image, config.crop_scale, config.crop_ratio) for _ in range(DRAWS)]
    for number in range(4):
        ours = [draw.box[number] for draw in draws]
        assert ks_2samp(ours, [box[number] for box in boxes]).pvalue > 0.001, number
    jitter = ColorJitter(*config.jitter)
    theirs = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(DRAWS)
    ]
    jittered = [draw for draw in draws if draw.jitter is not None]
    for number in range(4):
        ours = [draw.jitter[number] for draw in jittered if draw.jitter]
        assert ks_2samp(ours, [drawn[1 + number] for drawn in theirs]).pvalue > 0.001, number
    orders = Counter(draw.order for draw in draws)
    assert len(orders) == 24
    assert max(orders.values()) < 2 * DRAWS / 24
    assert kstest([draw.sigma for draw in draws], uniform(0.1, 1.9).cdf).pvalue > 0.001


@pytest.mark.parametrize("size", [(10, 500), (500, 10), (1, 1), (3, 5)])
def test_boxes_of_odd_images_lie_inside_and_are_torchvisions(size: tuple[int, int]) -> None:
    for sample in range(50):
        box = draw_params(policy("moco_v2"), (0, 0, sample, 0), size).box
        assert box[2] >= 1
        assert box[3] >= 1
        assert box[0] + box[2] <= size[0]
        assert box[1] + box[3] <= size[1]
    if max(size) > 10:  # none of ten boxes fits, so the middle is taken
        expected = RandomResizedCrop.get_params(torch.zeros(3, *size), (0.2, 1.0), (0.75, 4 / 3))
        assert box == tuple(expected)


def test_order_of_v1_puts_gray_before_jitter() -> None:
    """A picture that is grey first keeps its grey under a jitter of hue and saturation; one that is grey last too."""
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    draw = ViewParams((0, 0, 32, 32), (1.0, 1.0, 0.0, 0.0), (0, 1, 2, 3), True, 0.0, False, False, 0.0, None)
    brightened = replace(draw, jitter=(1.4, 1.0, 1.0, 0.0))
    first, last = (ViewTransforms(policy(name))(image, brightened) for name in ("moco_v1", "moco_v2"))
    gray = np.asarray(Image.fromarray(image).convert("L"), dtype=float)
    assert np.abs(first[..., 0] - np.clip(gray * 1.4, 0, 255)).max() <= 2.0
    lighter = np.clip(image * 1.4, 0, 255).astype(np.uint8)
    assert np.abs(last[..., 0] - np.asarray(Image.fromarray(lighter).convert("L"), dtype=float)).max() <= 2.0
    assert np.abs(first[..., 0].astype(float) - last[..., 0]).max() > 10.0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_jitter_is_torchvisions(order: tuple[int, int, int, int]) -> None:
    image = photograph()
    factors = (1.3, 0.7, 1.2, 0.08)
    draw = ViewParams((0, 0, *image.shape[:2]), factors, order, False, 0.0, False, False, 0.0, None)
    ours = ViewTransforms(policy("moco_v2"))(image, draw)
    expected = Image.fromarray(image)
    for number in order:
        adjust = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)[number]
        expected = adjust(expected, factors[number])
    off = np.abs(ours.astype(int) - np.asarray(expected).astype(int))
    assert off.mean() < 1.5  # OpenCV has 180 hues, Pillow 256
    assert np.quantile(off, 0.99) <= 8


@pytest.mark.parametrize(("interpolation", "filter_"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
@pytest.mark.parametrize("side", [32, 300])
def test_resizing_is_pillows(interpolation: str, filter_: int, side: int) -> None:
    image = photograph()[:200, :170]
    expected = np.asarray(Image.fromarray(image).resize((side, side), filter_))
    off = np.abs(resize(image, side, interpolation).astype(int) - expected)
    assert off.max() <= (1 if interpolation == "bilinear" else 2)


def test_large_jpegs_are_decoded_smaller_and_show_the_same() -> None:
    """Reduced decoding and full decoding give the same views but for a level or two, and reduces no crop too far."""
    pipeline = ViewPipeline(policy("moco_v2", size=64), seed=0)
    stream = io.BytesIO()
    Image.fromarray(photograph()).resize((1600, 1200)).save(stream, "JPEG", quality=95)
    reductions = set()
    for sample in range(40):
        fits = partial(pipeline.reduction, 0, sample)
        small, size = decode_reduced(stream.getvalue(), "a photograph", fits)
        assert size == (1200, 1600)
        reductions.add(1200 // small.shape[0])
        whole = decode_rgb(stream.getvalue(), "a photograph")
        for one, other in zip(pipeline(small, 0, sample, size), pipeline(whole, 0, sample), strict=True):
            assert np.abs(one.astype(int) - other).mean() < 5.0
        for draw in pipeline.view_params(0, sample, size):
            assert min(draw.box[2:]) >= 64 * fits(size)
    assert reductions == {4, 8}
    assert pipeline.reduction(0, 0, (100, 400)) == 1


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", "simclr", "byol", "turned", "added"])
def test_an_accelerator_makes_the_views_that_the_cpu_makes(name: str) -> None:
    changes = {"rotate_degrees": 20.0, "erase_prob": 0.5, "size": 64, "device": "accelerator"}
    given = {"turned": policy("moco_v3", **changes), "added": policy("moco_v2", size=64, brightness="add")}
    config = given.get(name) or policy(name, size=64, device="accelerator")
    pipeline, image = ViewPipeline(config, seed=3), photograph()
    expected = [pipeline(image, 0, sample) for sample in range(48)]
    items = [pipeline.crop_views(image, 0, sample) for sample in range(48)]
    batch = Batch(
        [torch.from_numpy(np.stack(views)) for views in zip(*(crops for crops, _ in items), strict=True)],
        torch.arange(48),
        plan=plan_views(
            [np.stack(rows) for rows in zip(*(rows for _, rows in items), strict=True)],
            config.view_policies(),
            pipeline.sides,
        ),
    )
    finished = finish_on(torch.device("cpu"), batch, config)
    assert finished.plan is None
    for view, cpu in zip(finished.views, zip(*expected, strict=True), strict=True):
        assert view.shape == (48, 64, 64, 3)
        assert view.dtype == torch.uint8
        difference = np.abs(view.numpy().astype(int) - np.stack(cpu))
        off = difference.mean(axis=(1, 2, 3))
        assert off.max() < 4.0
        assert np.median(off) < 1.5
        if config.transforms == "tensorflow":  # floats between the steps on both
            assert difference.max() <= 1
            assert off.max() < 0.05
    moved = np.abs(finished.views[0].numpy().astype(int) - batch.views[0].numpy()).mean()
    assert moved > 10.0  # or nothing was done at all


@pytest.mark.parametrize("sigma", [0.11, 0.163, 0.217, 0.243, 0.271, 0.2857])
def test_small_blurs_are_pillows(sigma: float) -> None:
    """Below sigma 2/7 a kernel that ends at 3.5 deviations is a single pixel; Pillow's blur still blurs."""
    image, config = photograph(), policy("moco_v2")
    draw = ViewParams((0, 0, 8, 8), None, (0, 1, 2, 3), False, sigma, False, False, 0.0, None)
    expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
    plan = plan_views([draw.as_row()[None]], [config], [len(image)])
    device = finish_view(torch.from_numpy(image)[None], plan.packed, plan.views[0], config)[0].numpy()
    for found in (ViewTransforms(config)(image, draw), device):
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found != expected).mean() < 1e-4
    changed = (expected != image).mean()
    assert changed > (0.01 if sigma > 0.15 else 0.0)  # Pillow rounds most of what the smallest would change


def test_small_blurs_of_channels_have_the_gaussians_variance() -> None:
    """A single bright pixel spreads as far as sigma says, along both axes."""
    image = np.zeros((15, 15, 5), dtype=np.uint16)
    image[7, 7] = 60_000
    draw = ViewParams((0, 0, 15, 15), None, (0, 1, 2, 3), False, 0.25, False, False, 0.0, None)
    blurred = finish_channels(image, draw, policy("moco_v2")).astype(float)
    places = np.arange(15) - 7
    for axis in (0, 1):
        weights = blurred.sum(axis=axis) / blurred.sum(axis=(0, 1))
        assert np.abs(weights.T @ places**2 - 0.25**2).max() < 1e-3


# Of daeeaf3, before other policies got samplers of their own.
DRAWN_BEFORE = {
    "moco_v1": "b79f10b5fe8ef03b",
    "moco_v2": "64b43116c659faec",
    "moco_v3": "e2d7d9bf80d1aac7",
    "swav": "3781d9835ecf56cb",
    "moco_cifar10": "dd0bb7ffd4ae6e6d",
    "small_gray": "15a8ca5c253d6387",
}


@pytest.mark.parametrize("name", DRAWN_BEFORE)
def test_draws_are_the_same_as_ever(name: str) -> None:
    config = ViewsConfig.of_policy(name)
    keys = [(sample, view, size) for sample in range(40) for view in (0, 1, 2) for size in ((375, 500), (50, 1000))]
    policies = [config.policy_of(role) for role in ROLES]
    draws = [draw_params(policies[view], (3, 1, sample, view), size) for sample, view, size in keys]
    rows = [[*draw.box, *(round(float(number), 5) for number in draw.as_row())] for draw in draws]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == DRAWN_BEFORE[name]


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", "swav"])
def test_views_are_made_of_the_same_bits_as_ever(name: str) -> None:
    """PyTorch's antialiased resize and albumentations' steps, written out: the bits that runs of these policies had."""
    image, config = photograph(), policy(name, size=48)
    pipeline, compared = ViewPipeline(config, seed=2), 0
    for sample in range(20):
        for view, draw in enumerate(pipeline.view_params(0, sample, image.shape[:2])[:3]):
            if 0 < draw.sigma < 2 / 7:
                continue
            top, left, height, width = draw.box
            crop = cv2.cvtColor(image[top : top + height, left : left + width], cv2.COLOR_RGB2RGBA)
            batch, side = torch.from_numpy(crop)[None].permute(0, 3, 1, 2), 48 if view < 2 else 96
            pixels = interpolate(batch, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
            expected = written_out(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), draw, gray_first=config.gray_first)
            assert np.array_equal(pipeline.make_view(image, 0, sample, view), expected)
            compared += 1
    assert compared > 35


def written_out(pixels: NDArray[np.uint8], draw: ViewParams, *, gray_first: bool) -> NDArray[np.uint8]:
    """The steps by albumentations' transforms as its users call them, each made for the numbers of this view."""
    names = ("brightness", "contrast", "saturation")
    gray = A.ToGray(num_output_channels=3, p=1.0)
    pixels = gray(image=pixels)["image"] if draw.gray and gray_first else pixels
    for number in draw.order if draw.jitter else ():
        if number == 3:
            pixels = shift_hue(pixels, draw.jitter[3])
        else:
            factors = dict.fromkeys(names, (1.0, 1.0)) | {names[number]: (draw.jitter[number],) * 2}
            pixels = A.ColorJitter(**factors, hue=(0.0, 0.0), p=1.0)(image=pixels)["image"]
    pixels = gray(image=pixels)["image"] if draw.gray and not gray_first else pixels
    if draw.sigma:
        pixels = A.GaussianBlur(blur_limit=0, sigma_limit=(draw.sigma, draw.sigma), p=1.0)(image=pixels)["image"]
    pixels = A.Solarize(threshold_range=(0.5, 0.5), p=1.0)(image=pixels)["image"] if draw.solarize else pixels
    return A.HorizontalFlip(p=1.0)(image=pixels)["image"] if draw.flip else pixels


def test_crop_areas_stay_within_the_scale() -> None:
    """Blank gradients tell which part of the image a crop took."""
    ys, xs = np.mgrid[0:200, 0:200].astype(np.uint8)
    image = np.stack([ys, xs, np.zeros_like(xs)], axis=2)
    bare = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "flip_prob": 0.0, "solarize_prob": 0.0}
    pipeline = ViewPipeline(policy("moco_v2", **bare, size=100), seed=0)
    areas = []
    for sample in range(400):
        view = pipeline.make_view(image, 0, sample, 0).astype(float)
        height, width = (np.ptp(view[..., axis]) * 100 / 99 + 1 for axis in (0, 1))
        areas.append(height * width / 200**2)
    assert min(areas) > 0.17
    assert max(areas) <= 1.06
    assert abs(np.mean(areas) - 0.58) < 0.05  # uniform on (0.2, 1), large wide crops refused and redrawn


def test_shrinking_is_antialiased() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    bare = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "flip_prob": 0.0, "crop_scale": (1.0, 1.0)}
    view = ViewPipeline(policy("moco_v2", **bare), seed=0).make_view(noise, 0, 0, 0)
    assert view.std() < 12  # 37 without antialiasing, 9 by area


def test_solarize_inverts_from_128_up() -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(8, axis=0)
    draw = ViewParams((0, 0, 8, 256), None, (0, 1, 2, 3), False, 0.0, True, False, 0.0, None)
    out = ViewTransforms(policy("moco_v3"))(image, draw)[0, :, 0]
    assert out.tolist() == [value if value < 128 else 255 - value for value in range(256)]


def photograph() -> NDArray[np.uint8]:
    return np.ascontiguousarray(load_sample_images().images[0][:400, :600])


def gray_image() -> NDArray[np.uint8]:
    return open_source(DataConfig(path="builtin:fashion_mnist")).read(3)


def test_a_view_is_a_function_of_its_key_alone() -> None:
    image = gray_image()
    pipelines = [ViewPipeline(policy("moco_v3"), seed=7) for _ in range(2)]
    first = pipelines[0].make_view(image, epoch=2, sample=11, view=1)
    for epoch, sample in ((0, 0), (5, 3)):
        pipelines[1](image, epoch, sample)
    assert np.array_equal(first, pipelines[1].make_view(image, epoch=2, sample=11, view=1))


def test_views_differ_in_every_word_of_the_key() -> None:
    image = gray_image()
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    views = [
        ViewPipeline(policy("moco_v2"), seed).make_view(image, epoch, sample, view)
        for seed, epoch, sample, view in keys
    ]
    assert all(not np.array_equal(a, b) for a, b in pairwise(views))
    assert len({view.tobytes() for view in views}) == len(keys)


def test_gray_pictures_become_three_channels() -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist"))
    views, sample, _, _ = ViewDataset(source, ViewPipeline(policy("moco_v2"), seed=0))[(0, 7)]
    assert sample == 7
    assert [(view.shape, view.dtype) for view in views] == [((32, 32, 3), np.uint8)] * 2


def test_multi_crop_has_six_small_views_of_small_parts() -> None:
    """SwAV: two crops of 14 to 100 % at 224 pixels, six of 5 to 14 % at 96; small ones share the second's chances."""
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 3, axis=2).repeat(256, axis=0)
    plain = ViewsConfig.of_policy("swav", jitter_prob=0.0, gray_prob=0.0, blur_prob=0.0, flip_prob=0.0)
    views = ViewPipeline(plain, seed=0)(ramp, 0, 0)
    assert [view.shape[0] for view in views] == [224, 224] + [96] * 6
    pipeline = ViewPipeline(plain, seed=0)
    widths = [
        [np.ptp(pipeline.make_view(ramp, 0, sample, view)[..., 0]) / 255 for sample in range(200)] for view in (0, 2)
    ]
    # Width over the image's is the root of area times ratio: at most sqrt(0.14 * 4 / 3) for small crops.
    assert max(widths[1]) <= (0.14 * 4 / 3) ** 0.5 + 0.01
    assert min(widths[0]) >= (0.14 * 3 / 4) ** 0.5 - 0.02
    assert max(widths[0]) > 0.9
