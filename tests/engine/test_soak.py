"""A long run with kills, saves and measurements stays as small as it began."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "benchmarks" / "soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_grows(workers: int, soak: ModuleType, tmp_path: Path) -> None:
    samples = soak.soak(tmp_path, steps=1800, restarts=2, workers=workers)
    assert len(samples) > 30
    sizes = soak.compare(samples)
    for name in ("open files", "threads", "processes"):
        first, last = sizes[name]
        assert last <= first, sizes
    assert sizes["processes"] == (1 + workers, 1 + workers)
    assert sizes["memory"][1] < 1.03 * sizes["memory"][0], sizes
    assert sizes["run folder"][1] < sizes["run folder"][0] + 1.0, sizes
    assert sizes["shared memory"][1] < sizes["shared memory"][0] + 1.0, sizes
