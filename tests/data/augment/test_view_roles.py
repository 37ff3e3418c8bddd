"""``[views]`` by role: which values the views of each role have, from every way to write them."""

import tomllib
from typing import Any

import pytest

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.parameters import draw_params
from sslkit.data.augment.view_layers import layer_views
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.errors import UserError
from sslkit.recipe.resolve import Recipe, build_recipe, changes

TABLES = {"method": {"name": "swav"}, "backbone": {"name": "test_resnet"}, "data": {"path": "x"}}


def recipe(overrides: list[str] | None = None, **views: Any) -> Recipe:
    return build_recipe({**TABLES, "views": views}, overrides)


def by_role(views: ViewsConfig, key: str) -> tuple[Any, ...]:
    return tuple(getattr(views.policy_of(role), key) for role in ("global1", "global2", "local"))


# Views, then a key, then its values for global1, global2 and local.
WRITTEN: list[tuple[dict[str, Any], list[str], str, tuple[Any, ...]]] = [
    ({}, [], "blur_prob", (0.5, 0.5, 0.5)),
    ({"blur_prob": 0.3}, [], "blur_prob", (0.3, 0.3, 0.3)),
    ({"blur_prob": 0.3, "global1": {"blur_prob": 1.0}}, [], "blur_prob", (1.0, 0.3, 0.3)),
    ({"blur_prob": 0.3, "local": {"blur_prob": 0.6}}, [], "blur_prob", (0.3, 0.3, 0.6)),
    ({"global2": {"flip_prob": 0.0}}, [], "flip_prob", (0.5, 0.0, 0.5)),
    # A pair is what earlier versions had: the first view, then all others.
    ({"blur_prob": [1.0, 0.1]}, [], "blur_prob", (1.0, 0.1, 0.1)),
    ({"blur_prob": [1.0, 0.1], "local": {"blur_prob": 0.5}}, [], "blur_prob", (1.0, 0.1, 0.5)),
    # A value for all views replaces what the policy or the file has for a role.
    ({"policy": "byol"}, [], "blur_prob", (1.0, 0.1, 0.1)),
    ({"policy": "byol"}, [], "solarize_prob", (0.0, 0.2, 0.2)),
    ({"policy": "byol", "blur_prob": 0.4}, [], "blur_prob", (0.4, 0.4, 0.4)),
    ({"policy": "byol", "blur_prob": 0.4}, [], "solarize_prob", (0.0, 0.2, 0.2)),
    ({"policy": "byol", "global2": {"blur_prob": 0.4}, "small_crops": 1}, [], "blur_prob", (1.0, 0.4, 0.1)),
    ({"global1": {"blur_prob": 1.0}}, ["views.blur_prob=0.2"], "blur_prob", (0.2, 0.2, 0.2)),
    ({"blur_prob": 0.2}, ["views.global1.blur_prob=1.0"], "blur_prob", (1.0, 0.2, 0.2)),
    ({"blur_prob": 0.2}, ["views.blur_prob=[0.7, 0.6]"], "blur_prob", (0.7, 0.6, 0.6)),
    # Local views have a side and a scale of their own.
    ({"size": 128, "crop_scale": [0.3, 1.0]}, [], "size", (128, 128, 96)),
    ({"size": 128, "crop_scale": [0.3, 1.0]}, [], "crop_scale", ((0.3, 1.0), (0.3, 1.0), (0.05, 0.14))),
    ({"local": {"size": 64}}, ["views.size=160"], "size", (160, 160, 64)),
    ({"local": {"size": 64}}, ["views.small_size=48"], "size", (224, 224, 48)),
    ({"small_size": 64, "small_scale": [0.1, 0.2]}, [], "size", (224, 224, 64)),
    ({"small_size": 64, "small_scale": [0.1, 0.2]}, [], "crop_scale", ((0.14, 1.0), (0.14, 1.0), (0.1, 0.2))),
]


@pytest.mark.parametrize(("views", "overrides", "key", "expected"), WRITTEN)
def test_values_of_each_role(views: dict[str, Any], overrides: list[str], key: str, expected: tuple[Any, ...]) -> None:
    resolved = recipe(overrides, **views)
    assert by_role(resolved.views, key) == expected
    again = build_recipe(tomllib.loads(resolved.to_toml()))
    assert again == resolved
    assert again.views.view_policies() == resolved.views.view_policies()


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"small_crops": 2, "small_size": 64}, {"local": {"count": 2, "size": 64}}),
    ({"blur_prob": [1.0, 0.1]}, {"global1": {"blur_prob": 1.0}, "blur_prob": 0.1}),
    ({"blur_prob": [0.4, 0.4]}, {"blur_prob": 0.4}),
    ({"global1": {"blur_prob": 0.5}}, {}),  # as [views] has it
    ({"blur_prob": 0.1, "local": {"blur_prob": 0.6}}, {"blur_prob": [0.1, 0.6], "global2": {"blur_prob": 0.1}}),
    (
        {"small_crops": 0, "blur_prob": [1.0, 0.1]},
        {"local": {"count": 0}, "blur_prob": 0.9, "global1": {"blur_prob": 1.0}, "global2": {"blur_prob": 0.1}},
    ),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_views_are_equal_recipes(one: dict[str, Any], other: dict[str, Any]) -> None:
    """However they are written, so that a run continues with either."""
    assert changes(recipe(**one).as_tables(), recipe(**other).as_tables()) == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"small_crops": 2, "local": {"count": 3}}, "small_crops: earlier name of [views.local] count, which is given"),
    ({"global1": {"size": 96}}, "size: both global views have [views] size; leave it out"),
    ({"global1": {"blur_prop": 0.5}}, "[views.global1] blur_prop: unknown key; did you mean 'blur_prob'?"),
    ({"local": {"number": 6}}, "[views.local] number: unknown key"),
    ({"global2": {"blur_prob": 1.5}}, "[views.global2] blur_prob: must be 1 or less, not 1.5"),
    ({"global2": {"crop_scale": [0.9, 0.1]}}, "[views.global2] crop_scale: must be two positive numbers"),
    ({"global2": 0.5}, "[views] global2: input should be a valid dictionary"),
    ({"blur_prob": [0.1, 0.2, 0.3]}, "[views] blur_prob: must be a number"),
    ({"crop_sampler": "none"}, "crop_sampler: 'none' is for a pipeline file that crops"),
    (
        {"policy": "simclr", "global2": {"crop_scale": [0.01, 0.05]}},
        "min_object_covered: must be at most crop_scale's upper number, 0.05, not 0.1",
    ),
]


