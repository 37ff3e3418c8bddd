"""Pipelines of the user's own: read, checked, seeded, recorded by content."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A  # noqa: N812
import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_sample_images

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.user_pipeline import MAX_BYTES, canonical_json
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.loading.loader import make_loader
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.engine.run_folder.resume import check_folder
from sslkit.errors import UserError
from sslkit.recipe.resolve import Recipe, build_recipe, load_recipe
from sslkit.report.gallery.view_gallery import describe_views

TABLES = {
    "method": {"name": "swav"},
    "backbone": {"name": "test_resnet"},
    "data": {"path": "builtin:fashion_mnist"},
    "views": {"size": 32, "local": {"count": 0}},
}
RANDOM = (  # of every generator that transforms draw from: Python's, NumPy's, and OpenCV's (Spatter)
    A.HorizontalFlip(p=0.5),
    A.OneOf([A.GaussianBlur(p=1.0), A.ElasticTransform(p=1.0)], p=0.5),
    A.GaussNoise(p=0.5),
    A.Spatter(p=0.8),
    A.ColorJitter(p=0.8),
)


def photograph() -> np.ndarray:
    return np.ascontiguousarray(load_sample_images().images[0][:200, :300])


def save(file: Path, *transforms: Any) -> Path:
    A.save(A.Compose(list(transforms)), file, data_format="json" if file.suffix == ".json" else "yaml")
    return file


def recipe(file: Path | str, *overrides: str) -> Recipe:
    return build_recipe(TABLES, [f"views.transforms={file}", *overrides])


def pipeline(file: Path | str, *overrides: str, seed: int = 3) -> ViewPipeline:
    return ViewPipeline(recipe(file, *overrides).views, seed)


def test_a_view_is_a_function_of_its_key_alone(tmp_path: Path) -> None:
    file, image = save(tmp_path / "p.yaml", *RANDOM), photograph()
    one, other = pipeline(file), pipeline(file)
    keys = [(epoch, sample, view) for epoch in range(2) for sample in range(6) for view in range(2)]
    views = {key: one.make_view(image, *key) for key in keys}
    np.random.seed(1)
    for key in reversed(keys):
        assert np.array_equal(other.make_view(image, *key), views[key])
    assert len({view.tobytes() for view in views.values()}) == len(keys)
    assert not np.array_equal(pipeline(file, seed=4).make_view(image, 0, 0, 0), views[0, 0, 0])


def test_transforms_alone_differ_with_every_word_of_the_key(tmp_path: Path) -> None:
    """Without our crop, which differs as well."""
    crop = A.RandomResizedCrop((32, 32), scale=(0.2, 0.5))
    file, image = save(tmp_path / "p.yaml", crop), photograph()
    keys = [(3, 0, 0, 0), (4, 0, 0, 0), (3, 1, 0, 0), (3, 0, 1, 0), (3, 0, 0, 1)]
    views = [
        pipeline(file, "views.crop_sampler=none", seed=seed).make_view(image, *rest).tobytes() for seed, *rest in keys
    ]
    assert len(set(views)) == len(keys)


def test_batches_are_the_same_whatever_the_workers(tmp_path: Path) -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist"))
    views = pipeline(save(tmp_path / "p.yaml", *RANDOM))

    def batches(workers: int) -> list[torch.Tensor]:
        order = GlobalBatchSampler(64, 16, 0, total_steps=3)
        return [
            view
            for batch in make_loader(source, views, order, workers=workers, pin_memory=False)
            for view in batch.views
        ]

    for one, other in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one, other)


def test_it_does_what_albumentations_does(tmp_path: Path) -> None:
    """A pipeline without chance, beside the same transforms called by hand on our crop."""
    by_hand = A.Compose([A.HorizontalFlip(p=1.0), A.InvertImg(p=1.0), A.ToGray(p=1.0)])
    views, image = pipeline(save(tmp_path / "p.json", *by_hand.transforms)), photograph()
    params = views.view_params(0, 5, image.shape[:2])[1]
    expected = by_hand(image=views.crop(image, params, 1))["image"]
    assert np.array_equal(views.make_view(image, 0, 5, 1), expected)


def test_one_role_may_have_a_pipeline_of_its_own(tmp_path: Path) -> None:
    """Here local views are inverted grey ones; the global ones are the policy's."""
    file = save(tmp_path / "local.yaml", A.ToGray(p=1.0))
    overrides = ["views.local.count=3", "views.local.size=16", f"views.local.transforms={file}"]
    views, image = build_recipe(TABLES, overrides).views, photograph()
    policy = build_recipe(TABLES, overrides[:2]).views
    found, expected = ViewPipeline(views, 0)(image, 0, 0), ViewPipeline(policy, 0)(image, 0, 0)
    assert [view.shape for view in found] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 3
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert np.array_equal(one, other)
    assert all(np.ptp(view, axis=2).max() == 0 for view in found[2:])


