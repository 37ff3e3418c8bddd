"""Experiment trackers (TensorBoard, W&B, trackio, MLflow), told what a run writes to its own files.

They are Accelerate's trackers, each on a thread of its own (by which some find their run). So an unreachable server, a
full disk or a fault in a tracker can neither end nor slow the run, as it would with `Accelerator.log`.
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
from typing import Annotated, Any

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from numpy.typing import NDArray
from pydantic import Field, RootModel

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.engine.logging.sample_images import DrawImage
from sslkit.errors import UserError, first_line
from sslkit.files.atomic import replace_text
from sslkit.files.json_reader import read_json
from sslkit.recipe.resolve import Recipe

LogMessage = Callable[[str], None]
Call = Callable[[GeneralTracker], None]

IDS_FILE = "track.json"  # in the run folder
MAX_BYTES = 10_000
PREFIXES = {"metrics": "train", "results": "monitor", "diagnostics": "diagnostics"}
QUEUE_SIZE = 1000  # calls that may wait for a tracker; more are dropped
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds before a tracker that failed is tried again
CLOSE_SECONDS = 20.0  # for the calls that still wait at the end of a run
# What starting a tracker imports; imported on the training thread, as data workers must not fork during an import.
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


def check_trackers(recipe: Recipe) -> None:
    """Raise a UserError if a tracker of ``[track]`` is not installed."""
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
                reason = f"fails: {first_line(error, 300)}; the run continues, and {self.name} is tried again later"
                self._warn("fault", reason)
                _finish(tracker)
                tracker, resume_at, pause = None, time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
        _finish(tracker)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            self.log_message(f"WARNING: tracker {self.name} {message}")


class SavedIds(RootModel[dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{6,64}$")]]]):
    """The content of ``track.json``: the ids by which trackers know a run, so that a continued run continues there."""


class Trackers:
    """The trackers that ``[track]`` names, on the ``active`` process. As a context manager it lets them finish.

    ``folder`` is the locked run folder. ``log_message`` is called with each warning.
    """

    def __init__(self, recipe: Recipe, folder: Path, log_message: LogMessage, *, active: bool) -> None:
        self.recipe, self.folder, self.log_message = recipe, folder, log_message
        names = recipe.track.trackers if active else []
        self.log_images = bool(names) and recipe.track.images
        self.threads, self.ids = list[TrackerThread](), dict[str, str]()
        with suppress(OSError, ValueError):
            self.ids = read_json(folder / IDS_FILE, SavedIds, MAX_BYTES).root
        if names and "id" not in self.ids:
            self._save_id("id", uuid.uuid4().hex[:12])
        for name in names:
            try:
                importlib.import_module(MODULES[name])
            except Exception as error:
                log_message(f"WARNING: tracker {name} cannot be imported: {error}; the run continues without it")
                continue
            self.threads.append(TrackerThread(name, partial(self._start, name), log_message))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_exc: object) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self.threads:
            thread.close(deadline)

    def log(self, file: str, fields: Mapping[str, Any]) -> None:
        """Log the numbers of a line of ``metrics``, ``results`` or ``diagnostics``, at the ``step`` in it."""
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
        if not self.log_images:
            return
        try:
            pixels = draw()
        except (UserError, UnreadableImage, OSError) as error:
            self.log_images = False
            self.log_message(f"WARNING: trackers get no more images, for {name} cannot be drawn: {error}")
            return
        for thread in self.threads:
            thread.submit(lambda tracker: _log_image(tracker, name, step, pixels))

    def _save_id(self, name: str, value: str) -> None:
        self.ids[name] = value
        try:
            replace_text(self.folder / IDS_FILE, json.dumps(self.ids) + "\n")
        except OSError as error:
            problem = f"{self.folder / IDS_FILE}: {error.strerror or error}"
            self.log_message(f"WARNING: {problem}; trackers may take a continued run for a new one")

    def _start(self, name: str) -> GeneralTracker:
        """Create a tracker with the run's project, name, id and recipe, and start it."""
        project, run = self.recipe.track.project, printable(to_text(self.folder.resolve().name))
        tables = self.recipe.as_tables()
        config = {_tracker_key(f"{table}.{key}"): str(tables[table][key]) for table in tables for key in tables[table]}
        tracker: GeneralTracker
        if name == "mlflow":
            return self._start_mlflow(project, run, config)
        if name == "wandb":
            mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
            settings = importlib.import_module("wandb").Settings(console="off")  # leaves the run's terminal alone
            options = {"dir": str(self.folder), "mode": mode, "settings": settings, "config": config | {"folder": run}}
            tracker = WandBTracker(project, id=self.ids["id"], name=run, resume="allow", **options)
        elif name == "trackio":
            tracker = TrackioTracker(project, name=f"{run}-{self.ids['id'][:6]}", resume="allow", config=config)
        else:
            tracker = TensorBoardTracker("tensorboard", self.folder)
        tracker.start()
        if name == "tensorboard":  # as text: its hyperparameters would be a run of their own
            tracker.log({"recipe": f"```toml\n{self.recipe.to_toml()}```"})
        return tracker

    def _start_mlflow(self, project: str, run: str, config: dict[str, str]) -> MLflowTracker:
        """Continue the MLflow run that this run is, if the server still has it; else create one."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its seven take minutes; we try again later
        if "mlflow" in self.ids:
            tracker = MLflowTracker(project, run_id=self.ids["mlflow"])
            try:
                tracker.start()
                return tracker
            except importlib.import_module("mlflow").exceptions.RestException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        tracker = MLflowTracker(project, run_name=run)
        tracker.start()
        self._save_id("mlflow", tracker.tracker.info.run_id)
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