@pytest.mark.parametrize(("views", "message"), REFUSED)
def test_refused(views: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(**views)
    assert len(caught.value.messages) == 1
    assert message in str(caught.value)


def test_difference_in_one_role_is_named_by_its_key() -> None:
    before, after = recipe(global1={"blur_prob": 1.0}), recipe(global1={"blur_prob": 0.9})
    assert changes(before.as_tables(), after.as_tables()) == ["views.global1.blur_prob: 1.0 -> 0.9"]


DINO = {
    "policy": "byol",
    "transforms": "torchvision",
    "crop_scale": [0.4, 1.0],
    "global1": {"blur_prob": 1.0, "solarize_prob": 0.0},
    "global2": {"blur_prob": 0.1, "solarize_prob": 0.2},
    "local": {"count": 8, "crop_scale": [0.05, 0.4], "blur_prob": 0.5, "solarize_prob": 0.0},
}


def test_views_of_dino() -> None:
    """Global views as BYOL's; eight local ones, blurred half the time and never solarized (arXiv:2104.14294)."""
    views = recipe(**DINO).views
    assert views.counts() == {"global": 2, "local": 8}
    assert by_role(views, "blur_prob") == (1.0, 0.1, 0.5)
    assert by_role(views, "solarize_prob") == (0.0, 0.2, 0.0)
    assert by_role(views, "crop_scale") == ((0.4, 1.0), (0.4, 1.0), (0.05, 0.4))
    assert ViewPipeline(views, 0).sides == [224, 224] + [96] * 8
    drawn = {
        role: [draw_params(views.policy_of(role), (0, 0, sample, 0), (300, 300)) for sample in range(1000)]
        for role in ("global1", "global2", "local")
    }
    blurred = [sum(params.sigma > 0 for params in drawn[role]) for role in drawn]
    solarized = [sum(params.solarize for params in drawn[role]) for role in drawn]
    assert blurred == pytest.approx([1000, 100, 500], abs=50)
    assert solarized == pytest.approx([0, 200, 0], abs=40)


def test_layers_are_left_as_they_were() -> None:
    policy, given = {"local": {"count": 6}, "blur_prob": 0.5}, {"blur_prob": 0.1, "small_crops": 1}
    assert layer_views(policy, given) == {"local": {"count": 1}, "blur_prob": 0.1}
    assert policy == {"local": {"count": 6}, "blur_prob": 0.5}
    assert given == {"blur_prob": 0.1, "small_crops": 1}


RESOLVED_BYOL = {  # what the recipe of a run stated before there were roles
    "policy": "byol", "size": 224, "crop_scale": [0.08, 1.0], "small_crops": 0, "small_size": 96,
    "small_scale": [0.05, 0.14], "crop_ratio": [0.75, 1.3333333333333333], "crop_sampler": "clamped",
    "min_object_covered": 0.1, "interpolation": "bicubic", "resize": "tensorflow", "transforms": "tensorflow",
    "brightness": "add", "jitter": [0.4, 0.4, 0.2, 0.1], "jitter_prob": 0.8, "gray_prob": 0.2, "gray_first": False,
    "blur_prob": [1.0, 0.1], "blur_sigma": [0.1, 2.0], "solarize_prob": [0.0, 0.2], "flip_prob": 0.5,
    "rotate_degrees": 0.0, "erase_prob": 0.0, "erase_scale": [0.05, 0.2], "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225], "crop_pct": 0.875, "device": "cpu",
}  # fmt: skip


def test_runs_of_earlier_versions_keep_their_views() -> None:
    tables = {"method": {"name": "byol"}, "backbone": {"name": "test_resnet"}, "data": {"path": "x"}}
    saved, shipped = build_recipe({**tables, "views": RESOLVED_BYOL}), build_recipe(tables)
    assert changes(saved.as_tables(), shipped.as_tables()) == []
    # A resolved recipe states everything: nothing comes from the policy.
    plain = build_recipe({**tables, "views": {**RESOLVED_BYOL, "blur_prob": 0.1, "solarize_prob": 0.0}}).views
    assert by_role(plain, "blur_prob") == (0.1, 0.1, 0.1)
    assert by_role(plain, "solarize_prob") == (0.0, 0.0, 0.0)
