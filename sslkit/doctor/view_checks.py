"""Do the views really differ: the two of an image, from epoch to epoch, from image to image, from worker to worker?"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.loading.loader import make_loader
from sslkit.data.order.epoch_order import epoch_order
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.findings import Finding, fault, not_applicable, ok
from sslkit.recipe.resolve import Recipe

VIEWS, EPOCHS, SAMPLES, WORKERS = "views", "views by epoch", "views by image", "views by worker"

IMAGES = 8
Pixels = NDArray[np.uint8]


def check_views(recipe: Recipe, source: ImageSource) -> list[Finding]:
    """Cut a few images again and again with the recipe's own pipeline."""
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    samples = [int(sample) for sample in epoch_order(recipe.train.seed, 0, len(source))[:IMAGES]]
    images = [source.read(sample) for sample in samples]
    now = [pipeline(image, 0, sample) for image, sample in zip(images, samples, strict=True)]
    later = [pipeline(image, 1, sample) for image, sample in zip(images, samples, strict=True)]
    twins = [pipeline(images[0], 0, sample)[0] for sample in range(IMAGES)]
    first, second = ([views[index] for views in now] for index in (0, 1))
    pairs, epochs = alike(first, second), alike(first, [views[0] for views in later])
    others = alike([twins[0]] * (IMAGES - 1), twins[1:])
    if min(pairs, epochs, others) == 1.0:
        same = fault(VIEWS, "every view of an image is the same: no transform in [views] is random")
        return [same, *[not_applicable(check, f"see {VIEWS}") for check in (EPOCHS, SAMPLES, WORKERS)]]
    apart = float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(first, second, strict=True)]))
    findings = [
        _judge(
            VIEWS,
            pairs,
            "the two views of an image are equal",
            f"differ by {apart:.0f} of {np.iinfo(first[0].dtype).max} on average",
        ),
        _judge(EPOCHS, epochs, "an image has the same views in every epoch", "an image is cut anew in every epoch"),
        _judge(SAMPLES, others, "every image is cut alike", "every image is cut in its own way"),
    ]
    if any(finding.verdict == "fault" for finding in findings):
        return [*findings, not_applicable(WORKERS, "see the other checks of views")]
    return [*findings, check_workers(recipe, source, samples[0])]


def check_workers(recipe: Recipe, source: ImageSource, sample: int) -> Finding:
    """Give one image to two workers under other numbers; the same draws in both would give equal views."""
    repeated = source.subset(np.full(2 * IMAGES, sample, dtype=np.int64))
    pipeline = ViewPipeline(recipe.views.model_copy(update={"device": "cpu"}), recipe.train.seed)
    batches = GlobalBatchSampler(len(repeated), IMAGES, recipe.train.seed, total_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two workers are more than a small machine's cores
        loaded = list(make_loader(repeated, pipeline, batches, workers=2, pin_memory=False))
    one, other = ([np.asarray(view) for view in batch.views[0]] for batch in loaded)
    image = repeated.read(0)
    here = [pipeline(image, 0, int(number))[0] for number in loaded[0].sample_ids]
    if alike(one, other) > 0.5:
        return fault(WORKERS, "two workers draw the same transforms: every worker repeats what the others cut")
    if alike(one, here) < 1.0:
        return fault(
            WORKERS,
            "a worker cuts other views than this process for the same epoch and image: a resumed run would differ",
        )
    return ok(WORKERS, "differ between workers, and are the same whichever worker cuts them")


def alike(ones: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """Share of pairs that are equal, pixel for pixel."""
    return float(np.mean([np.array_equal(a, b) for a, b in zip(ones, others, strict=True)]))


def _judge(check: str, equal: float, complaint: str, praise: str) -> Finding:
    return fault(check, f"{complaint} ({equal:.0%} of those tried)") if equal > 0.5 else ok(check, praise)
