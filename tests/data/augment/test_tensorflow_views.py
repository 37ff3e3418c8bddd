"""SimCLR's and BYOL's views against TensorFlow's values, and against a transcription in float64."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from golden import tensorflow_views as golden
from golden.tensorflow_views import VALUES
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

from sslkit.data.augment import tensorflow as tensorflow_views
from sslkit.data.augment.cpu import ViewPipeline, resize
from sslkit.data.augment.device_plan import plan_views
from sslkit.data.augment.gpu import finish_view
from sslkit.data.augment.multichannel import resize_channels
from sslkit.data.augment.parameters import ViewParams, draw_params
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.engine.run_folder.resume import with_defaults
from sslkit.errors import UserError
from sslkit.recipe.resolve import build_recipe, changes, load_recipe, load_saved

NOTHING = ViewParams((0, 0, 8, 8), None, (0, 1, 2, 3), False, 0.0, False, False, 0.0, None)
NUMBERS = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}
DRAWS = 4000


def policy(name: str, **changes: object) -> ViewsConfig:
    return ViewsConfig.of_policy(name, **changes)


def finish_on_device(pixels: NDArray[np.uint8], draw: ViewParams, config: ViewsConfig) -> NDArray[np.uint8]:
    plan = plan_views([draw.as_row()[None]], [config], [len(pixels)])
    return finish_view(torch.from_numpy(pixels)[None], plan.packed, plan.views[0], config)[0].numpy()


def one_step(name: str, factor: float) -> ViewParams:
    """A draw that changes one thing."""
    if name == "gray":
        return replace(NOTHING, gray=True)
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[NUMBERS[name]] = factor
    return replace(NOTHING, jitter=tuple(factors))


@pytest.mark.parametrize("step", VALUES["ops"])
def test_each_step_is_tensorflows(step: str) -> None:
    name, factor = (*step.split(), "0")[:2]
    pixels, config = golden.rough(4, 5), policy("simclr")
    expected = np.clip(np.reshape(VALUES["ops"][step], (4, 5, -1)), 0, 1)
    draw = one_step(name, float(factor))
    cpu = tensorflow_views.change_colours(pixels, draw, config, 255.0) / 255
    assert np.abs(cpu - expected).max() < 2e-5
    assert np.abs(finish_on_device(pixels, draw, config) / 255 - expected).max() < 0.5 / 255 + 2e-5
    exact = getattr(golden, name)(pixels / 255, *([float(factor)] if name != "gray" else []))
    assert np.abs(np.clip(exact, 0, 1) - expected).max() < 2e-5


@pytest.mark.parametrize("case", VALUES["resize"])
def test_resizing_is_tensorflows(case: str) -> None:
    height, width, side, kind, interpolation = case.split()
    pixels, new = golden.rough(int(height), int(width)), int(side)
    expected = np.reshape(VALUES["resize"][case], (new, new, 3))
    turned = tensorflow_views.resize_by_taps(pixels, new, interpolation, legacy=kind == "tensorflow_v1")
    assert np.abs(turned.transpose(1, 0, 2) - expected.clip(0)).max() < 2e-3
    assert np.abs(resize(pixels, new, interpolation, kind) - expected.clip(0, 255)).max() < 0.502
    deep = resize_channels(np.repeat(pixels, 2, axis=2).astype(np.uint16) * 257, new, interpolation, kind)
    assert np.abs(deep[..., ::2] / 257 - expected.clip(0, 255)).max() < 0.01
    # TensorFlow looks weights up in a table of 1024 steps.
    assert np.abs(golden.resize(pixels.astype(float), new, kind, interpolation) - expected).max() < 0.5


@pytest.mark.parametrize("sigma", VALUES["blur"])
def test_blur_is_simclrs(sigma: str) -> None:
    """The corner of a blurred image: the zeros beyond the edges, and the kernel's cut at a tenth of the side."""
    pixels = golden.rough(60, 60)
    expected = np.reshape(VALUES["blur"][sigma], (2, 6, 3))
    draw = replace(NOTHING, sigma=float(sigma))
    found = tensorflow_views.change_colours(pixels, draw, policy("simclr"), 255.0)[:2, :6] / 255
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(finish_on_device(pixels, draw, policy("simclr"))[:2, :6] / 255 - expected).max() < 0.51 / 255
    assert np.abs(golden.blur(pixels / 255, float(sigma))[:2, :6] - expected).max() < 2e-5


