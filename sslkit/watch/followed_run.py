"""A run, followed: what its files have said so far, in bounded memory."""

import json
import tomllib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from sslkit.errors import UserError
from sslkit.files.jsonl_reader import wrong_key
from sslkit.terminal import printed
from sslkit.watch.curve import Curve, finite
from sslkit.watch.run_state import LOCK, State, state_of
from sslkit.watch.tail import Tail, read_plain

MAX_BYTES = 1_000_000  # of recipe.toml and data.json
MOST_CURVES = 64
NEWEST = 20  # lines that speed is judged by
KNN = "kNN"
DIAGNOSES = ("effective_rank", "embedding_std", "lidar")
NO_CURVES = ("step", "epoch", "skipped")


class WatchedRun:
    """What is known of a run.

    Attributes:
        state: How it is.
        step: Updates logged.
        epoch: Passes logged.
        metrics: Curves of metrics.jsonl, by name.
        diagnoses: Likewise of diagnostics.jsonl.
        knn: The monitor's curve.
        skipped: Steps that did not reach the weights.
        alarms: Sentences of the newest diagnosis.
        past_alarms: Kinds of alarm that earlier ones raised.
        scores: The newest evaluations from outside, in words.
        bad_images: Lines of bad_samples.jsonl.
        odd: Of each file, the lines that lack what a row of it has, and are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.takers: dict[str, Callable[[dict[str, Any]], None]] = {
            "metrics": self._take_metrics,
            "results": self._take_results,
            "diagnostics": self._take_diagnostics,
            "bad_samples": self._take_bad_samples,
        }
        self.tails = {name: Tail(folder / f"{name}.jsonl") for name in self.takers}
        self.seen = False
        self.recipe: dict[str, Any] = {}
        self.images, self.stamp = 0.0, (0, 0)
        self.odd = dict.fromkeys(self.takers, 0)
        for name in self.takers:
            self._forget(name)
        self.state = State("waiting", "no run here yet")

    def look(self) -> bool:
        """Read what is new; returns whether there is more at once.

        Raises:
            UserError: The folder holds something else, a file of it cannot be read, or it is gone.
        """
        self._look_at_folder()
        more = False
        for name, tail in self.tails.items():
            news = tail.look()
            if news.again:
                self._forget(name)
            for row in news.rows:
                if wrong_key(name, row):
                    self.odd[name] += 1
                else:
                    self.takers[name](row)
            more |= news.more
        self.state = state_of(self.folder, self.step, self.last_step, self.seconds_a_line)
        return more

    @property
    def what(self) -> str:
        """Method and backbone."""
        names = (_of(self.recipe, "method").get("name"), _of(self.recipe, "backbone").get("name"))
        return printed("{} on {}".format(*names)) if all(names) else ""

    @property
    def epochs(self) -> float:
        """Passes over the data asked for; 0 if not known."""
        return finite(_of(self.recipe, "train").get("epochs")) or 0.0

    @property
    def batch_size(self) -> float:
        """Images of a global batch; 0 if not known."""
        return finite(_of(self.recipe, "train").get("batch_size")) or 0.0

    @property
    def last_step(self) -> int:
        """Updates that the run is to make, as the engine counts them; 0 if not known."""
        if not (self.epochs and self.batch_size):
            return 0
        whole = self.images // self.batch_size if self.images else round(self.step / self.epoch) if self.epoch else 0
        most = finite(_of(self.recipe, "train").get("max_steps")) or 0.0
        return int(min(most or self.epochs * whole, self.epochs * whole))

    @property
    def seconds_left(self) -> float | None:
        """By the speed of the newest lines; without evaluations and saves."""
        if not (self.speeds and self.last_step) or median(self.speeds) <= 0:
            return None
        return max(self.last_step - self.step, 0) * self.batch_size / median(self.speeds)

    @property
    def seconds_a_line(self) -> float:
        """Usual time between lines of metrics; 0 if not known."""
        every = finite(_of(self.recipe, "train").get("log_every")) or 0.0
        return every * self.batch_size / median(self.speeds) if self.speeds and median(self.speeds) > 0 else 0.0

    def _look_at_folder(self) -> None:
        try:
            names = {path.name for path in self.folder.iterdir()}
        except FileNotFoundError:
            if self.seen:
                raise UserError(f"{self.folder}: is gone; it was there a moment ago") from None
            return
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read: {error.strerror}") from error
        if "recipe.toml" in names:
            self._read_recipe()
        elif LOCK not in names and any(not name.startswith(".") and name != "checkpoints" for name in names):
            raise UserError(f"{self.folder}: not a run folder (no recipe.toml)")

    def _read_recipe(self) -> None:
        """Read it if it is another than before: a run may be continued with other limits."""
        file = self.folder / "recipe.toml"
        try:
            now = file.stat()
            if self.stamp != (now.st_ino, now.st_mtime_ns):
                self.recipe = tomllib.loads(read_plain(file, MAX_BYTES).decode())
                self.images, self.stamp, self.seen = _images(self.folder), (now.st_ino, now.st_mtime_ns), True
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: not a readable TOML file: {str(error)[:200]}") from error

    def _forget(self, name: str) -> None:
        self.odd[name] = 0
        if name == "metrics":
            self.step, self.epoch, self.skipped = 0, 0.0, 0
            self.metrics: dict[str, Curve] = {}
            self.speeds: deque[float] = deque(maxlen=NEWEST)
        elif name == "results":
            self.knn, self.scores = Curve(), deque[str](maxlen=3)
        elif name == "diagnostics":
            self.diagnoses: dict[str, Curve] = {}
            self.alarms: list[str] = []
            self.past_alarms: dict[str, None] = {}
        else:
            self.bad_images = 0

    def _take_metrics(self, row: dict[str, Any]) -> None:
        self.step, self.epoch = int(finite(row.get("step")) or 0.0), finite(row.get("epoch")) or 0.0
        self.skipped += bool(row.get("skipped"))
        if speed := finite(row.get("images_per_second")):
            self.speeds.append(speed)
        for name, value in row.items():
            known = name in self.metrics
            if name not in NO_CURVES and "/" not in name and (known or len(self.metrics) < MOST_CURVES):
                self.metrics.setdefault(name, Curve()).add(value)

    def _take_results(self, row: dict[str, Any]) -> None:
        accuracy = finite(row.get("accuracy"))
        if accuracy is None:
            return
        if row.get("by") == "monitor":
            self.knn.add(accuracy)
        else:
            name, step = printed(str(row.get("evaluation", "score"))[:60]), int(finite(row.get("step")) or 0.0)
            self.scores.append(f"{name}: {accuracy:.2%} at step {step}")

    def _take_diagnostics(self, row: dict[str, Any]) -> None:
        for name in DIAGNOSES:
            if name in row:
                self.diagnoses.setdefault(name, Curve()).add(row[name])
        raised = row.get("alarms")
        self.alarms = [printed(str(each)[:500]) for each in raised] if isinstance(raised, list) else []
        for alarm in self.alarms:
            if len(self.past_alarms) < MOST_CURVES:
                self.past_alarms[alarm.partition(":")[0]] = None

    def _take_bad_samples(self, _row: dict[str, Any]) -> None:
        self.bad_images += 1


def _images(folder: Path) -> float:
    """How many images the run began with; 0 if it did not write that down."""
    try:
        return finite(json.loads(read_plain(folder / "data.json", MAX_BYTES)).get("images")) or 0.0
    except (OSError, ValueError, AttributeError, RecursionError):
        return 0.0


def _of(recipe: dict[str, Any], table: str) -> dict[str, Any]:
    keys = recipe.get(table)
    return keys if isinstance(keys, dict) else {}
