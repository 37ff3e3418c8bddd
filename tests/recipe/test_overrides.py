"""Overrides as strings and as a dict: the same recipe, and one sentence for every mistake."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslkit.errors import UserError
from sslkit.recipe.overrides import Overrides, apply_overrides, stated_tables
from sslkit.recipe.resolve import build_recipe, load_recipe

BARE = {"method": {"name": "moco_v2"}, "backbone": {"name": "resnet50"}, "data": {"path": "photos"}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train.epochs": 7}, ["train.epochs=7"]),
        ({"train": {"epochs": np.int64(7)}, "optim.lr": np.float64(0.5)}, ["train.epochs=7", "optim.lr=0.5"]),
        ({"data.path": Path("other photos"), "train": {}}, ["data.path=other photos"]),
        ({"views.crop_scale": (0.5, 1.0)}, ["views.crop_scale=[0.5, 1.0]"]),
        ({"backbone": {"args": {"output_stride": 8}}}, ["backbone.args.output_stride=8"]),
        ({"views.global1.blur_prob": 1.0}, ["views.global1.blur_prob=1.0"]),
        ({"data": {"mix": [{"path": "a"}, {"path": Path("b")}], "path": ""}}, ["data.mix=[{path='a'},{path='b'}]"]),
    ],
)
def test_a_dict_and_words_give_one_recipe(given: dict[str, Any], words: list[str]) -> None:
    before = deepcopy(given)
    words = [*words, "data.path="] if "data.mix" in words[0] else words
    assert build_recipe(BARE, given) == build_recipe(BARE, words) != build_recipe(BARE)
    assert given == before


def test_the_rest_of_a_table_is_kept() -> None:
    tables: dict[str, Any] = {"train": {"epochs": 3, "seed": 5}, "backbone": {"args": {"in_chans": 4}}}
    apply_overrides(tables, {"train": {"epochs": 7}, "backbone.args.output_stride": 8})
    assert tables == {"train": {"epochs": 7, "seed": 5}, "backbone": {"args": {"in_chans": 4, "output_stride": 8}}}
    assert stated_tables({"train.epochs": 7, "train": {"seed": 1}}) == {"train": {"epochs": 7, "seed": 1}}


def test_views_of_a_role_and_of_all_in_any_order() -> None:
    """A value for all views replaces that of an earlier table for a role, but not one beside it."""
    inner = {"global1": {"blur_prob": 1.0}, "blur_prob": 0.25}
    recipes = [build_recipe(BARE, {"views": dict(items)}) for items in (inner.items(), reversed(inner.items()))]
    assert recipes[0] == recipes[1]
    assert (recipes[0].views.global1.blur_prob, recipes[0].views.blur_prob) == (1.0, 0.25)


def test_tables_are_a_recipe() -> None:
    flat = {"method.name": "moco_v2", "backbone.name": "resnet50", "data": {"path": "photos"}}
    assert load_recipe(flat, {"train.epochs": 7}) == build_recipe(BARE, ["train.epochs=7"])
    with pytest.raises(UserError, match=r"^recipe \[data\] path: missing"):
        load_recipe({"method.name": "moco_v2", "backbone.name": "resnet50"})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"train.epocs": 2}, "quickstart [train] epocs: unknown key; did you mean 'epochs'?"),
        ({"trian.epochs": 2}, "quickstart [trian]: unknown table; did you mean 'train'?"),
        ({"train.epochs": "2"}, "quickstart [train] epochs: must be a whole number, such as 10, not '2'"),
        ({"train": {"epochs": 2.5}}, "quickstart [train] epochs: must be a whole number, such as 10, not 2.5"),
        ({"optim.lr": -1}, "quickstart [optim] lr: must be 0 or more, not -1"),
        ({"epochs": 2}, "overrides 'epochs': write table.key, for example {\"train.epochs\": 10}"),
        ({"train": 2}, "overrides 'train': write table.key, for example {\"train.epochs\": 10}"),
        ({"train.": 1}, "overrides 'train.': keys are written as table.key, for example \"train.epochs\""),
        ({"train": {3: 1}}, 'overrides train 3: keys are written as table.key, for example "train.epochs"'),
        ({"train.epochs": None}, "overrides train.epochs: must be a number, a string, a list or a dict, not None"),
        ({"data": {"path": {"x": 1}}}, "overrides data.path: is not a table but 'builtin:fashion_mnist'"),
        ({"a.b": 1, "a.b.c": 2}, "overrides a.b: is not a table but 1"),
        ("train.epochs=2", "must be a dict, for example {\"train.epochs\": 10}, not the string 'train.epochs=2'"),
        (["epochs=2"], "--set epochs=2: write table.key=value, for example train.epochs=2"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(given: Overrides, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", given)
    assert len(caught.value.messages) == 1
    assert sentence in str(caught.value)
