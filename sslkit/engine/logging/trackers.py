"""What trackers are told of a run, next to the files that it always writes.

Accelerate's trackers, each on a thread of its own: a server that is away, a disk that is full or a fault in a tracker
can neither end nor slow the run. (`Accelerator.log` would call one after the other, on the thread that trains, and the
first that raises would end it.) Some of them know their run by the thread, so all their calls are made there.
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
from sslkit.engine.logging.sample_images import Draw
from sslkit.errors import UserError
from sslkit.files.atomic import replace_text
from sslkit.recipe.resolve import Recipe

Say = Callable[[str], None]
Work = Callable[[GeneralTracker], None]

MEMORY = "track.json"  # in the run folder: which runs of which trackers it is
MAX_BYTES = 10_000
PREFIXES = {"metrics": "train", "results": "monitor", "diagnostics": "diagnostics"}
WAITING = 1000  # lines that may wait for a tracker; more are left out
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds for which a tracker that failed is left alone
PATIENCE = 20.0  # seconds at the end of a run for what still waits
# What a tracker's start imports, on the thread that trains: data workers must not be forked in mid-import.
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


def check_trackers(recipe: Recipe) -> None:
    """See that the trackers asked for are installed.

    Raises:
        UserError: One is not.
    """
    for name in recipe.track.trackers:
        found = importlib.util.find_spec(name)  # a folder that a tracker left in the current one is found too
        if found is None or found.origin is None:
            raise UserError(f"[track] with: {name!r} is not installed; `pip install {name}`, or leave it out")


class Track:
    """One tracker on its thread. The first thing it is told starts it.

    Args:
        name: Accelerate's.
        start: Makes the tracker and starts it.
        say: Told once that it fails, and once that it is too slow.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker], say: Say) -> None:
        self.name, self.start, self.say = name, start, say
        self.waiting: queue.Queue[Work | None] = queue.Queue(WAITING)
        self.said: set[str] = set()
        # A tracker that hangs must not keep the process alive.
        self.thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
        self.thread.start()

    def do(self, work: Work) -> None:
        """Have something done by the tracker, some time; returns at once."""
        try:
            self.waiting.put_nowait(work)
        except queue.Full:
            self._complain("slow", f"is too slow or hangs: beyond {WAITING} lines that wait for it, more are left out")

    def close(self, deadline: float) -> None:
        """Let it finish, until ``deadline`` on the monotonic clock at the latest."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=max(deadline - time.monotonic(), 0.0))
        self.thread.join(timeout=max(deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            self._complain("late", "did not finish in time; its last lines may be missing there")

    def _work(self) -> None:
        tracker: GeneralTracker | None = None
        resume_at, pause = 0.0, FIRST_PAUSE
        while (work := self.waiting.get()) is not None:
            if time.monotonic() < resume_at:
                continue
            try:
                tracker = tracker or self.start()
                work(tracker)
                pause = FIRST_PAUSE
            except (Exception, SystemExit) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                self._complain("fault", f"fails: {reason}; the run goes on, and {self.name} is tried again later")
                _finish(tracker)
                tracker, resume_at, pause = None, time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
        _finish(tracker)

    def _complain(self, kind: str, sentence: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            self.say(f"WARNING: tracker {self.name} {sentence}")


class Tracks:
    """All trackers of a run; on all processes but the first there are none. Leaving it lets them finish.

    Args:
        recipe: Its ``[track]`` table says which.
        folder: Run folder, held by `sslkit.engine.run_folder.lock.hold_folder`.
        say: Told what goes wrong.
        active: Whether this process tracks at all.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Say, *, active: bool) -> None:
        self.shows_pictures = active and recipe.track.images and bool(recipe.track.trackers)
        self.say, self.tracks = say, list[Track]()
        if not active or not recipe.track.trackers:
            return
        memory = Memory(folder, say)
        for name in recipe.track.trackers:
            try:
                importlib.import_module(MODULES[name])
            except Exception as error:
                say(f"WARNING: tracker {name} cannot be imported: {error}; the run goes on without it")
            else:
                self.tracks.append(Track(name, partial(_start, name, recipe, folder, memory), say))

    def __enter__(self) -> "Tracks":
        return self

    def __exit__(self, *_exc: object) -> None:
        deadline = time.monotonic() + PATIENCE
        for track in self.tracks:
            track.close(deadline)

    def log(self, file: str, fields: Mapping[str, Any]) -> None:
        """Pass on the numbers of a line.

        Args:
            file: ``metrics``, ``results`` or ``diagnostics``.
            fields: The line; its step is the tracker's.
        """
        numbers = {
            _plain(f"{PREFIXES[file]}/{'knn' if (file, key) == ('results', 'accuracy') else key}"): float(value)
            for key, value in fields.items()
            if isinstance(value, int | float) and key != "step" and math.isfinite(value)
        }
        step = int(fields["step"])
        for track in self.tracks:
            track.do(lambda tracker: tracker.log(numbers, step=step))

    def show(self, name: str, step: int, draw: Draw) -> None:
        """Draw a picture, here and now, and pass it on; where it cannot be drawn, that is said once.

        Forking data workers while another thread reads images could leave them locks that nobody opens.
        """
        try:
            pixels = draw()
        except (UserError, UnreadableImage, OSError) as error:
            self.shows_pictures = False
            self.say(f"WARNING: no more pictures for trackers, for {name} cannot be drawn: {error}")
            return
        for track in self.tracks:
            track.do(lambda tracker: _show(tracker, name, step, pixels))


