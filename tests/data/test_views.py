"""View policies by their statistics over many draws, and every draw as a function of its key."""

from itertools import pairwise

import albumentations as A  # noqa: N812
import numpy as np
import pytest
from numpy.typing import NDArray

from sslkit.data.loader import ViewDataset
from sslkit.data.source import DataConfig, open_source
from sslkit.data.views import POLICIES, ViewPipeline, ViewsConfig, build_pipeline

DRAWS = 2000


def policy(name: str, **changes: object) -> ViewsConfig:
    return ViewsConfig(**{"policy": name, **POLICIES[name], "size": 32, **changes})


def rates(name: str, view: int) -> dict[str, float]:
    """How often each transform really fired, counted by wrapping it."""
    pipeline = ViewPipeline(policy(name), seed=0)
    fired: dict[str, int] = {}
    for transform in pipeline.pipelines[view].transforms:
        kind = type(transform).__name__
        fired[kind] = 0
        draw_params = transform.get_params  # called exactly when the transform is applied

        def counted(kind: str = kind, draw_params: object = draw_params) -> object:
            fired[kind] += 1
            return draw_params()  # type: ignore[operator]

        transform.get_params = counted
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for sample in range(DRAWS):
        pipeline.cut(image, 0, sample, view)
    return {kind: count / DRAWS for kind, count in fired.items()}


PAPERS = {
    ("moco_v1", 0): {"ToGray": 0.2, "ColorJitter": 1.0, "HorizontalFlip": 0.5, "RandomResizedCrop": 1.0},
    ("moco_v2", 0): {
        "ColorJitter": 0.8,
        "ToGray": 0.2,
        "GaussianBlur": 0.5,
        "HorizontalFlip": 0.5,
        "RandomResizedCrop": 1.0,
    },
    ("moco_v3", 0): {
        "ColorJitter": 0.8,
        "ToGray": 0.2,
        "GaussianBlur": 1.0,
        "HorizontalFlip": 0.5,
        "RandomResizedCrop": 1.0,
    },
    ("moco_v3", 1): {
        "ColorJitter": 0.8,
        "ToGray": 0.2,
        "GaussianBlur": 0.1,
        "Solarize": 0.2,
        "HorizontalFlip": 0.5,
        "RandomResizedCrop": 1.0,
    },
}


@pytest.mark.parametrize(("name", "view"), PAPERS)
def test_transforms_fire_as_often_as_the_paper_says(name: str, view: int) -> None:
    measured = rates(name, view)
    expected = PAPERS[name, view]
    assert measured.keys() == expected.keys()
    for kind, rate in expected.items():
        assert abs(measured[kind] - rate) <= 3 * np.sqrt(rate * (1 - rate) / DRAWS), kind


def test_order_of_v1_puts_gray_before_jitter() -> None:
    def order(name: str) -> list[str]:
        return [type(step).__name__ for step in build_pipeline(policy(name), 1).transforms]

    assert order("moco_v1") == ["RandomResizedCrop", "ToGray", "ColorJitter", "HorizontalFlip"]
    assert order("moco_v3") == [
        *("RandomResizedCrop", "ColorJitter", "ToGray", "GaussianBlur", "Solarize", "HorizontalFlip")
    ]


def test_crop_areas_stay_within_the_scale() -> None:
    """Blank gradients tell which part of the image a crop took."""
    ys, xs = np.mgrid[0:200, 0:200].astype(np.uint8)
    image = np.stack([ys, xs, np.zeros_like(xs)], axis=2)
    bare = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "flip_prob": 0.0, "solarize_prob": 0.0}
    pipeline = ViewPipeline(policy("moco_v2", **bare, size=100), seed=0)
    areas = []
    for sample in range(400):
        view = pipeline.cut(image, 0, sample, 0).astype(float)
        height, width = (np.ptp(view[..., axis]) * 100 / 99 + 1 for axis in (0, 1))
        areas.append(height * width / 200**2)
    assert min(areas) > 0.17
    assert max(areas) <= 1.06
    assert abs(np.mean(areas) - 0.58) < 0.05  # uniform on (0.2, 1), large wide crops refused and redrawn


