"""Several sources as one: shares, order, and what an image that comes twice in an epoch looks like."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import cli_error, small_recipe

import sslkit
from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.config import DataConfig, MixConfig
from sslkit.data.loading.loader import make_loader
from sslkit.data.order.mixture import Mixture
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource, mix, open_source
from sslkit.data.sources.image_table import MappedTable
from sslkit.errors import UserError
from sslkit.recipe.resolve import Recipe, build_recipe

BUNDLED = {"path": "builtin:fashion_mnist", "split": "test"}


def mixed_recipe(*sources: dict[str, object], **tables: dict[str, object]) -> Recipe:
    data = {"path": "", "split": "train", "mix": list(sources)}
    return small_recipe(data=data, **tables)


def folders(root: Path, *counts: int) -> list[Path]:
    """Folders of so many of the bundled pictures, all different."""
    source = open_source(DataConfig(**BUNDLED))
    made, start = [], 0
    for number, count in enumerate(counts):
        folder = root / f"part{number}"
        folder.mkdir(parents=True)
        for index in range(start, start + count):
            (folder / f"{index:04d}.png").write_bytes(source.encoded(index)[1])
        made.append(folder)
        start += count
    return made


def test_shares_are_rounded_so_that_their_sum_stays() -> None:
    assert Mixture((60, 30, 10), (1.0, 1.0, 1.0)).counts() == [34, 33, 33]
    assert Mixture((7, 3), (3.0, 1.0)).counts() == [8, 2]
    assert Mixture((5, 5), (1.0, 1e-9)).counts() == [10, 0]
    assert Mixture((5, 5), (1e308, 1e308)).counts() == [5, 5]


@pytest.mark.parametrize(("sizes", "weights"), [((40, 10), (1.0, 1.0)), ((5, 60, 7), (0.5, 0.2, 0.3))])
def test_no_image_comes_again_before_all_of_its_source_have(sizes: tuple[int, ...], weights: tuple[float, ...]) -> None:
    mixture, starts = Mixture(sizes, weights), np.cumsum([0, *sizes])
    seen: Counter[int] = Counter()
    for epoch in range(7):
        samples, repeats = mixture.samples(3, epoch)
        assert len(set(zip(samples.tolist(), repeats.tolist(), strict=True))) == len(samples) == sum(sizes)
        for part, count in enumerate(mixture.counts()):
            assert ((samples >= starts[part]) & (samples < starts[part + 1])).sum() == count
        seen.update(samples.tolist())
        for part, size in enumerate(sizes):
            times = [seen[index] for index in range(starts[part], starts[part] + size)]
            assert max(times) - min(times) <= 1


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    """Not of ranks, nor of where a run began."""

    def batches(seed: int = 3, **changes: int) -> list[list[tuple[int, int]]]:
        return list(GlobalBatchSampler(50, 8, seed, total_steps=14, plan=Mixture((40, 10), (1.0, 2.0)), **changes))

    whole = batches()
    ranks = [batches(rank=rank, world_size=2) for rank in range(2)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == whole
    assert batches(start_step=9) == whole[9:]
    assert batches(seed=4) != whole
    first, second = whole[:6], whole[6:12]
    assert [[sample for _, sample in batch] for batch in first] != [[sample for _, sample in batch] for batch in second]
    small = [sample >= 40 for batch in first for _, sample in batch]
    assert len({key for batch in first for key in batch}) == 48
    assert np.mean(small) == pytest.approx(2 / 3, abs=0.05)
    assert np.mean(small[:16]) == pytest.approx(2 / 3, abs=0.35)  # mixed within the epoch, not one after the other


def test_an_image_that_comes_again_is_cut_anew(tmp_path: Path) -> None:
    source = open_source(DataConfig(mix=[MixConfig(path=str(f), weight=1.0) for f in folders(tmp_path, 30, 2)]))
    views = ViewsConfig.of_policy("moco_v2", size=32)
    order = GlobalBatchSampler(32, 32, 0, total_steps=1, plan=source.plan)
    batch = next(iter(make_loader(source, ViewPipeline(views, 0), order, workers=0, pin_memory=False)))
    again = torch.nonzero(batch.sample_ids == 31)[:, 0]
    assert len(again) == 8
    assert len({view.numpy().tobytes() for view in batch.views[0][again]}) == 8


def test_without_weights_it_is_all_of_them(tmp_path: Path) -> None:
    """As if the folders were one, image for image and loss for loss."""
    parts, whole = folders(tmp_path, 20, 12), folders(tmp_path / "whole", 32)
    source = open_source(DataConfig(mix=[MixConfig(path=str(each)) for each in parts]))
    assert source.plan is None
    assert len(source) == 32
    assert source.description == f"{parts[0]} [train] + {parts[1]} [train]"
    train = {"batch_size": 16, "max_steps": 2}
    one = sslkit.train(mixed_recipe(*({"path": str(each)} for each in parts), train=train), tmp_path / "mixed")
    other = sslkit.train(small_recipe(data={"path": str(whole[0]), "split": "train"}, train=train), tmp_path / "run")
    assert [row["loss"] for row in one.metrics()] == [row["loss"] for row in other.metrics()]


def test_a_run_that_stops_anywhere_ends_as_one_that_does_not(tmp_path: Path) -> None:
    """Within an epoch and at its end, with images that come twice in it."""
    sources = [{"path": str(f), "weight": w} for f, w in zip(folders(tmp_path / "data", 40, 6), (1, 2), strict=True)]

    def recipe(steps: int) -> Recipe:
        return mixed_recipe(*sources, train={"batch_size": 12, "max_steps": steps, "epochs": 2})

    whole = sslkit.train(recipe(0), tmp_path / "whole")
    for steps in (2, 3, 5, 0):
        run = sslkit.train(recipe(steps), tmp_path / "parts")
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in whole.metrics()]
    weights = [(each / "encoder" / "model.safetensors").read_bytes() for each in (whole.folder, run.folder)]
    assert weights[0] == weights[1]


def test_folders_tables_and_labels(class_folders: Path, tmp_path: Path) -> None:
    """Whatever columns they have, only images go on; and a monitor has labels of its own."""
    bundled = open_source(DataConfig(**BUNDLED))
    rows = [{"bytes": bundled.encoded(index)[1], "path": None} for index in range(9)]
    datasets.Dataset.from_dict({"picture": rows, "label": list(range(9))}).to_parquet(str(tmp_path / "a.parquet"))
    mixture = (
        {"path": str(class_folders), "weight": 3},
        {"path": str(tmp_path / "a.parquet"), "image_column": "picture", "weight": 1},
    )
    monitor = {"every_epochs": 1, "data": str(class_folders), "k": 3}
    recipe = mixed_recipe(*mixture, monitor=monitor, train={"batch_size": 16, "max_steps": 0})
    assert build_recipe(recipe.as_tables()) == recipe
    run = sslkit.train(recipe, tmp_path / "run")
    assert run.results()[-1]["step"] == 3
    source = open_source(recipe.data)
    assert source.description.endswith("a.parquet [train] (0.25 of an epoch)")
    assert source.table.rows.column_names == ["image"]
    assert source.encoded(40)[1] == rows[0]["bytes"]
    with pytest.raises(UserError, match="has no labels"):
        source.labels()
    again = sslkit.train(recipe, tmp_path / "run")
    assert again.step == run.step == 3


def test_a_table_that_names_files_is_refused(tmp_path: Path) -> None:
    file = folders(tmp_path, 1)[0] / "0000.png"
    rows = [{"bytes": file.read_bytes(), "path": None}, {"bytes": None, "path": str(file)}]
    table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))
    named = ImageSource(MappedTable(table), "a table", within=str(tmp_path))
    with pytest.raises(UserError, match=r"rows of a table name files instead of holding images"):
        mix([named, named], [None, None])


def test_a_source_that_would_never_be_seen_is_refused() -> None:
    source = open_source(DataConfig(**BUNDLED))
    with pytest.raises(UserError, match=r"weight: builtin:fashion_mnist \[test\] gets no sample of an epoch of 4000"):
        mix([source, source], [1e-9, 1.0])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"path": "photos", "mix": [{"path": "photos"}]}, r"\[data\] mix replaces path"),
        ({"split": "val", "mix": [{"path": "photos"}]}, r"\[data\] mix replaces path"),
        ({"mix": []}, r"\[data\] mix is empty"),
        ({"mix": [{"path": "a", "weight": 1}, {"path": "b"}]}, "give every source a weight, or none"),
        ({"mix": [{"path": "a", "weight": 0}]}, r"\[data\.mix 1\] weight: must be more than 0, not 0"),
        ({"mix": [{"path": "a"}, {"path": "b", "splt": "val"}]}, r"\[data\.mix 2\] splt: unknown key; did you mean 's"),
        ({"mix": [{"weight": 1}]}, r"\[data\.mix 1\] path: missing"),
        ({"mix": 3}, r"\[data\] mix: "),
        ({}, r"\[data\] path: missing"),
    ],
)
def test_refusals(data: dict[str, object], words: str) -> None:
    base = {"method": {"name": "moco_v3"}, "backbone": {"name": "test_vit"}, "views": {"policy": "small_gray"}}
    with pytest.raises(UserError, match=words):
        build_recipe({**base, "data": data, "train": {"epochs": 1, "batch_size": 2}})


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(mixed_recipe({"path": "builtin:fashion_mnist"}, {"path": "no/such/dir"}).to_toml())
    sentence = cli_error(["pretrain", str(tmp_path / "r.toml"), "--output", str(tmp_path / "run")])
    assert "no/such/dir" in sentence
    assert not (tmp_path / "run").exists()
