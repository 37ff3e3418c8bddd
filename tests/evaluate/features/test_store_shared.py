"""A store that several processes fill, read and make room in at once, and one on a disk that is full."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_store import rows_of

from sslkit.evaluate.features import store as store_module
from sslkit.evaluate.features.store import MERGED, FeatureStore

FORK = multiprocessing.get_context("fork")


def features_of(store: FeatureStore, key: str, count: int, extract: Callable[[range], torch.Tensor]) -> torch.Tensor:
    return store.load_or_extract([key], count, lambda _keys, rows: [extract(rows)])[0]


def evaluate(folder: Path, seed: int) -> None:
    """Ask for the features of three encoders again and again, in a store that has no room for two of them."""
    draws, store = random.Random(seed), FeatureStore(folder, max_bytes=1200, shard=8)
    for _ in range(40):
        key, count = draws.choice([("a", 40), ("b", 48), ("c", 56)])
        assert torch.equal(features_of(store, key, count, rows_of), rows_of(range(count)))


def test_evaluations_at_once_all_get_their_features(tmp_path: Path) -> None:
    processes = [FORK.Process(target=evaluate, args=(tmp_path, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def finish_first(store: FeatureStore) -> None:
    """What another process does that is faster: all shards, and one file of them."""
    features_of(FeatureStore(store.folder, shard=store.shard), "ab", 10, rows_of)


def remove(store: FeatureStore) -> None:
    """What another process does that makes room."""
    shutil.rmtree(store.folder / "ab", ignore_errors=True)


@pytest.mark.parametrize("other", [finish_first, remove])
@pytest.mark.parametrize(
    "moment", ["_load", "_is_whole", "_write_rows", "_files_of", "_size", "_tidy", "_merge", "_rows"]
)
def test_at_whatever_moment_another_process_interferes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, other: Callable[[FeatureStore], None]
) -> None:
    """At the first, the second, ... call of each part of the work, until there are no more calls."""
    owner: Any = store_module if hasattr(store_module, moment) else store_module._Extraction
    work = getattr(owner, moment)
    for turn in range(1, 30):
        store = FeatureStore(tmp_path / f"{turn}", shard=4, max_bytes=0)
        calls = [0]

        def interfered(*arguments: Any, turn: int = turn, store: Any = store, calls: Any = calls) -> Any:
            calls[0] += 1
            if calls[0] == turn:
                other(store)
            return work(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, interfered)
            assert torch.equal(features_of(store, "ab", 10, rows_of), rows_of(range(10)))
        assert torch.equal(features_of(store, "ab", 10, rows_of), rows_of(range(10)))
        if calls[0] < turn:
            break
    assert turn < 29


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_full_disk_costs_the_keeping_and_not_the_features(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is room for so many of three shards; then, once there is room again, all is kept."""
    store, written, seen = FeatureStore(tmp_path / "store", shard=4), [], list[int]()
    write = store_module._write_rows

    def full(file: Path, *arguments: Any) -> None:
        written.append(file)
        write(file, *arguments)
        if len(written) > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    def extract(rows: range) -> torch.Tensor:
        seen.append(rows.start)
        return rows_of(rows)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_write_rows", full)
        assert torch.equal(features_of(store, "ab", 10, extract), rows_of(range(10)))
        features_of(store, "cd", 10, rows_of)  # is not stored either, and that has been said
    said = capsys.readouterr().err
    assert said.count("No space left on device; features are not stored") == said.count("\n") == 1
    assert sorted(seen) == [0, 4, 8]
    assert torch.equal(features_of(store, "ab", 10, extract), rows_of(range(10)))
    assert len(seen) == 6 - min(room, 3)
    assert [file.name for file in (tmp_path / "store/ab").iterdir()] == [MERGED]
    assert not capsys.readouterr().err


def on_a_full_disk(folder: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    assert torch.equal(features_of(FeatureStore(folder, shard=4), "ab", 10, rows_of), rows_of(range(10)))


def test_a_limit_of_the_systems(tmp_path: Path) -> None:
    process = FORK.Process(target=on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not list((tmp_path / "ab").iterdir())


def test_a_read_only_store_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path)
    features_of(store, "ab", 10, rows_of)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert torch.equal(features_of(store, "ab", 10, lambda _: pytest.fail("extracted again")), rows_of(range(10)))


def test_what_killed_processes_left_aside_goes_in_time(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    features_of(store, "ab", 10, rows_of)
    (tmp_path / "ab" / MERGED).unlink()
    for name, age in ((".old.1", 2 * store_module.STALE_SECONDS), (".new.2", 0.0)):
        (tmp_path / "ab" / name).write_bytes(b"x")
        stamp = (tmp_path / "ab" / name).stat().st_mtime - age
        os.utime(tmp_path / "ab" / name, (stamp, stamp))
    features_of(store, "ab", 10, rows_of)
    assert sorted(file.name for file in (tmp_path / "ab").iterdir()) == [".new.2", MERGED]
