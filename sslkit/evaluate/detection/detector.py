"""torchvision's Faster and Mask R-CNN over a timm encoder, built as MoCo's detection transfer is.

Two ways to put an encoder under a detector:

- ``c4``, ResNets only: features after the third stage (stride 16); the last stage looks at each region, with an extra
  BatchNorm after it (MoCo's Res5ROIHeadsExtraNorm). Masks share that stage.
- ``fpn``: a feature pyramid over the maps of strides 4, 8, 16 and 32. A plain ViT has one map: ViTDet's simple
  feature pyramid (arXiv:2203.16527) makes four of it.
"""

import itertools
from collections import OrderedDict
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sslkit.errors import UserError
from sslkit.evaluate.features.extraction import Encoder, build
from sslkit.parts.backbone import family

Arch = Literal["c4", "fpn"]

RATIOS = (0.5, 1.0, 2.0)
PYRAMID_LEVELS = 4
PYRAMID_WIDTH = 256
HEAD_WIDTH = 1024
MASK_WIDTH = 256
# A region of 224 pixels, in an image whose anchors are 32 to 512, is read from the third level (arXiv:1612.03144).
REGION_PER_MIDDLE_ANCHOR = 224 / 128
# Proposals before suppression in training and in testing, and after it in training: detectron2's defaults, MoCo's
# where it tests with C4. Those of FPN before suppression are of a level.
PROPOSALS = {"c4": (12000, 6000, 2000), "fpn": (2000, 1000, 1000)}
MOST_TESTED_REGIONS = 1000


def choose_arch(encoder: Encoder, name: str = "") -> Arch:
    """The architecture of this name; without one ``c4`` for ResNets, as in the papers, else ``fpn``."""
    if name not in ("", *PROPOSALS):
        raise UserError(f"--arch: must be c4 or fpn, not {name!r}")
    if name == "c4" or (not name and family(encoder.architecture) == "resnet"):
        return "c4"
    return "fpn"


def make_detector(
    encoder: Encoder,
    num_classes: int,
    arch: Arch,
    *,
    masks: bool,
    short_sides: tuple[int, ...],
    longest_side: int,
    anchor_sizes: tuple[float, ...],
    regions: int = 512,
) -> FasterRCNN:
    """A detector over a copy of ``encoder``, everything trainable; the encoder itself stays as it is.

    Args:
        encoder: Weights and mean and std of the pictures.
        num_classes: Without the background.
        arch: How the encoder is put under it.
        masks: Whether it finds masks too.
        short_sides: Shorter sides in pixels, one drawn for each training picture; the last one in testing.
        longest_side: Neither side becomes longer.
        anchor_sizes: Five sides of square anchors in pixels, ascending.
        regions: Of a picture that the head learns from; in testing it looks at twice as many, at most 1000.

    Raises:
        UserError: An encoder that has no such maps.
    """
    model = _copy_for_any_size(encoder)
    body: C4Body | PyramidBody = _c4_body(encoder, model) if arch == "c4" else _pyramid_body(encoder, model)
    padding = body.size_divisible
    _check_runs(body, encoder, padding)
    pool = RegionPool(body.strides, 14 if arch == "c4" else 7, REGION_PER_MIDDLE_ANCHOR * anchor_sizes[2])
    head, width = _box_head(body)
    predictor = FastRCNNPredictor(width, num_classes + 1)
    _initialise(predictor)
    sizes = (tuple(anchor_sizes),) if arch == "c4" else tuple((size,) for size in anchor_sizes)
    before_train, before_test, after_train = PROPOSALS[arch]
    detector = FasterRCNN(
        body,
        min_size=short_sides,
        max_size=longest_side,
        image_mean=list(encoder.preprocessing["mean"]),
        image_std=list(encoder.preprocessing["std"]),
        rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        rpn_pre_nms_top_n_train=before_train,
        rpn_pre_nms_top_n_test=before_test,
        rpn_post_nms_top_n_train=after_train,
        rpn_post_nms_top_n_test=min(2 * regions, MOST_TESTED_REGIONS),
        box_batch_size_per_image=regions,
        box_roi_pool=pool,
        box_head=head,
        box_predictor=predictor,
        size_divisible=padding,
    )
    if masks:
        _add_masks(detector, body, pool, width, num_classes)
    return detector


