"""Experiment trackers (TensorBoard, W&B, trackio, MLflow), told what a run writes to its own files.

They are Accelerate's trackers, each on a thread of its own, so that a server that is away, a full disk or a fault in a
tracker can neither end nor slow the run. `Accelerator.log` would call them on the training thread, and the first that
raises would end the run. Some trackers find their run by the thread, so that all calls are made on that thread.
"""

import importlib
import importlib.util
import json
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from numpy.typing import NDArray

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.engine.logging.sample_images import DrawImage
from sslkit.errors import UserError
from sslkit.files.atomic import replace_text
from sslkit.recipe.resolve import Recipe

LogMessage = Callable[[str], None]
Call = Callable[[GeneralTracker], None]

IDS_FILE = "track.json"  # in the run folder: the ids by which trackers know the run
MAX_BYTES = 10_000
PREFIXES = {"metrics": "train", "results": "monitor", "diagnostics": "diagnostics"}
QUEUE_SIZE = 1000  # calls that may wait for a tracker; more are dropped
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds before a tracker that failed is tried again
CLOSE_SECONDS = 20.0  # for the calls that still wait at the end of a run
# What starting a tracker imports; imported on the training thread, as data workers must not fork during an import.
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


def check_trackers(recipe: Recipe) -> None:
    """Check that the trackers of ``[track]`` are installed.

    Raises:
        UserError: One is not.
    """
    for name in recipe.track.trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without origin: a folder that a tracker left here
            raise UserError(f"[track] with: {name!r} is not installed; `pip install {name}`, or leave it out")