@pytest.mark.parametrize("size", [20, 32, 50])
def test_whole_images_go_to_a_pipeline_that_crops(size: int, tmp_path: Path) -> None:
    """It gets the image as it is, and its square is resized to the view's side."""
    file = save(tmp_path / "crop.yaml", A.CenterCrop(size, size), A.InvertImg(p=1.0))
    views = pipeline(file, "views.crop_sampler=none", "views.local.count=1", "views.local.size=16")
    image = photograph()
    found = views(image, 0, 0)
    assert [view.shape for view in found] == [(32, 32, 3)] * 2 + [(16, 16, 3)]
    if size == 32:
        assert np.array_equal(found[0], 255 - image[84:116, 134:166])
    assert views.reduction(0, 0, (3000, 4000)) == 1


FORMS: list[tuple[Any, str]] = [
    ("[1, 2", "not readable as YAML or JSON"),
    ("just words", "not a pipeline of albumentations; write it by A.save(pipeline, FILE, data_format='yaml')"),
    ({"transform": {"__class_fullname__": "HorizontalFlip", "p": 0.5}}, "the outermost transform must be Compose"),
    ({"transform": {"__class_fullname__": "Compose"}}, "Compose has no list of transforms"),
    ([{"p": 0.5}], "a transform has no __class_fullname__"),
    (["HorizontalFlip"], "a transform has no __class_fullname__"),
    ([{"__class_fullname__": "Lambda", "__name__": "x", "p": 1.0}], "'Lambda' is code, which a recipe never runs"),
    ([{"__class_fullname__": "os.system", "p": 1.0}], "'os.system' is code, which a recipe never runs"),
    (
        [{"__class_fullname__": "OneOf", "p": 1.0, "transforms": [{"__class_fullname__": "Lambda", "p": 1.0}]}],
        "'Lambda' is code",
    ),
    ([{"__class_fullname__": "TextImage", "font_path": "/etc/font", "p": 1.0}], "TextImage font_path: names other"),
    ([{"__class_fullname__": "Blur", "p": float("inf")}], "holds 'inf'; a pipeline is numbers, texts, lists"),
    ("transform: {since: 2024-01-01}", "holds '2024-01-01'"),
    ("transform: !!python/object/apply:os.system ['true']", "not readable as YAML or JSON"),
    ("a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
     "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ntransform: {e: [*d,*d,*d,*d,*d,*d,*d,*d]}", "more than 5000 values"),
    ("#" * (MAX_BYTES + 1), f"more than {MAX_BYTES} bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), FORMS)
def test_files_that_are_no_pipeline_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, list):
        content = {"transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": content}}
    file = tmp_path / "my.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        recipe(file)
    (sentence,) = caught.value.messages
    assert sentence.startswith(f"recipe [views] transforms: {file}: ")
    assert message in sentence