COMPOSED = {
    "simclr": replace(NOTHING, jitter=(1.3, 0.6, 1.6, 0.11), order=(2, 0, 3, 1), sigma=1.3),
    "byol": replace(NOTHING, jitter=(-0.22, 1.4, 0.85, -0.07), order=(1, 3, 0, 2), sigma=1.3, solarize=True),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_whole_view_is_the_official_codes(name: str) -> None:
    image, config = golden.smooth(48, 64), policy(name, size=40)
    draw = replace(COMPOSED[name], box=(5, 9, 36, 41), flip=True)
    expected = np.reshape(VALUES[name], (8, 8, 3)) * 255
    pipeline = ViewPipeline(config, 0)
    crop = pipeline.crop(image, draw, 0)
    for found in (pipeline.finish(crop, draw, (0, 0, 0, 0)), finish_on_device(crop, draw, config)):
        assert np.abs(found[::5, ::5] - expected).max() < 1.5  # the crop's rounding, times the factors, and the view's
        assert np.abs(found[::5, ::5] - expected).mean() < 0.5
    assert np.abs(golden.view(image, draw, 40, name)[::5, ::5] * 255 - expected).max() < 0.1


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_views_are_the_transcriptions_but_for_rounding(name: str) -> None:
    """Whole views of a photograph, with everything as drawn: CPU and device beside float64 without any rounding."""
    image, config = photograph(), policy(name, size=48)
    pipeline, cpu, device = ViewPipeline(config, 1), [], []
    for sample in range(10):
        draw = pipeline.view_params(0, sample, image.shape[:2])[sample % 2]
        expected = golden.view(image, draw, 48, name) * 255
        crop = pipeline.crop(image, draw, 0)
        cpu.append(np.abs(pipeline.finish(crop, draw, (0, 0, 0, 0)) - expected))
        device.append(np.abs(finish_on_device(crop, draw, config) - expected))
    for off in (np.stack(cpu), np.stack(device)):
        assert off.mean() < 0.35  # 0.25 is what rounding a uniform number to a whole one costs
        assert np.quantile(off, 0.999) < 2.5


def photograph() -> NDArray[np.uint8]:
    return np.ascontiguousarray(load_sample_images().images[0][:375, :500])


@pytest.mark.full
@pytest.mark.parametrize("size", VALUES["crops"])
def test_simclrs_crops_are_distributed_as_tensorflows(size: str) -> None:
    height, width = map(int, size.split())
    expected: dict[str, Any] = VALUES["crops"][size]
    draws = DRAWS if expected["whole"] < 1 else 100
    boxes = np.array([draw_params(policy("simclr"), (0, 0, sample, 0), (height, width)).box for sample in range(draws)])
    top, left, tall, wide = boxes.T
    share, aspect = tall * wide / (height * width), wide / tall
    assert (top + tall).max() <= height
    assert (left + wide).max() <= width
    assert share.min() >= 0.1  # min_object_covered, above the 0.08 of crop_scale
    assert abs(share.mean() - expected["share_mean"]) < 0.012
    assert np.abs(np.quantile(share, [0.1, 0.3, 0.5, 0.7, 0.9]) - expected["share_deciles"]).max() < 0.025
    assert np.abs(np.quantile(aspect, [0.1, 0.3, 0.5, 0.7, 0.9]) - expected["aspect_deciles"]).max() < 0.02
    assert abs((top / height).mean() - expected["top_mean"]) < 0.012
    assert abs((left / width).mean() - expected["left_mean"]) < 0.015
    assert abs((share == 1).mean() - expected["whole"]) < 0.005


@pytest.mark.full
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (50, 1000), (224, 224)])
def test_byols_crops_are_clamped(size: tuple[int, int]) -> None:
    """Their mean share and sides beside an integral over a grid of areas and ratios."""
    height, width = size
    area = np.linspace(0.08, 1.0, 301)[:, None] * height * width
    ratio = np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), 301))
    tall, wide = np.minimum(np.sqrt(area / ratio), height), np.minimum(np.sqrt(area * ratio), width)
    boxes = np.array([draw_params(policy("byol"), (0, 0, sample, 0), size).box for sample in range(DRAWS)])
    assert abs(boxes[:, 2].mean() / tall.mean() - 1) < 0.02
    assert abs(boxes[:, 3].mean() / wide.mean() - 1) < 0.02
    assert abs((boxes[:, 2] * boxes[:, 3] / (tall * wide).mean()).mean() - 1) < 0.03
    assert abs((boxes[:, 2] == height).mean() - (np.sqrt(area / ratio) >= height - 0.5).mean()) < 0.025
    assert (boxes[:, 0] + boxes[:, 2]).max() == height  # the lower edge is reached, which TensorFlow's never is
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


@pytest.mark.parametrize("name", ["simclr", "byol"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 900), (900, 1)])
def test_boxes_of_tiny_images_lie_inside(name: str, size: tuple[int, int]) -> None:
    for sample in range(30):
        top, left, tall, wide = draw_params(policy(name), (0, 0, sample, 0), size).box
        assert 0 <= top <= size[0] - tall < size[0]
        assert 0 <= left <= size[1] - wide < size[1]