def test_shrinking_is_antialiased() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    bare = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "flip_prob": 0.0, "crop_scale": (1.0, 1.0)}
    view = ViewPipeline(policy("moco_v2", **bare), seed=0).cut(noise, 0, 0, 0)
    assert view.std() < 12  # 37 without antialiasing, 9 by area


def test_solarize_inverts_from_128_up() -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(8, axis=0)
    solarize = next(step for step in build_pipeline(policy("moco_v3"), 1) if isinstance(step, A.Solarize))
    out = A.Compose([A.Solarize(threshold_range=solarize.threshold_range, p=1)])(image=image)["image"][0, :, 0]
    assert out.tolist() == [value if value < 128 else 255 - value for value in range(256)]


def test_unknown_arguments_of_a_transform_are_errors() -> None:
    with pytest.warns(UserWarning, match="threshold"):
        A.Solarize(threshold=128)  # albumentations itself only warns
    broken = ViewsConfig(**{"policy": "moco_v3", **POLICIES["moco_v3"]}).model_copy(update={"blur_sigma": "wide"})
    with pytest.raises(Exception, match="sigma"):
        build_pipeline(broken, 0)


def gray_image() -> NDArray[np.uint8]:
    return open_source(DataConfig(path="builtin:fashion_mnist")).read(3)


def test_a_view_is_a_function_of_its_key_alone() -> None:
    image = gray_image()
    pipelines = [ViewPipeline(policy("moco_v3"), seed=7) for _ in range(2)]
    first = pipelines[0].cut(image, epoch=2, sample=11, view=1)
    for epoch, sample in ((0, 0), (5, 3)):
        pipelines[1](image, epoch, sample)
    assert np.array_equal(first, pipelines[1].cut(image, epoch=2, sample=11, view=1))


def test_views_differ_in_every_word_of_the_key() -> None:
    image = gray_image()
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    views = [
        ViewPipeline(policy("moco_v2"), seed).cut(image, epoch, sample, view) for seed, epoch, sample, view in keys
    ]
    assert all(not np.array_equal(a, b) for a, b in pairwise(views))
    assert len({view.tobytes() for view in views}) == len(keys)


def test_gray_pictures_become_three_channels() -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist"))
    views, sample, _ = ViewDataset(source, ViewPipeline(policy("moco_v2"), seed=0))[(0, 7)]
    assert sample == 7
    assert [(view.shape, view.dtype) for view in views] == [((32, 32, 3), np.uint8)] * 2


def test_multi_crop_has_six_small_views_of_small_parts() -> None:
    """SwAV: two crops of 14 to 100 % at 224 pixels, six of 5 to 14 % at 96; small ones share the second's chances."""
    config = ViewsConfig.model_validate({"policy": "swav", **POLICIES["swav"]})
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 3, axis=2).repeat(256, axis=0)
    plain = config.model_copy(update={"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "flip_prob": 0.0})
    views = ViewPipeline(plain, seed=0)(ramp, 0, 0)
    assert [view.shape[0] for view in views] == [224, 224] + [96] * 6
    pipeline = ViewPipeline(plain, seed=0)
    widths = [[np.ptp(pipeline.cut(ramp, 0, sample, view)[..., 0]) / 255 for sample in range(200)] for view in (0, 2)]
    # Width over the image's is the root of area times ratio: at most sqrt(0.14 * 4 / 3) for small crops.
    assert max(widths[1]) <= (0.14 * 4 / 3) ** 0.5 + 0.01
    assert min(widths[0]) >= (0.14 * 3 / 4) ** 0.5 - 0.02
    assert max(widths[0]) > 0.9
