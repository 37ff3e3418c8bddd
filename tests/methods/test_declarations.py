"""What methods declare and recipes are held to: views by role, and the papers' numbers by length and batch."""

import ast
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from conftest import cli_error

from sslkit.errors import UserError
from sslkit.methods import METHODS, Method
from sslkit.methods.base import ViewCount
from sslkit.methods.simclr import SimCLR
from sslkit.recipe.resolve import Recipe, build_recipe

Tables = dict[str, dict[str, Any]]


def resolve(method: str, model: str = "resnet50", /, **tables: dict[str, Any]) -> Recipe:
    base: Tables = {"method": {"name": method}, "backbone": {"name": model}, "data": {"path": "x"}}
    return build_recipe({name: {**base.get(name, {}), **tables.get(name, {})} for name in {**base, **tables}})


def declaring(views: Mapping[str, ViewCount]) -> type[Method]:
    class Declared(SimCLR):
        pass

    Declared.views = views
    return Declared


class Silent(SimCLR):
    """A method from another package that says nothing of its views."""

    views: ClassVar[Mapping[str, ViewCount]] = Method.views


@pytest.mark.parametrize("name", [name for name in METHODS if name != "swav"])
def test_small_crops_with_a_method_of_two_views(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name, views={"small_crops": 6})
    assert str(caught.value) == f"recipe [views.local] count: 6, but {name} takes no local views; set it to 0"
    with pytest.raises(UserError) as caught:
        resolve(name, views={"policy": "swav"})
    sentence = f"recipe [views.local] count: 6 (of policy 'swav'), but {name} takes no local views; set it to 0"
    assert str(caught.value) == sentence
    assert resolve(name, views={"policy": "swav", "small_crops": 0}).views.local.count == 0


def test_the_command_line_says_it_in_one_sentence() -> None:
    said = cli_error(["pretrain", "mocov2_r50", "--set", "views.small_crops=4"])
    assert said == "sslkit: mocov2_r50 [views.local] count: 4, but moco_v2 takes no local views; set it to 0"


def test_a_method_of_another_package_is_told_what_to_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("resolve", "cross_checks"):
        monkeypatch.setattr(f"sslkit.recipe.{module}.find_method", lambda name: Silent)
    with pytest.raises(UserError) as caught:
        resolve("simclr", views={"small_crops": 6})
    start, _, advice = str(caught.value).partition("declare views = ")
    assert start.endswith("takes no local views; set it to 0. If it takes them, ")
    views, _, name = advice.partition(" in ")
    assert name == "Silent"
    for module in ("resolve", "cross_checks"):
        monkeypatch.setattr(f"sslkit.recipe.{module}.find_method", lambda name: declaring(ast.literal_eval(views)))
    assert resolve("simclr", views={"small_crops": 6}).views.local.count == 6


@pytest.mark.parametrize("small_crops", [0, 1, 6])
def test_swav_takes_any_number_of_small_crops(small_crops: int) -> None:
    assert resolve("swav", views={"small_crops": small_crops}).views.local.count == small_crops


DECLARED: list[tuple[Mapping[str, ViewCount], int, str]] = [
    ({"global": 2}, 0, ""),
    ({"global": 2}, 1, "takes no local views; set it to 0"),
    ({"global": (1, 2)}, 0, ""),
    ({"global": 2, "local": 4}, 4, ""),
    ({"global": 2, "local": 4}, 0, "takes 4 local views; set it to 4"),
    ({"global": 2, "local": (2, None)}, 0, "takes 2 or more local views; set it to 2"),
    ({"global": 2, "local": (2, None)}, 9, ""),
    ({"global": 2, "local": (2, 8)}, 9, "takes 2 to 8 local views; set it to 8"),
    ({"global": 2, "local": (2, 8)}, 1, "takes 2 to 8 local views; set it to 2"),
    ({"global": 3}, 0, "takes 3 global views, but sslkit makes 2 of each image"),
    ({"local": 4}, 4, "takes 0 global views, but sslkit makes 2 of each image"),
    ({"global": 2, "masked": 1}, 0, "declares views of role 'masked'; the roles are ('global', 'local')"),
]


@pytest.mark.parametrize(("views", "small_crops", "mistake"), DECLARED)
def test_methods_of_other_packages(
    views: Mapping[str, ViewCount], small_crops: int, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "simclr", declaring(views))
    if not mistake:
        assert resolve("simclr", views={"small_crops": small_crops}).views.local.count == small_crops
        return
    with pytest.raises(UserError) as caught:
        resolve("simclr", views={"small_crops": small_crops})
    assert mistake in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_that_says_nothing_takes_two_global_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "simclr", Silent)
    assert resolve("simclr").views.local.count == 0
    with pytest.raises(UserError, match="takes no local views"):
        resolve("simclr", views={"small_crops": 2})


