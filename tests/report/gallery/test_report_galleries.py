"""Galleries against brute force, another library, and the formula of attention; views as the run cuts them."""

import base64
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import cli_error, small_recipe
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder, fingerprint
from sslkit.report.gallery import neighbours
from sslkit.report.gallery.attention import draw_attention, last_attention
from sslkit.report.gallery.gallery_images import GalleryImages, choose_images, extract
from sslkit.report.gallery.neighbours import draw_map, find_neighbours
from sslkit.report.gallery.thumbnails import data_uri, make_sprite
from sslkit.report.gallery.view_gallery import describe_views, draw_views

SIZE = {"input_size": (3, 28, 28), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def encoder(name: str = "test_vit") -> Encoder:
    torch.manual_seed(0)
    extra = {"img_size": 28, "patch_size": 7} if name == "test_vit" else {}
    return Encoder(timm.create_model(name, num_classes=0, **extra), SIZE, name, name, extra)


def decode(address: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


@pytest.fixture(scope="module")
def sample() -> GalleryImages:
    return choose_images(small_recipe())


def test_samples_are_few_labelled_and_fall_back_to_no_labels(sample: GalleryImages, tmp_path: Path) -> None:
    # small_recipe learns from the test split of 2000, of which a fifth is held out
    assert (len(sample.bank), len(sample.queries)) == (1500, 400)
    assert sample.bank_labels == sample.bank.labels()
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    for index in range(9):
        Image.fromarray(source.read(index)).save(tmp_path / f"{index}.png")
    plain = choose_images(small_recipe(), str(tmp_path))
    assert (plain.bank_labels, len(plain.bank) + len(plain.queries)) == (None, 9)
    rows = find_neighbours(plain, *extract(encoder(), plain))
    assert {found.same_class for row in rows for found in row.neighbours} == {None}
    for file in list(tmp_path.iterdir())[:7]:
        file.unlink()
    with pytest.raises(UserError, match="need at least 3 images, found 2"):
        choose_images(small_recipe(), str(tmp_path))


def test_a_sample_is_of_the_split_that_is_asked_for(tmp_path: Path) -> None:
    for name, count in (("train", 4), ("test", 6)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    sizes = []
    for split in ("train", "test", "all"):
        sample = choose_images(small_recipe(), str(tmp_path), split)
        sizes.append(len(sample.bank) + len(sample.queries))
    assert sizes == [4, 6, 10]
    assert cli_error(["report", "x", "--split", "all"]).startswith("sslkit: --split: is the split of --data")


def test_neighbours_are_the_nearest_and_marks_are_labels(sample: GalleryImages) -> None:
    bank, queries = extract(encoder(), sample)
    assert torch.linalg.norm(bank, dim=1).numpy() == pytest.approx(np.ones(len(bank)), abs=1e-5)
    rows = find_neighbours(sample, bank, queries)
    assert sample.query_labels is not None
    assert sample.bank_labels is not None
    assert len(rows) == 12
    assert {row.query.label for row in rows} == set(sample.query_labels)
    similarities = queries.numpy() @ bank.numpy().T
    pictures = [data_uri(sample.queries.read(index), 96) for index in range(len(queries))]
    for row in rows:
        query = pictures.index(row.query.uri)
        best = np.argsort(-similarities[query])[:6]
        assert [found.similarity for found in row.neighbours] == pytest.approx(similarities[query][best], abs=1e-5)
        assert [found.label for found in row.neighbours] == [sample.bank_labels[index] for index in best]
        truth = sample.query_labels[query]
        assert [found.same_class for found in row.neighbours] == [sample.bank_labels[index] == truth for index in best]


def test_the_map_is_pca_where_umap_is_not_installed(sample: GalleryImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    _, queries = extract(encoder(), sample)
    drawn = draw_map(sample, queries)
    points = np.zeros((400, 2))
    for trace in json.loads(drawn.figure)["data"]:
        assert [sample.query_labels[index] for index in trace["customdata"]] == [trace["name"]] * len(trace["x"])
        points[trace["customdata"]] = np.stack([trace["x"], trace["y"]], axis=1)
    expected = PCA(2).fit_transform(queries.double().numpy())
    for axis in (0, 1):
        sign = np.sign(points[:, axis] @ expected[:, axis])
        np.testing.assert_allclose(points[:, axis], sign * expected[:, axis], atol=1e-6)
    assert "PCA" in drawn.note


def test_the_map_is_umaps_where_it_is_installed(sample: GalleryImages, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Reducer:
        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def fit_transform(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
            return features[:, :2] + 7

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Reducer))
    _, queries = extract(encoder(), sample)
    points, note, _ = neighbours.project(queries)
    np.testing.assert_array_equal(points, queries.numpy()[:, :2] + 7)
    assert asked == {"n_neighbors": 15, "metric": "cosine", "random_state": 0, "n_jobs": 1}
    assert note.startswith("UMAP")
    assert neighbours.project(queries[:9])[1].startswith("PCA")  # too few for it


def test_many_classes_leave_the_rare_ones_together(sample: GalleryImages) -> None:
    labels = [f"class {number}" for number in range(30) for _ in range(30 - number)]
    groups = neighbours.group_by_class(labels)
    assert list(groups)[-1] == "other classes"
    assert len(groups) == 17
    assert sum(map(len, groups.values())) == len(labels)
    assert {labels[index] for index in groups["other classes"]} == {f"class {number}" for number in range(16, 30)}


def test_tiles_lie_where_the_page_looks_for_them(sample: GalleryImages) -> None:
    images = [sample.queries.read(index) for index in range(7)]
    sprite = make_sprite(images, 28)
    grid = decode(sprite.uri).astype(int)
    assert (sprite.columns, sprite.count) == (3, 7)
    for index, image in enumerate(images):
        left, top = index % 3 * 28, index // 3 * 28
        assert np.abs(grid[top : top + 28, left : left + 28] - image).mean() < 8  # JPEG


def test_attention_is_the_softmax_of_queries_and_keys() -> None:
    model = encoder().module.eval()
    before, fused = fingerprint(model), [getattr(block.attn, "fused_attn", None) for block in model.blocks]
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    hook = model.blocks[-1].attn.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    attention = model.blocks[-1].attn
    tokens = seen[0].double().numpy()
    weight, bias = (part.detach().double().numpy() for part in (attention.qkv.weight, attention.qkv.bias))
    heads, width = attention.num_heads, tokens.shape[-1]
    projected = (tokens @ weight.T + bias).reshape(3, tokens.shape[1], 3, heads, width // heads)
    query, key = projected[:, 0, 0], projected[:, :, 1]
    logits = np.einsum("bhd,bnhd->bhn", query, key) / np.sqrt(width // heads)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    found = last_attention(model, images)
    np.testing.assert_allclose(found.numpy(), expected[..., 1:].reshape(3, heads, 4, 4), atol=1e-5)
    assert fingerprint(model) == before
    assert [getattr(block.attn, "fused_attn", None) for block in model.blocks] == fused


def test_attention_is_refused_without_a_class_token(sample: GalleryImages) -> None:
    with pytest.raises(UserError, match="need a ViT with a class token"):
        draw_attention(encoder("test_resnet"), sample)
    assert len(draw_attention(encoder(), sample)) == 6


def test_views_are_the_runs_own() -> None:
    recipe = small_recipe()
    gallery = draw_views(recipe)
    source, pipeline = open_source(recipe.data), ViewPipeline(recipe.views, recipe.train.seed)
    assert len(gallery.rows) == 8
    for place, index in ((0, 0), (7, len(source) - 1)):
        row = gallery.rows[place]
        np.testing.assert_array_equal(decode(row.original), source.read(index))
        for view, column in enumerate(row.views):
            for epoch, address in enumerate(column.pictures):
                np.testing.assert_array_equal(
                    decode(address), pipeline.make_view(source.read(index), epoch, index, view)
                )
    assert gallery.advice == []


def test_views_in_words() -> None:
    def words(policy: str, **views: Any) -> dict[str, list[str]]:
        method = "swav" if policy == "swav" else "moco_v3"
        return dict(describe_views(small_recipe(method, views={"policy": policy, "size": 224, **views}).views))

    first, second = words("moco_v3")["global view 1"], words("moco_v3")["global view 2"]
    assert first[0].startswith("a crop of 8% to 100% of the area, 0.75 to 1.33 times as wide as high")
    assert "saturation times 0.8 to 1.2, hue shifted by up to 36 degrees of 360" in first[1]
    assert "always blurred by a Gaussian of 0.1 to 2 pixels" in first
    assert {"in 10% of draws blurred by a Gaussian of 0.1 to 2 pixels", "in 50% of draws mirrored left to right"} <= {
        *second
    }
    assert "in 20% of draws solarized: values from 128 up inverted" in second
    assert first[-1] == "never solarized, rotated, erased in part"
    both = words("moco_v1")["both global views"]
    assert both.index("in 20% of draws converted to grey") < next(
        i for i, step in enumerate(both) if "always colours" in step
    )
    small = words("swav", small_crops=6, small_size=96, small_scale=[0.05, 0.14])["6 local views"]
    assert small[0].startswith("a crop of 5% to 14% of the area")
    rare = words("small_gray", jitter=[0, 0, 0, 0], erase_prob=0.005, rotate_degrees=15)["both global views"]
    assert "in 0.5% of draws erased in part: a rectangle of 5% to 20% of the area" in rare
    assert "always rotated by up to 15 degrees in either direction" in rare
    assert rare[-1] == "never colours jittered, converted to grey, blurred, solarized"