class TrackerThread:
    """One tracker on a thread of its own; the first call starts it. Each kind of fault is logged once."""

    def __init__(self, name: str, start: Callable[[], GeneralTracker], log_message: LogMessage) -> None:
        self.name, self.start, self.log_message = name, start, log_message
        self.calls: queue.Queue[Call | None] = queue.Queue(QUEUE_SIZE)
        self.warned: set[str] = set()
        # A daemon, so that a tracker that hangs does not keep the process alive.
        self.thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
        self.thread.start()

    def submit(self, call: Call) -> None:
        """Queue a call of the tracker; returns at once."""
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            self._warn("slow", f"is too slow or hangs: {QUEUE_SIZE} lines wait for it, and more are left out")

    def close(self, deadline: float) -> None:
        """Let the tracker finish, at most until ``deadline`` on the monotonic clock."""
        with suppress(queue.Full):
            self.calls.put(None, timeout=max(deadline - time.monotonic(), 0.0))
        self.thread.join(timeout=max(deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            self._warn("late", "did not finish in time; its last lines may be missing there")

    def _work(self) -> None:
        tracker: GeneralTracker | None = None
        resume_at, pause = 0.0, FIRST_PAUSE
        while (call := self.calls.get()) is not None:
            if time.monotonic() < resume_at:
                continue
            try:
                tracker = tracker or self.start()
                call(tracker)
                pause = FIRST_PAUSE
            except (Exception, SystemExit) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                self._warn("fault", f"fails: {reason}; the run continues, and {self.name} is tried again later")
                _finish(tracker)
                tracker, resume_at, pause = None, time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
        _finish(tracker)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            self.log_message(f"WARNING: tracker {self.name} {message}")


class Trackers:
    """All trackers of a run; none on any process but the first. As a context manager it lets them finish on leaving.

    Args:
        recipe: Its ``[track]`` table names the trackers.
        folder: Run folder, held by `sslkit.engine.run_folder.lock.hold_folder`.
        log_message: Called with each warning.
        active: Whether this process tracks at all.
    """

    def __init__(self, recipe: Recipe, folder: Path, log_message: LogMessage, *, active: bool) -> None:
        self.log_images = active and recipe.track.images and bool(recipe.track.trackers)
        self.log_message, self.threads = log_message, list[TrackerThread]()
        if not active or not recipe.track.trackers:
            return
        ids = TrackerIds(folder, log_message)
        for name in recipe.track.trackers:
            try:
                importlib.import_module(MODULES[name])
            except Exception as error:
                log_message(f"WARNING: tracker {name} cannot be imported: {error}; the run continues without it")
            else:
                start = partial(_start, name, recipe, folder, ids)
                self.threads.append(TrackerThread(name, start, log_message))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_exc: object) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self.threads:
            thread.close(deadline)

    def log(self, file: str, fields: Mapping[str, Any]) -> None:
        """Log the numbers of a line.

        Args:
            file: ``metrics``, ``results`` or ``diagnostics``.
            fields: The line; its ``step`` is the tracker's step.
        """
        numbers = {
            _tracker_key(f"{PREFIXES[file]}/{'knn' if (file, key) == ('results', 'accuracy') else key}"): float(value)
            for key, value in fields.items()
            if isinstance(value, int | float) and key != "step" and math.isfinite(value)
        }
        step = int(fields["step"])
        for thread in self.threads:
            thread.submit(lambda tracker: tracker.log(numbers, step=step))

    def log_image(self, name: str, step: int, draw: DrawImage) -> None:
        """Draw an image on the calling thread and log it; images are given up, with a warning, if that fails.

        Forking data workers while another thread reads images could leave them locks that nobody releases.
        """
        try:
            pixels = draw()
        except (UserError, UnreadableImage, OSError) as error:
            self.log_images = False
            self.log_message(f"WARNING: trackers get no more images, for {name} cannot be drawn: {error}")
            return
        for thread in self.threads:
            thread.submit(lambda tracker: _log_image(tracker, name, step, pixels))


class TrackerIds:
    """The ids by which trackers know a run, kept in its folder, so that a continued run continues there too."""

    def __init__(self, folder: Path, log_message: LogMessage) -> None:
        self.file, self.log_message, self.ids = folder / IDS_FILE, log_message, dict[str, str]()
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            if self.file.is_file() and self.file.stat().st_size <= MAX_BYTES:
                found = json.loads(self.file.read_text(encoding="utf-8"))
                self.ids = {name: each for name, each in found.items() if re.fullmatch(r"[0-9a-f]{6,64}", str(each))}
        if "id" not in self.ids:
            self.save("id", uuid.uuid4().hex[:12])

    def save(self, name: str, value: str) -> None:
        """Remember an id."""
        self.ids[name] = value
        try:
            replace_text(self.file, json.dumps(self.ids) + "\n")
        except OSError as error:
            self.log_message(
                f"WARNING: {self.file}: {error.strerror or error}; trackers may take a continued run for a new one"
            )


def _start(name: str, recipe: Recipe, folder: Path, ids: TrackerIds) -> GeneralTracker:
    """Create a tracker with the run's project, name, id and recipe, and start it."""
    project, run = recipe.track.project, printable(to_text(folder.resolve().name))
    config = {
        _tracker_key(f"{table}.{key}"): str(value)
        for table, keys in recipe.as_tables().items()
        for key, value in keys.items()
    }
    tracker: GeneralTracker
    if name == "mlflow":
        return _start_mlflow(project, run, ids, config)
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        settings = importlib.import_module("wandb").Settings(console="off")  # leaves the run's terminal alone
        options = {"dir": str(folder), "mode": mode, "settings": settings, "config": config | {"folder": run}}
        tracker = WandBTracker(project, id=ids.ids["id"], name=run, resume="allow", **options)
    elif name == "trackio":
        tracker = TrackioTracker(project, name=f"{run}-{ids.ids['id'][:6]}", resume="allow", config=config)
    else:
        tracker = TensorBoardTracker("tensorboard", folder)
    tracker.start()
    if name == "tensorboard":  # as text: its hyperparameters would be a run of their own
        tracker.log({"recipe": f"```toml\n{recipe.to_toml()}```"})
    return tracker


def _start_mlflow(project: str, run: str, ids: TrackerIds, config: dict[str, str]) -> MLflowTracker:
    """Continue the MLflow run that this run is, if the server still has it; else create one."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its seven retries take minutes; we try again later
    if "mlflow" in ids.ids:
        tracker = MLflowTracker(project, run_id=ids.ids["mlflow"])
        try:
            tracker.start()
            return tracker
        except importlib.import_module("mlflow").exceptions.RestException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    tracker = MLflowTracker(project, run_name=run)
    tracker.start()
    ids.save("mlflow", tracker.tracker.info.run_id)
    tracker.store_init_configuration(config)  # MLflow refuses a second configuration of a run
    return tracker


def _log_image(tracker: GeneralTracker, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
    """Log an image; Accelerate does it for TensorBoard and W&B only."""
    if isinstance(tracker, TensorBoardTracker):
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        tracker.writer.flush()
    elif isinstance(tracker, WandBTracker):
        tracker.log_images({name: [pixels]}, step=step)
    elif isinstance(tracker, TrackioTracker):
        tracker.tracker.log({name: importlib.import_module("trackio").Image(pixels)}, step=step)
    else:
        importlib.import_module("mlflow").log_image(pixels, artifact_file=f"{name}/step-{step:08d}.png")


def _tracker_key(name: str) -> str:
    """A name without the characters that some tracker refuses."""
    return re.sub(r"[^\w./ -]", "_", name)


def _finish(tracker: GeneralTracker | None) -> None:
    if tracker is not None:
        with suppress(Exception, SystemExit):
            tracker.finish()