class Memory:
    """Which run of a tracker a run folder is, so that a run that is continued goes on there.

    Args:
        folder: Run folder.
        say: Told if that cannot be written down.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.file, self.say, self.ids = folder / MEMORY, say, dict[str, str]()
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            if self.file.is_file() and self.file.stat().st_size <= MAX_BYTES:
                found = json.loads(self.file.read_text(encoding="utf-8"))
                self.ids = {name: each for name, each in found.items() if re.fullmatch(r"[0-9a-f]{6,64}", str(each))}
        if "id" not in self.ids:
            self.keep("id", uuid.uuid4().hex[:12])

    def keep(self, name: str, value: str) -> None:
        """Remember an id."""
        self.ids[name] = value
        try:
            replace_text(self.file, json.dumps(self.ids) + "\n")
        except OSError as error:
            self.say(f"WARNING: {self.file}: {error.strerror or error}; a continued run may be another to its trackers")


def _start(name: str, recipe: Recipe, folder: Path, memory: Memory) -> GeneralTracker:
    project, run = recipe.track.project, printable(to_text(folder.resolve().name))
    words = {
        _plain(f"{table}.{key}"): str(value)
        for table, keys in recipe.as_tables().items()
        for key, value in keys.items()
    }
    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", folder)
        tracker.start()
        tracker.log({"recipe": f"```toml\n{recipe.to_toml()}```"})  # its hyperparameters would be a run of their own
    elif name == "wandb":
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        settings = importlib.import_module("wandb").Settings(console="off")  # the run's terminal stays its own
        words |= {"folder": run}
        identity = {"id": memory.ids["id"], "name": run, "resume": "allow"}
        tracker = WandBTracker(project, dir=str(folder), mode=mode, settings=settings, config=words, **identity)
        tracker.start()
    elif name == "trackio":
        tracker = TrackioTracker(project, name=f"{run}-{memory.ids['id'][:6]}", resume="allow", config=words)
        tracker.start()
    else:
        tracker = _start_mlflow(project, run, memory)
        if "mlflow" not in memory.ids:
            memory.keep("mlflow", tracker.tracker.info.run_id)
            tracker.store_init_configuration(words)  # never to be changed there
    return tracker


def _start_mlflow(project: str, run: str, memory: Memory) -> MLflowTracker:
    """The run that it was, if the server still knows it."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its own seven take minutes; it is tried again later
    if "mlflow" in memory.ids:
        tracker = MLflowTracker(project, run_id=memory.ids["mlflow"])
        try:
            tracker.start()
            return tracker
        except importlib.import_module("mlflow").exceptions.RestException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            del memory.ids["mlflow"]
    tracker = MLflowTracker(project, run_name=run)
    tracker.start()
    return tracker


def _show(tracker: GeneralTracker, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
    """A picture, in the way of each tracker: Accelerate knows of two."""
    if isinstance(tracker, TensorBoardTracker):
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        tracker.writer.flush()
    elif isinstance(tracker, WandBTracker):
        tracker.log_images({name: [pixels]}, step=step)
    elif isinstance(tracker, TrackioTracker):
        tracker.tracker.log({name: importlib.import_module("trackio").Image(pixels)}, step=step)
    else:
        importlib.import_module("mlflow").log_image(pixels, artifact_file=f"{name}/step-{step:08d}.png")


def _plain(name: str) -> str:
    """A name that every tracker takes."""
    return re.sub(r"[^\w./ -]", "_", name)


def _finish(tracker: GeneralTracker | None) -> None:
    if tracker is not None:
        with suppress(Exception, SystemExit):
            tracker.finish()