class C4Body(nn.Module):
    """A ResNet up to its third stage; the fourth is kept aside for the regions."""

    def __init__(self, model: Any, stride: int) -> None:
        super().__init__()
        parts = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3")
        self.stages = nn.Sequential(OrderedDict((name, getattr(model, name)) for name in parts))
        # In a list, so that its parameters belong to the head alone.
        self.last_stage = [model.layer4]
        self.out_channels: int = model.feature_info[-2]["num_chs"]
        self.last_width: int = model.num_features
        self.strides = (stride,)
        self.size_divisible = 2 * stride

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to the map ``"0"``, (B, C, H / stride, W / stride)."""
        return {"0": self.stages(images)}


class PyramidBody(nn.Module):
    """An encoder's maps through a feature pyramid: levels "0" to "3" and a pooled one above for proposals."""

    out_channels = PYRAMID_WIDTH

    def __init__(self, model: Any, layers: list[int], strides: tuple[int, ...], pyramid: nn.Module) -> None:
        super().__init__()
        self.model, self.layers, self.pyramid = model, layers, pyramid
        self.strides = strides
        self.size_divisible = 2 * strides[-1]  # the pooled level's anchors, too, fall on whole cells

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to five maps of `PYRAMID_WIDTH` channels."""
        norm = len(self.layers) == 1  # a ViT's last map is read after its last norm, a convolutional net's before
        maps = self.model.forward_intermediates(images, indices=self.layers, intermediates_only=True, norm=norm)
        levels: dict[str, Tensor] = self.pyramid(OrderedDict((str(number), each) for number, each in enumerate(maps)))
        return levels


class SimplePyramid(nn.Module):
    """ViTDet's: one map of stride s to four of strides s / 4 to 2 s, by itself and not by sums with its neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        up_4 = nn.Sequential(
            nn.ConvTranspose2d(width, half, 2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        )
        up_2 = nn.ConvTranspose2d(width, half, 2, stride=2)
        stems: list[tuple[nn.Module, int]] = [
            *((up_4, quarter), (up_2, half)),
            *((nn.Identity(), width), (nn.MaxPool2d(2), width)),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                stem,
                nn.Conv2d(channels, PYRAMID_WIDTH, 1, bias=False),
                LayerNorm2d(PYRAMID_WIDTH),
                nn.Conv2d(PYRAMID_WIDTH, PYRAMID_WIDTH, 3, padding=1, bias=False),
                LayerNorm2d(PYRAMID_WIDTH),
            )
            for stem, channels in stems
        )

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """The map ``"0"`` to four, and the coarsest one halved."""
        made = {str(number): level(maps["0"]) for number, level in enumerate(self.levels)}
        return made | {"pool": nn.functional.max_pool2d(made["3"], 1, stride=2)}


class RegionPool(MultiScaleRoIAlign):  # type: ignore[misc]
    """Regions off the maps, sampled as detectron2's ROIAlignV2 does (half a pixel right of torchvision's own pooling).

    Args:
        strides: Of the maps in image pixels.
        side: Of the pooled square.
        middle_region: Root of the area, in pixels, of a region that is read from the third of four maps.
    """

    def __init__(self, strides: tuple[int, ...], side: int, middle_region: float) -> None:
        super().__init__([str(level) for level in range(len(strides))], side, sampling_ratio=0)
        self.strides, self.side, self.middle_region = strides, side, middle_region

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """Pool every box of every image: (boxes, C, side, side)."""
        regions = torch.cat(boxes)
        owners = torch.cat([torch.full_like(each[:, :1], number) for number, each in enumerate(boxes)])
        rows = torch.cat([owners, regions], dim=1)
        if len(self.strides) == 1:
            return self._cut(x["0"], rows, 0)
        level_of = self.levels_of(regions)
        features = x["0"]
        pooled = features.new_zeros(len(rows), features.shape[1], self.side, self.side)
        for level in range(len(self.strides)):
            chosen = (level_of == level).nonzero().flatten()
            pooled[chosen] = self._cut(x[str(level)], rows[chosen], level)
        return pooled

    def _cut(self, features: Tensor, rows: Tensor, level: int) -> Tensor:
        scale = 1 / self.strides[level]
        cut: Tensor = roi_align(features, rows, self.side, scale, sampling_ratio=0, aligned=True)
        return cut

    def levels_of(self, regions: Tensor) -> Tensor:
        """The map each region is read from, (N,): one level up for each doubling of its side (arXiv:1612.03144)."""
        sides = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])).clamp_min(1e-8).sqrt()
        levels = (2 + torch.log2(sides / self.middle_region) + 1e-6).floor()
        return levels.clamp(0, len(self.strides) - 1).long()


