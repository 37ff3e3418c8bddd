"""A run that is being watched: what its files contain so far, in bounded memory."""

import json
import tomllib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from sslkit.errors import UserError
from sslkit.files.jsonl_reader import LogFollower, Row, number
from sslkit.files.run_reader import LOCK, RECIPE, RunReader, read_regular
from sslkit.terminal import sanitize
from sslkit.watch.run_state import State, state_of
from sslkit.watch.terminal_curve import Curve

MAX_BYTES = 1_000_000  # of recipe.toml and data.json
MAX_CURVES = 64
SPEED_LINES = 20  # newest lines that the remaining time is estimated from
KNN = "kNN"
DIAGNOSTICS = ("effective_rank", "embedding_std", "lidar")
NOT_CURVES = ("step", "epoch", "skipped")


class WatchedRun:
    """What is known of a run: its state, and curves and messages from its logs. See `_reset` for the attributes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reader = folder, RunReader(folder)
        self.row_handlers: dict[str, Callable[[Row], None]] = {
            "metrics": self._add_metrics,
            "results": self._add_result,
            "diagnostics": self._add_diagnosis,
            "bad_samples": self._count_bad_image,
        }
        self.followers = {name: LogFollower(folder / f"{name}.jsonl") for name in self.row_handlers}
        self._use_recipe({})
        self.recipe_stamp: tuple[int, int] | None = None  # of the file that was read
        self.num_images = 0.0
        self.invalid: dict[str, int] = {}
        for name in self.row_handlers:
            self._reset(name)
        self.state = State("waiting", "no run here yet")

    def read_new(self) -> bool:
        """Read what is new; returns whether there is more to read now. Raises `UserError` if this is no run."""
        self._read_folder()
        more = False
        for name, follower in self.followers.items():
            new = follower.read()
            if new.restarted:
                self._reset(name)
            for row in new.rows:
                self.row_handlers[name](row)
            self.invalid[name] += new.num_invalid
            more |= new.more
        self.state = state_of(self.reader, self.step, self.last_step, self.seconds_per_line)
        return more

    @property
    def last_step(self) -> int:
        """Steps of the whole run, as the engine counts them; 0 if unknown."""
        if not (self.epochs and self.batch_size):
            return 0
        observed = round(self.step / self.epoch) if self.epoch else 0
        steps = self.epochs * (self.num_images // self.batch_size if self.num_images else observed)
        return int(min(self.max_steps or steps, steps))

    @property
    def speed(self) -> float:
        """Images per second in the newest rows of metrics; 0 if unknown."""
        return median(self.speeds) if self.speeds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the speed of the newest rows, without evaluations and checkpoints; None if unknown."""
        if not (self.speed and self.last_step):
            return None
        return max(self.last_step - self.step, 0) * self.batch_size / self.speed

    @property
    def seconds_per_line(self) -> float:
        """Usual time between two rows of metrics; 0 if unknown."""
        return self.log_every * self.batch_size / self.speed if self.speed else 0.0

    def _read_folder(self) -> None:
        try:
            names = {path.name for path in self.folder.iterdir()}
        except FileNotFoundError:
            if self.recipe_stamp:
                raise UserError(f"{self.folder}: the run folder was removed or renamed while it was watched") from None
            return
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read: {error.strerror}") from error
        if RECIPE in names:
            self._read_recipe()
        elif LOCK not in names and any(not name.startswith(".") and name != "checkpoints" for name in names):
            self.reader.check()

    def _read_recipe(self) -> None:
        """Read the recipe if it has changed: a run may be continued with other limits."""
        file = self.folder / RECIPE
        try:
            status = file.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if self.recipe_stamp != stamp:
                self._use_recipe(tomllib.loads(read_regular(file, MAX_BYTES).decode()))
                self.num_images, self.recipe_stamp = _num_images(self.folder), stamp
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: not a readable TOML file: {str(error)[:200]}") from error

    def _use_recipe(self, tables: dict[str, Any]) -> None:
        """Keep what the page needs of the recipe. A number that is not known is 0, and the title then empty."""
        method, backbone, train = (
            table if isinstance(table := tables.get(name), dict) else {} for name in ("method", "backbone", "train")
        )
        names = method.get("name"), backbone.get("name")
        self.title = sanitize("{} on {}".format(*names)) if all(names) else ""
        keys = ("epochs", "batch_size", "max_steps", "log_every")
        self.epochs, self.batch_size, self.max_steps, self.log_every = (number(train.get(key)) or 0.0 for key in keys)

    def _reset(self, name: str) -> None:
        """Forget what a log has told."""
        self.invalid[name] = 0  # lines that were skipped
        if name == "metrics":
            self.step, self.epoch = 0, 0.0  # of the newest row
            self.skipped = 0  # steps with non-finite numbers
            self.metrics: dict[str, Curve] = {}
            self.speeds: deque[float] = deque(maxlen=SPEED_LINES)
        elif name == "results":
            self.knn, self.scores = Curve(), deque[str](maxlen=3)
        elif name == "diagnostics":
            self.diagnostics: dict[str, Curve] = {}
            self.alarms: list[str] = []  # of the newest diagnosis
            self.past_alarms: dict[str, None] = {}  # kinds
        else:
            self.bad_images = 0

    def _add_metrics(self, row: Row) -> None:
        self.step, self.epoch = int(row["step"]), float(row["epoch"])
        self.skipped += bool(row.get("skipped"))
        speed = number(row.get("images_per_second")) or 0.0
        if speed > 0:
            self.speeds.append(speed)
        for name, value in row.items():
            known = name in self.metrics
            if name not in NOT_CURVES and "/" not in name and (known or len(self.metrics) < MAX_CURVES):
                self.metrics.setdefault(name, Curve()).add(value)

    def _add_result(self, row: Row) -> None:
        accuracy = float(row["accuracy"])
        if row.get("by") == "monitor":
            self.knn.add(accuracy)
        else:
            name = sanitize(str(row.get("evaluation", "score"))[:60])
            self.scores.append(f"{name}: {accuracy:.2%} at step {int(row['step'])}")

    def _add_diagnosis(self, row: Row) -> None:
        for name in DIAGNOSTICS:
            if name in row:
                self.diagnostics.setdefault(name, Curve()).add(row[name])
        self.alarms = [sanitize(alarm[:500]) for alarm in row.get("alarms", [])]
        for alarm in self.alarms:
            if len(self.past_alarms) < MAX_CURVES:
                self.past_alarms[alarm.partition(":")[0]] = None

    def _count_bad_image(self, _row: Row) -> None:
        self.bad_images += 1


def _num_images(folder: Path) -> float:
    """Number of images at the start of the run; 0 if unknown."""
    try:
        return number(json.loads(read_regular(folder / "data.json", MAX_BYTES)).get("images")) or 0.0
    except (OSError, ValueError, AttributeError, RecursionError):
        return 0.0
