"""Features on disk: extracted once, whole or not at all, mapped, shared, and never mistaken for others."""

import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate import evaluate_knn
from sslkit.evaluate.features import readouts as readouts_module
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.readouts import Readout, features_key
from sslkit.evaluate.features.store import FeatureStore
from sslkit.evaluate.probes.knn import KnnProtocol

SIZE = {"input_size": (3, 32, 32), "mean": (0.3,) * 3, "std": (0.35,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}


def features_of(store: FeatureStore, key: str, count: int, extract: Callable[[range], torch.Tensor]) -> torch.Tensor:
    return store.load_or_extract([key], count, lambda _keys, rows: [extract(rows)])[0]


def rows_of(rows: range) -> torch.Tensor:
    return torch.arange(rows.start, rows.stop, dtype=torch.float32)[:, None] * torch.ones(3)


def test_what_is_there_is_not_extracted_again(tmp_path: Path) -> None:
    store, seen = FeatureStore(tmp_path, shard=4), []

    def extract(rows: range) -> torch.Tensor:
        seen.append(rows)
        return rows_of(rows)

    for _ in range(2):
        torch.testing.assert_close(features_of(store, "ab", 10, extract), rows_of(range(10)))
    assert sorted((rows.start, rows.stop) for rows in seen) == [(0, 4), (4, 8), (8, 10)]
    assert [file.name for file in (tmp_path / "ab").iterdir()] == ["features.safetensors"]


def test_a_stopped_extraction_goes_on(tmp_path: Path) -> None:
    store, seen = FeatureStore(tmp_path, shard=2), []

    def extract(rows: range) -> torch.Tensor:
        seen.append(rows.start)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return rows_of(rows)

    with pytest.raises(KeyboardInterrupt):
        features_of(store, "ab", 8, extract)
    torch.testing.assert_close(features_of(store, "ab", 8, extract), rows_of(range(8)))
    assert len(seen) == 5
    assert len(set(seen[:2] + seen[3:])) == 4


@pytest.mark.parametrize("name", ["features.safetensors", "part-00001.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "longer", "wrong shape", "wrong type", "wrong name"])
def test_a_damaged_file_is_as_one_that_is_not_there(tmp_path: Path, name: str, damage: str) -> None:
    store, seen = FeatureStore(tmp_path, shard=4), []

    def extract(rows: range) -> torch.Tensor:
        seen.append(rows.start)
        return rows_of(rows)

    features_of(store, "ab", 10, extract)
    file = tmp_path / "ab" / name
    if name.startswith("part"):
        (tmp_path / "ab" / "features.safetensors").unlink()
        save_file({"features": rows_of(range(4, 8))}, file)
    whole = file.read_bytes()
    if damage.startswith("wrong"):
        shaped = {"wrong shape": torch.zeros(3, 3), "wrong type": torch.zeros(10, 3, dtype=torch.int32)}
        save_file({"other" if damage == "wrong name" else "features": shaped.get(damage, torch.zeros(10, 3))}, file)
    else:
        flipped = whole[:9] + bytes([whole[9] ^ 4]) + whole[10:]
        file.write_bytes({"empty": b"", "cut": whole[:-7], "flipped": flipped, "longer": whole + b"1234"}[damage])
    seen.clear()
    torch.testing.assert_close(features_of(store, "ab", 10, extract), rows_of(range(10)))
    assert 4 in seen
    assert [file.name for file in (tmp_path / "ab").iterdir()] == ["features.safetensors"]
    seen.clear()
    torch.testing.assert_close(features_of(store, "ab", 10, extract), rows_of(range(10)))
    assert not seen


def fill(folder: Path) -> None:
    features_of(FeatureStore(folder, shard=1), "ab", 40, rows_of)


def test_features_of_one_pass_are_kept_apart_and_only_what_lacks_is_extracted(tmp_path: Path) -> None:
    store, seen = FeatureStore(tmp_path, shard=4), []

    def extract(keys: Sequence[str], rows: range) -> list[torch.Tensor]:
        seen.append((keys, rows.start))
        return [rows_of(rows)[:, : len(key)] for key in keys]

    together = store.load_or_extract(["a", "bb"], 6, extract)
    assert sorted(seen) == [(["a", "bb"], 0), (["a", "bb"], 4)]
    for key, features in zip(("a", "bb"), together, strict=True):
        torch.testing.assert_close(features, rows_of(range(6))[:, : len(key)])
    seen.clear()
    again = store.load_or_extract(["bb", "ccc", "a"], 6, extract)
    assert sorted(seen) == [(["ccc"], 0), (["ccc"], 4)]
    assert [each.shape for each in again] == [(6, 2), (6, 3), (6, 1)]


def test_several_processes_fill_one_store(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=fill, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    torch.testing.assert_close(features_of(FeatureStore(tmp_path), "ab", 40, rows_of), rows_of(range(40)))
    assert [file.name for file in (tmp_path / "ab").iterdir()] == ["features.safetensors"]


def test_features_are_mapped_not_read(tmp_path: Path) -> None:
    count, width = 8192, 2048
    store = FeatureStore(tmp_path, shard=1024)
    features_of(store, "ab", count, lambda rows: torch.ones(len(rows), width))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    features = features_of(store, "ab", count, rows_of)
    assert features.shape == (count, width)
    assert resident() - before < count * width  # a quarter of what they weigh
    assert float(features[-1].sum()) == width


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, max_bytes=3000)
    for number, key in enumerate(("a", "b", "c")):
        features_of(store, key, 100, rows_of)
        os.utime(tmp_path / key, (number, number))
        if key == "b":
            features_of(store, "a", 100, rows_of)  # used again
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["a", "c"]


def test_a_store_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "features").write_text("a file")
    with pytest.raises(UserError, match=r"feature store .*--no-cache"):
        features_of(FeatureStore(tmp_path / "features"), "ab", 4, rows_of)


def test_the_key_knows_weights_images_transform_and_layer(tmp_path: Path) -> None:
    for index in range(2):
        Image.fromarray(np.full((8, 8, 3), 90 * index, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    source = open_source(DataConfig(path=str(tmp_path)))
    torch.manual_seed(0)
    encoder = Encoder(timm.create_model("test_resnet", num_classes=0), SIZE, "x", "test_resnet")
    keys = [features_key(encoder, source, "t", "output") for _ in range(2)]
    assert keys[0] == keys[1]
    keys += [features_key(encoder, source, "t", "block 1"), features_key(encoder, source, "u", "output")]
    keys += [features_key(encoder, source.subset(np.array([1])), "t", "output")]
    encoder.module.bn1.running_mean[0] += 1
    keys += [features_key(encoder, source, "t", "output")]
    Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8)).save(tmp_path / "1.png")
    os.utime(tmp_path / "1.png", (1, 1))
    keys += [features_key(encoder, open_source(DataConfig(path=str(tmp_path))), "t", "output")]
    assert len(set(keys)) == len(keys) - 1


def test_judging_twice_extracts_once(class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=0), str(tmp_path), safe_serialization=True)
    arguments = (str(tmp_path), DataConfig(path=str(class_folders)), KnnProtocol(k=3))
    plain = evaluate_knn(*arguments)
    readout = Readout(store=FeatureStore(tmp_path / "store"))
    assert evaluate_knn(*arguments, readout) == plain
    monkeypatch.setattr(readouts_module, "extract_features", None)
    assert evaluate_knn(*arguments, readout) == plain
