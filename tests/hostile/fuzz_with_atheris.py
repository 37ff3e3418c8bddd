"""Coverage-guided fuzzing of a reader: ``python tests/hostile/fuzz_with_atheris.py TARGET [OPTION]``.

Needs atheris (``pip install atheris``) and begins with the kept seeds. Options are libFuzzer's, such as
``-max_total_time=60``; without that one it takes a minute. An input that a reader chokes on is left in the working
folder as ``crash-…``: once the reader is mended, it goes into ``seeds/TARGET`` and stays.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["sslkit", "tomllib", "pickletools", "zipfile"]):
    from targets import SEEDS, TARGETS

OPTIONS = ("-max_total_time=60", "-timeout=20", "-rss_limit_mb=1500", "-max_len=4096", "-print_final_stats=1")


def main() -> None:
    """Fuzz the target named by the first argument."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"give a target: {', '.join(TARGETS)}")
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as found:
        atheris.Setup([sys.argv[0], *OPTIONS, *options, found, str(SEEDS / name)], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
