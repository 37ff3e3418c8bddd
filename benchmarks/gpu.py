"""Prove sslkit on a GPU, and measure it, in less than eight minutes.

    python benchmarks/gpu.py [--only right waits speed ...] [--output gpu] [--minutes 8] [--list]
    python benchmarks/gpu.py --toy    # on a CPU, at a size at which the figures mean nothing

Needs this repository, its installed packages and one GPU. Each section stands alone; one that fails does not stop the
others. Rows are written at once to OUTPUT.jsonl, and at the end as tables to OUTPUT.md, for docs/performance.md. The
exit code is 1 if a check failed or a section stopped with an error.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_sections import data, evaluation, machine, processes, right, speed, waits
from gpu_sections.common import Plan, Row


@dataclass(frozen=True)
class Section:
    """A part of the program."""

    name: str
    seconds: int  # that it takes on an H100, about
    run: Callable[[Plan], list[Row]]


SECTIONS = (
    Section("machine", 15, machine.run),
    Section("right", 80, right.run),
    Section("waits", 40, waits.run),
    Section("speed", 150, speed.run),
    Section("data", 70, data.run),
    Section("evaluation", 40, evaluation.run),
    Section("processes", 45, processes.run),
)


def run_section(section: Section, plan: Plan) -> dict[str, Any]:
    """Run a section; an error becomes part of the result."""
    started = time.monotonic()
    found: dict[str, Any] = {"section": section.name, "rows": [], "error": ""}
    if plan.seconds_left() < section.seconds / 3:
        return {**found, "error": "not run: no time left"}
    try:
        found["rows"] = section.run(plan)
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def as_table(found: dict[str, Any]) -> str:
    """A section as a Markdown table."""
    lines = [f"### {found['section']}", ""]
    if found["error"]:
        lines += [f"**{found['error']}**", ""]
    columns = list(dict.fromkeys(name for row in found["rows"] for name in row))
    if columns:
        lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in found["rows"]]
    return "\n".join([*lines, ""])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the sections, and print and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[section.name for section in SECTIONS])
    parser.add_argument("--output", default="gpu", help="path without suffix")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--list", action="store_true", help="name the sections")
    words = parser.parse_args()
    if words.list:
        print("\n".join(f"{section.name}: about {section.seconds} s" for section in SECTIONS))
        return
    unknown = set(words.only) - {section.name for section in SECTIONS}
    if unknown or not (words.toy or torch.cuda.is_available()):
        print(f"no section {', '.join(unknown)}; see --list" if unknown else "there is no GPU; --toy runs on a CPU")
        sys.exit(2)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    plan = Plan(device, words.toy, time.monotonic() + 60 * words.minutes)
    tables, failed = [], False
    with Path(f"{words.output}.jsonl").open("w") as lines:
        for section in SECTIONS:
            if section.name in words.only:
                found = run_section(section, plan)
                print(json.dumps(found), file=lines, flush=True)
                tables.append(as_table(found))
                print(tables[-1], flush=True)
                failed |= bool(found["error"]) or any(row.get("right") is False for row in found["rows"])
    Path(f"{words.output}.md").write_text("\n".join(tables))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
