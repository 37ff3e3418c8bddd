"""Evaluation by detection: the encoder is fine-tuned in a Faster or Mask R-CNN and scored by COCO's AP."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sslkit.data.decode.background import WHITE
from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import explain_death, prefetch_of
from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import AnnotatedImage
from sslkit.evaluate.detection.annotations import AnnotatedPair, open_annotated
from sslkit.evaluate.detection.average_precision import (
    AveragePrecision,
    Detections,
    average_precision,
    encode_mask,
    require_pycocotools,
)
from sslkit.evaluate.detection.detector import choose_arch
from sslkit.evaluate.detection.detector_training import DetectProtocol, train_detector
from sslkit.evaluate.detection.masks import check_masks
from sslkit.evaluate.evaluation_result import EvaluationResult, Score
from sslkit.evaluate.features.compared_encoders import TransferOptions, trained_encoders
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.labelled_data import Splits
from sslkit.evaluate.verdict import resampled_difference


def evaluate_detect(
    model: str,
    folder: str | Path,
    protocol: DetectProtocol,
    *,
    arch: str = "",
    masks: bool = False,
    splits: Splits | None = None,
    background: str = WHITE,
    options: TransferOptions | None = None,
) -> EvaluationResult:
    """Train a detector on the encoder and test it; the baseline is the same training from random weights.

    ``model`` is as for `load_encoder`, ``folder``, ``splits`` and ``background`` as for `open_annotated`. ``arch`` is
    ``c4`` or ``fpn``; by default c4 for ResNets, else fpn. ``masks`` trains and scores masks too (Mask R-CNN), in
    COCO's format only. The ``accuracy`` of the scores is the AP of boxes. Raises `UserError` if pycocotools is missing,
    the images, masks or the encoder do not fit, or the loss is not finite.
    """
    require_pycocotools()
    splits, options = splits or Splits(), options or TransferOptions()
    pair = open_annotated(folder, splits.train, splits.test, background)
    batch_bytes = _check_images(pair, protocol, options.workers, masks=masks)
    encoders = trained_encoders(model, "detection", options, protocol.seed)
    chosen = choose_arch(encoders[0], arch)
    training: dict[str, Any] = {"arch": chosen, "masks": masks, "workers": options.workers}
    found: list[AveragePrecision] = []
    for encoder in encoders:
        options.log_message(encoder.description)
        with explain_death(batch_bytes):
            detector = train_detector(encoder, pair, protocol, log_message=options.log_message, **training)
            found.append(score_detector(detector, pair, masks=masks, workers=options.workers))
    settings = {"kind": "detect", **vars(protocol), "arch": chosen, "masks": masks}
    settings |= {"peak_lr": protocol.peak_lr(encoders[0].is_vit), "selection": "none, the last update"}
    settings |= {name: list(encoders[0].preprocessing[name]) for name in ("mean", "std")} | pair.settings()
    name = f"detect {protocol.name} {chosen}{masks * ' masks'}, {protocol.steps} steps of {protocol.batch_size}"
    scores = [_score(*each, found[0], len(pair.test)) for each in zip(encoders, found, strict=True)]
    return EvaluationResult(name, pair.description, settings, scores, measure="box AP")


def _score(encoder: Encoder, found: AveragePrecision, own: AveragePrecision, images: int) -> Score:
    """The score of an encoder; that of a baseline has the difference of the encoder's ``own`` from it."""
    ap, intervals = found.measures["AP"], found.intervals
    difference = None
    if found is not own:
        resamples = own.resamples["AP"] - found.resamples["AP"]
        difference = resampled_difference(own.measures["AP"] - ap, resamples[~np.isnan(resamples)], images)
    revision = encoder.revision
    return Score(encoder.description, ap, intervals["AP"], "", found.measures, intervals, revision, difference)


def _check_images(pair: AnnotatedPair, protocol: DetectProtocol, workers: int, *, masks: bool) -> int:
    """Check all images before hours of training. Returns the size of the largest batch in bytes."""
    if masks and pair.format == "voc":
        raise UserError("--masks: VOC's annotations have boxes only; give a data set in COCO format")
    images = [*pair.train, *pair.test]
    if masks:
        check_masks(images)
    for image in images:
        image.check_size()
        shorter, longer = sorted((image.width, image.height))
        if longer > protocol.longest_side * shorter:
            raise UserError(
                f"{image.file}: is {image.width} x {image.height} pixels; resized to a longer side of "
                f"{protocol.longest_side}, its shorter side is below 1 pixel; leave it out"
            )
    batch_bytes = protocol.batch_size * max(3 * image.width * image.height for image in images)
    prefetch_of(batch_bytes, workers, "--workers", 2)
    return batch_bytes


@torch.inference_mode()
def detect_objects(
    detector: nn.Module, images: list[AnnotatedImage], *, masks: bool = False, workers: int = 0
) -> list[Detections]:
    """Run a detector in eval mode on all images, one at a time."""
    device = next(detector.parameters()).device
    # Its own generator, since a loader draws a seed for its workers.
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": start_worker, "generator": torch.Generator()}
    loader: Any = DataLoader(images, batch_size=None, collate_fn=_decode, **options)  # type: ignore[arg-type]
    detections = []
    for image in loader:
        (result,) = detector([image.to(device).float() / 255])
        arrays = {name: tensor.cpu().numpy() for name, tensor in result.items()}
        encoded = [encode_mask((mask[0] > 0.5).astype(np.uint8)) for mask in arrays["masks"]] if masks else []
        boxes = arrays["boxes"].astype(np.float64)
        detections.append(Detections(boxes, arrays["labels"], arrays["scores"], encoded))
    return detections


def score_detector(
    detector: nn.Module, pair: AnnotatedPair, *, masks: bool = False, workers: int = 0
) -> AveragePrecision:
    """AP, AP50 and AP75 of boxes on the test images; with masks also ``mask AP``, ``mask AP50`` and ``mask AP75``."""
    detections = detect_objects(detector, pair.test, masks=masks, workers=workers)
    boxes = average_precision(pair.test, detections, pair.classes)
    if not masks:
        return boxes
    segments = average_precision(pair.test, detections, pair.classes, "segm")
    return AveragePrecision(
        boxes.measures | {f"mask {name}": value for name, value in segments.measures.items()},
        boxes.resamples | {f"mask {name}": values for name, values in segments.resamples.items()},
    )


def _decode(image: AnnotatedImage) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(image.pixels().transpose(2, 0, 1).copy())
