"""Everything the loop turns, in one place."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from sslkit.data.batch import Batch
from sslkit.data.order.epoch_order import OrderPlan
from sslkit.engine.monitor.diagnostics import Diagnostics
from sslkit.engine.monitor.knn_monitor import KnnMonitor
from sslkit.engine.resilience.guard import Course
from sslkit.engine.run_folder.dataset_identity import BadSamples
from sslkit.methods import Method
from sslkit.recipe.resolve import Recipe


@dataclass
class Training:
    """A run that is ready to go.

    Attributes:
        recipe: What was asked for.
        folder: Run folder.
        accelerator: Device, precision and processes.
        method: The method itself.
        wrapped: The method as Accelerate wraps it; called for the loss.
        optimizer: As Accelerate wraps it.
        loader: Batches from ``start_step`` on.
        images: How many the data has.
        steps_per_epoch: Whole global batches in the data.
        start_step: Updates made before this process started.
        last_step: Updates after which to stop.
        monitor: kNN on a labelled set, or None.
        diagnostics: What is watched without labels, or None.
        course: Troubles so far.
        bad_samples: The images that cannot be read.
        plan: How samples make an epoch; see `ImageSource`.
    """

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    method: Method
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    loader: Iterable[Batch]
    images: int
    steps_per_epoch: int
    start_step: int
    last_step: int
    monitor: KnnMonitor | None
    diagnostics: Diagnostics | None
    course: Course
    bad_samples: BadSamples
    plan: OrderPlan | None