def test_small_crops_may_cover_less_than_min_object_covered() -> None:
    local = policy("simclr", small_crops=2, small_scale=(0.05, 0.09)).policy_of("local")
    boxes = np.array([draw_params(local, (0, 0, sample, 2), (375, 500)).box for sample in range(200)])
    share = boxes[:, 2] * boxes[:, 3] / (375 * 500)
    assert 0.049 < share.min() < 0.06 < 0.08 < share.max() < 0.091


def test_large_jpegs_are_decoded_whole_for_views_that_are_not_antialiased() -> None:
    assert ViewPipeline(policy("simclr"), 0).reduction(0, 0, (3000, 4000)) == 1
    assert ViewPipeline(policy("simclr", resize="antialias"), 0).reduction(0, 0, (3000, 4000)) > 1


RESOLVED = {  # what a run's recipe stated before these policies followed TensorFlow
    "policy": "simclr", "size": 32, "crop_scale": [0.08, 1.0], "small_crops": 0, "small_size": 96,
    "small_scale": [0.05, 0.14], "crop_ratio": [0.75, 1.3333333333333333], "interpolation": "bicubic",
    "jitter": [0.8, 0.8, 0.8, 0.2], "jitter_prob": 0.8, "gray_prob": 0.2, "gray_first": False, "blur_prob": 0.5,
    "blur_sigma": [0.1, 2.0], "solarize_prob": 0.0, "flip_prob": 0.5, "rotate_degrees": 0.0, "erase_prob": 0.0,
    "erase_scale": [0.05, 0.2], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "crop_pct": 0.875, "device": "cpu",
}  # fmt: skip


TABLES = {"method": {"name": "simclr"}, "backbone": {"name": "test_vit"}, "data": {"path": "x", "background": "white"}}
EARLIER, NOW = ("torchvision", "torchvision", "antialias"), ("tensorflow", "tensorflow", "tensorflow_v1")


def kinds_of(views: ViewsConfig) -> tuple[str, str, str]:
    return views.transforms, views.crop_sampler, views.resize


def test_recipes_of_earlier_runs_keep_their_views(tmp_path: Path) -> None:
    """Those that lie in a run's folder, however they are read; and what is said then gives the paper's views."""
    old, shipped = {**TABLES, "views": RESOLVED}, build_recipe({**TABLES, "views": {"policy": "simclr", "size": 32}})
    assert [line.partition(":")[0] for line in changes(with_defaults(old), shipped.as_tables())] == [
        f"views.{key}" for key in ("crop_sampler", "resize", "transforms")
    ]
    assert kinds_of(shipped.views) == NOW
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(old))
    (tmp_path / "checkpoints").mkdir()
    for recipe in (load_saved(file), load_recipe(file), load_recipe(str(file), ["data.path=y"])):
        assert kinds_of(recipe.views) == EARLIER
        [said] = recipe.remarks
        stated = tomllib.loads(said.partition(" with ")[2].replace(", ", "\n"))
        assert kinds_of(build_recipe({**old, "views": {**RESOLVED, **stated}}).views) == NOW
    assert not shipped.remarks


@pytest.mark.parametrize("name", ["mine.toml", "recipe.toml"])
def test_a_recipe_of_a_users_own_has_the_papers_views(name: str, tmp_path: Path) -> None:
    """Though it states all that a run stated before; the remark names the keys of the others."""
    file = tmp_path / name
    file.write_text(tomli_w.dumps({**TABLES, "views": RESOLVED}))
    recipe = load_recipe(file)
    assert kinds_of(recipe.views) == NOW
    [said] = recipe.remarks
    stated = tomllib.loads(said.partition(", set ")[2].replace(", ", "\n"))
    assert kinds_of(build_recipe({**TABLES, "views": {**RESOLVED, **stated}}).views) == EARLIER
    assert not build_recipe(recipe.as_tables()).remarks


def test_crops_that_min_object_covered_never_takes_are_refused() -> None:
    tables = {"method": {"name": "simclr"}, "backbone": {"name": "test_vit"}, "data": {"path": "x"}}
    with pytest.raises(
        UserError, match=r"\[views\] min_object_covered: must be at most crop_scale's upper number, 0\.09"
    ):
        build_recipe({**tables, "views": {"crop_scale": [0.05, 0.09]}})
    assert build_recipe({**tables, "views": {"crop_scale": [0.05, 0.09], "min_object_covered": 0.0}})


@pytest.mark.parametrize("name", ["simclr_r50", "simclr_cifar10", "byol_r50", "byol_r50_300ep"])
def test_shipped_recipes_have_their_policys_kinds(name: str) -> None:
    views = load_recipe(name).views
    kinds = ("crop_sampler", "min_object_covered", "interpolation", "resize", "transforms", "brightness")
    assert {key: getattr(views, key) for key in kinds} == {key: getattr(policy(views.policy), key) for key in kinds}
