"""Checks of the random draws: do views differ between each other, epochs, images and data workers?"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.loading.loader import make_loader
from sslkit.data.order.epoch_order import epoch_order
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.findings import Check, Finding
from sslkit.recipe.resolve import Recipe

VIEWS, EPOCHS, SAMPLES, WORKERS = map(Check, ("views", "views by epoch", "views by image", "views by worker"))

NUM_IMAGES = 8
Pixels = NDArray[np.uint8]


def check_views(recipe: Recipe, source: ImageSource) -> list[Finding]:
    """Make the views of a few images several times with the recipe's pipeline, and compare them."""
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    samples = [int(sample) for sample in epoch_order(recipe.train.seed, 0, len(source))[:NUM_IMAGES]]
    images = [source.read(sample) for sample in samples]
    now = [pipeline(image, 0, sample) for image, sample in zip(images, samples, strict=True)]
    later = [pipeline(image, 1, sample) for image, sample in zip(images, samples, strict=True)]
    of_one_image = [pipeline(images[0], 0, sample)[0] for sample in range(NUM_IMAGES)]
    first, second = ([views[index] for views in now] for index in (0, 1))
    pairs, epochs = equal_share(first, second), equal_share(first, [views[0] for views in later])
    others = equal_share([of_one_image[0]] * (NUM_IMAGES - 1), of_one_image[1:])
    if min(pairs, epochs, others) == 1.0:
        same = VIEWS.fault(
            "all views of an image are equal, as no transform is random: set views.crop_scale = [0.2, 1.0]"
        )
        return [same, *[check.not_applicable(f"see {VIEWS}") for check in (EPOCHS, SAMPLES, WORKERS)]]
    difference = float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(first, second, strict=True)]))
    by = f"by {difference:.0f} of {np.iinfo(first[0].dtype).max} on average"
    compared = (
        (VIEWS, pairs, "the two views of an image are equal", f"the two views of an image differ {by}"),
        (EPOCHS, epochs, "an image has the same views in every epoch", "an image has new views in every epoch"),
        (SAMPLES, others, "all images get the same transforms", "every image gets its own transforms"),
    )
    findings = [
        check.fault(f"{problem} ({equal:.0%} of {NUM_IMAGES} images): the random draws repeat")
        if equal > 0.5
        else check.ok(otherwise)
        for check, equal, problem, otherwise in compared
    ]
    if any(finding.verdict == "fault" for finding in findings):
        return [*findings, WORKERS.not_applicable("see the other checks of views")]
    return [*findings, check_workers(recipe, source, samples[0])]


def check_workers(recipe: Recipe, source: ImageSource, sample: int) -> Finding:
    """Let two data workers make the views of one image under different numbers, and compare them."""
    repeated = source.subset(np.full(2 * NUM_IMAGES, sample, dtype=np.int64))
    pipeline = ViewPipeline(recipe.views.model_copy(update={"device": "cpu"}), recipe.train.seed)
    batches = GlobalBatchSampler(len(repeated), NUM_IMAGES, recipe.train.seed, total_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        loaded = list(make_loader(repeated, pipeline, batches, workers=2, pin_memory=False))
    one, other = ([np.asarray(view) for view in batch.views[0]] for batch in loaded)
    image = repeated.read(0)
    here = [pipeline(image, 0, int(number))[0] for number in loaded[0].sample_ids]
    if equal_share(one, other) > 0.5:
        return WORKERS.fault("two data workers draw the same transforms")
    if equal_share(one, here) < 1.0:
        return WORKERS.fault(
            "a data worker makes other views than this process for the same epoch and image, so a resumed run differs"
        )
    return WORKERS.ok("views do not depend on which data worker makes them")


def equal_share(ones: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """Share of pairs that are equal in every pixel."""
    return float(np.mean([np.array_equal(a, b) for a, b in zip(ones, others, strict=True)]))
