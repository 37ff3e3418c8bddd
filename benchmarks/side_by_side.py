"""Time several functions alternately, round by round, so that a slower machine affects all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

Work = Callable[[], object]


def in_turn(works: Mapping[str, Work], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each function in each round. Every round runs all of them once, in rotating order."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            works[name]()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Median, lower and upper quartile of each function's seconds relative to ``base`` in the same round."""
    found = {}
    for name, own in seconds.items():
        each = sorted(mine / other for mine, other in zip(own, seconds[base], strict=True))
        quarter = len(each) // 4
        found[name] = (statistics.median(each), each[quarter], each[-1 - quarter])
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(*packages: str) -> str:
    """One line with machine and versions."""
    cores = len(os.sched_getaffinity(0))
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not there")
    return f"{_processor()}, {cores} cores, Python {platform.python_version()}, {', '.join(found)}"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "a processor")