# A pipeline, further overrides, and why its views cannot be made.
PIPELINES: list[tuple[Sequence[dict[str, Any]], list[str], str]] = [
    ([{"__class_fullname__": "HorizontalFlop", "p": 0.5}], [], "has no transform 'HorizontalFlop'; did you mean"),
    ([{"__class_fullname__": "Solarize", "threshold": 3, "p": 1.0}], [], "cannot build this pipeline"),
    ([{"__class_fullname__": "GaussianBlur", "sigma_limit": "x", "p": 1.0}], [], "cannot build this pipeline"),
    ([{"__class_fullname__": "Normalize", "p": 1.0}], [], "must return uint8 pixels, not float32; leave out Normalize"),
    ([{"__class_fullname__": "ToTensorV2", "p": 1.0}], [], "must return uint8 pixels, not torch.uint8"),
    ([{"__class_fullname__": "Resize", "height": 8, "width": 9, "p": 1.0}], [], "must return square RGB images"),
    ([{"__class_fullname__": "RandomCrop", "height": 99, "width": 99, "p": 1.0}], [], "fails on an image of 32 x 32"),
    (
        [{"__class_fullname__": "RandomResizedCrop", "size": [32, 32], "p": 1.0}],
        [],
        "the pipeline crops (RandomResizedCrop) after sslkit has cropped; set [views] crop_sampler = 'none'",
    ),
    ([], ["views.device=accelerator"], "[views] device: a pipeline file runs on the 'cpu'"),
    (
        [],
        ["backbone.args={in_chans=2}", "views.mean=[0.5,0.5]", "views.std=[0.5,0.5]", "views.policy=small_gray",
         "views.jitter=[0,0,0,0]", "views.gray_prob=0"],
        "[views] transforms: a pipeline file needs images of 3 channels",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("transforms", "overrides", "message"), PIPELINES)
def test_pipelines_that_give_no_views_are_refused(
    transforms: list[dict[str, Any]], overrides: list[str], message: str, tmp_path: Path
) -> None:
    """When the recipe is read or before the first image is, in a sentence that names the key."""
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": transforms}}))
    with pytest.raises(UserError) as caught:
        pipeline(file, *overrides)
    (sentence,) = caught.value.messages
    assert message in sentence
    assert "[views] " in sentence


def test_a_missing_file_and_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in (("no.yaml", "no such file; looked for it at"), ("pillow", "must be 'torchvision', 'tensorf")):
        with pytest.raises(UserError) as caught:
            recipe(name)
        assert message in str(caught.value)
        assert len(caught.value.messages) == 1


def test_a_file_beside_the_recipe_is_found(tmp_path: Path) -> None:
    save(tmp_path / "p.yaml", *RANDOM)
    text = 'method.name = "swav"\nbackbone.name = "test_resnet"\ndata.path = "x"\nviews.transforms = "p.yaml"\n'
    (tmp_path / "r.toml").write_text(text)
    assert load_recipe(tmp_path / "r.toml").views.pipeline


def test_the_recipe_records_the_content(tmp_path: Path) -> None:
    """The file may go or change: the resolved recipe has all of it, and a digest."""
    file = save(tmp_path / "p.yaml", *RANDOM)
    resolved = recipe(file)
    (tmp_path / "resolved.toml").write_text(resolved.to_toml())
    file.unlink()
    again = load_recipe(tmp_path / "resolved.toml")
    assert again == resolved
    found = again.views.pipeline
    assert found
    assert hashlib.sha256(found.pipeline.encode()).hexdigest() == found.pipeline_sha256
    image = photograph()
    for one, other in zip(
        ViewPipeline(again.views, 0)(image, 0, 1), ViewPipeline(resolved.views, 0)(image, 0, 1), strict=True
    ):
        assert np.array_equal(one, other)
    text = resolved.to_toml().replace('p\\":0.5', 'p\\":0.6')
    (tmp_path / "resolved.toml").write_text(text)
    with pytest.raises(UserError, match="pipeline_sha256 is not the digest of pipeline"):
        load_recipe(tmp_path / "resolved.toml")


def test_yaml_json_and_long_names_are_the_same_pipeline(tmp_path: Path) -> None:
    one, other = recipe(save(tmp_path / "p.yaml", *RANDOM)), recipe(save(tmp_path / "p.json", *RANDOM))
    assert one.as_tables() == other.as_tables()
    node = {"__class_fullname__": "albumentations.augmentations.geometric.flip.HorizontalFlip", "p": 1.0}
    tree = {"transform": {"__class_fullname__": "albumentations.core.composition.Compose", "transforms": [node]}}
    config = ViewsConfig.of_policy("moco_v2", size=32, transforms={"pipeline": canonical_json(json.dumps(tree))})
    assert config.pipeline
    assert config.pipeline.class_names() == ["Compose", "HorizontalFlip"]
    ViewPipeline(config, 0)


def test_a_run_is_not_continued_with_another_pipeline(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    file = save(tmp_path / "p.yaml", A.HorizontalFlip(p=0.5))
    (folder / "recipe.toml").write_text(recipe(file).to_toml())
    check_folder(folder, recipe(save(tmp_path / "moved.json", A.HorizontalFlip(p=0.5))), "auto")
    save(file, A.HorizontalFlip(p=0.4))
    with pytest.raises(
        UserError, match=r"another recipe: views\.transforms: pipeline file with sha256 \w{16} -> pipeline file"
    ):
        check_folder(folder, recipe(file), "auto")


def test_steps_in_words(tmp_path: Path) -> None:
    inner = A.OneOf([A.Sharpen(p=1.0), A.Blur((3, 3), p=0.5)], p=0.25)
    config = recipe(save(tmp_path / "p.yaml", A.HorizontalFlip(p=1.0), inner)).views
    ((name, steps),) = describe_views(config)
    assert name == "both global views"
    assert steps[0].startswith("a crop of ")
    assert steps[1] == f"pipeline file, sha256 {config.pipeline.pipeline_sha256[:12]}"  # type: ignore[union-attr]
    assert steps[2] == "always HorizontalFlip"
    assert steps[3].startswith("in 25% of draws OneOf of (always Sharpen: ")
    assert "; in 50% of draws Blur: blur_limit [3, 3])" in steps[3]