def _copy_for_any_size(encoder: Encoder) -> nn.Module:
    """The encoder again, with the position embedding of a ViT interpolated to each picture's size."""
    try:
        args = {**encoder.model_args, "dynamic_img_size": True}
        model = build(encoder.architecture, args, encoder.small_stem)
    except TypeError:  # an architecture that takes any size as it is
        model = build(encoder.architecture, encoder.model_args, encoder.small_stem)
    model.load_state_dict(encoder.module.state_dict())
    return model


def _strides(encoder: Encoder, model: Any) -> list[int]:
    # A small stem saves a stride of 4, of which timm does not know.
    return [max(each["reduction"] // (4 if encoder.small_stem else 1), 1) for each in model.feature_info]


def _c4_body(encoder: Encoder, model: Any) -> C4Body:
    if family(encoder.architecture) != "resnet":
        raise UserError(f"--arch c4: only for ResNets, whose last stage looks at regions; {encoder.architecture}: fpn")
    return C4Body(model, _strides(encoder, model)[-2])


def _pyramid_body(encoder: Encoder, model: Any) -> PyramidBody:
    name = encoder.architecture
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UserError(f"{name}: timm gives no inner feature maps of it, which a detector needs")
    strides, widths = _strides(encoder, model), [each["num_chs"] for each in model.feature_info]
    if len(set(strides)) == 1:
        patch = strides[0]
        if patch % 4:
            raise UserError(f"{name}: patches of {patch} pixels; a simple feature pyramid needs a multiple of 4")
        levels = (patch // 4, patch // 2, patch, 2 * patch)
        return PyramidBody(model, [len(strides) - 1], levels, SimplePyramid(widths[-1]))
    last_of = {stride: layer for layer, stride in enumerate(strides)}
    chosen = sorted(last_of)[-PYRAMID_LEVELS:]
    if len(chosen) < PYRAMID_LEVELS or any(2 * low != high for low, high in itertools.pairwise(chosen)):
        raise UserError(f"{name}: its maps have strides {sorted(last_of)}; a feature pyramid needs four that double")
    layers = [last_of[stride] for stride in chosen]
    # BatchNorm in the pyramid too: MoCo's way to calibrate new layers (arXiv:1911.05722, section 4.2).
    pyramid = FeaturePyramidNetwork(
        [widths[layer] for layer in layers], PYRAMID_WIDTH, LastLevelMaxPool(), nn.BatchNorm2d
    )
    return PyramidBody(model, layers, tuple(chosen), pyramid)


def _check_runs(body: C4Body | PyramidBody, encoder: Encoder, padding: int) -> None:
    """One blank picture that is not square, before hours of training."""
    try:
        with torch.no_grad():
            body.eval()(torch.zeros(1, 3, 2 * padding, 3 * padding))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise UserError(
            f"{encoder.architecture}: cannot take pictures of any size, as a detector must: {first}"
        ) from error
    body.train()


def _box_head(body: C4Body | PyramidBody) -> tuple[nn.Module, int]:
    if isinstance(body, PyramidBody):
        return TwoMLPHead(PYRAMID_WIDTH * 7 * 7, HEAD_WIDTH), HEAD_WIDTH
    stage = nn.Sequential(OrderedDict(res5=body.last_stage[0], norm=nn.BatchNorm2d(body.last_width)))
    return nn.Sequential(OrderedDict(stage=stage, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())), body.last_width


def _add_masks(detector: Any, body: C4Body | PyramidBody, pool: RegionPool, width: int, num_classes: int) -> None:
    heads = detector.roi_heads
    heads.mask_roi_pool = RegionPool(pool.strides, 14, pool.middle_region)
    if isinstance(body, PyramidBody):
        heads.mask_head = MaskRCNNHeads(PYRAMID_WIDTH, (MASK_WIDTH,) * 4, 1)
        heads.mask_predictor = MaskRCNNPredictor(MASK_WIDTH, MASK_WIDTH, num_classes + 1)
    else:
        heads.mask_head = heads.box_head.stage
        heads.mask_predictor = MaskRCNNPredictor(width, MASK_WIDTH, num_classes + 1)


def _initialise(predictor: FastRCNNPredictor) -> None:
    """As detectron2 does: classes N(0, 0.01), corrections N(0, 0.001)."""
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    nn.init.zeros_(predictor.cls_score.bias)
    nn.init.zeros_(predictor.bbox_pred.bias)