# Method, length or batch -> rate, decay, momentum, BN groups; from the papers' code, section by section.
RUNS: list[tuple[str, dict[str, int], tuple[float, float, float | None, int | None]]] = [
    ("moco_v3", {}, (0.6, 1e-6, 0.99, None)),
    ("moco_v3", {"epochs": 100}, (0.6, 1e-6, 0.99, None)),
    ("moco_v3", {"epochs": 300}, (0.3, 1e-6, 0.99, None)),
    ("moco_v3", {"epochs": 1000}, (0.3, 1.5e-6, 0.996, None)),
    ("byol", {}, (0.2, 1.5e-6, 0.996, None)),
    ("byol", {"epochs": 40}, (0.45, 1e-6, 0.97, None)),
    ("byol", {"epochs": 100}, (0.45, 1e-6, 0.99, None)),
    ("byol", {"epochs": 300}, (0.3, 1e-6, 0.99, None)),
    ("byol", {"epochs": 1000}, (0.2, 1.5e-6, 0.996, None)),
    ("swav", {}, (4.8, 1e-6, None, 8)),
    ("swav", {"batch_size": 256}, (0.6, 1e-6, None, 1)),
    ("moco_v2", {"epochs": 800}, (0.03, 1e-4, 0.999, 8)),
    ("simclr", {"epochs": 1000}, (0.3, 1e-6, None, None)),
]


@pytest.mark.parametrize(("method", "train", "numbers"), RUNS)
def test_the_numbers_of_the_papers_run_of_this_length(
    method: str, train: dict[str, int], numbers: tuple[float, float, float | None, int | None]
) -> None:
    recipe = resolve(method, train=train)
    options = recipe.method.model_dump()
    found = (recipe.optim.lr, recipe.optim.weight_decay, options.get("momentum"), options.get("bn_groups"))
    assert found == numbers
    assert recipe.remarks == ()


def test_swavs_run_at_batch_256() -> None:
    recipe = resolve("swav", train={"batch_size": 256})
    options = recipe.method.model_dump()
    assert (options["queue_size"], options["freeze_prototypes_steps"]) == (3840, 5005)
    assert (recipe.schedule.warmup_epochs, recipe.peak_lr) == (0, 0.6)


REMARKS: list[tuple[str, Tables, list[str]]] = [
    (
        "moco_v3",
        {"train": {"epochs": 50}},
        ["[optim] lr = 0.6", "momentum = 0.99", "100, 300, 1000", "the paper's for 100"],
    ),
    ("moco_v3", {"train": {"epochs": 50}, "optim": {"lr": 0.5, "weight_decay": 0}}, ["[method] momentum = 0.99 is"]),
    (
        "byol",
        {"train": {"epochs": 200}},
        ["[train] epochs = 200", "lr = 0.2", "momentum = 0.996", "the paper's for 1000"],
    ),
    ("swav", {"train": {"batch_size": 512}}, ["[train] batch_size = 512", "lr = 4.8", "the paper's for 4096"]),
    ("moco_v1", {"train": {"epochs": 100}}, ["[schedule] milestones = [120, 160]"]),
    ("instdisc", {"train": {"epochs": 100}}, ["[schedule] milestones = [120, 160]"]),
    ("swav", {"method": {"queue_size": 5000}}, ["5000 is not a multiple", "batch_size = 4096", "4096 rows are used"]),
    ("swav", {"method": {"queue_size": 3840}}, ["3840 is not a multiple", "no queue is used"]),
]


@pytest.mark.parametrize(("method", "tables", "words"), REMARKS)
def test_numbers_of_another_run_are_named(method: str, tables: Tables, words: list[str]) -> None:
    (remark,) = resolve(method, **tables).remarks
    assert [word for word in words if word not in remark] == []


SILENT: list[tuple[str, str, Tables]] = [
    ("moco_v3", "vit_base_patch16_224", {"train": {"epochs": 100}}),
    ("moco_v1", "resnet50", {"train": {"epochs": 100}, "schedule": {"decay": "cosine"}}),
    ("byol", "resnet50", {"train": {"epochs": 20}, "optim": {"lr": 1, "weight_decay": 0}, "method": {"momentum": 0.9}}),
]


@pytest.mark.parametrize(("method", "model", "tables"), SILENT)
def test_nothing_is_said_of_numbers_that_fit_or_were_given(method: str, model: str, tables: Tables) -> None:
    assert resolve(method, model, **tables).remarks == ()


def test_a_resolved_recipe_has_nothing_to_remark() -> None:
    recipe = resolve("byol", train={"epochs": 200})
    assert recipe.remarks
    again = build_recipe(recipe.as_tables())
    assert again == recipe
    assert again.remarks == ()
