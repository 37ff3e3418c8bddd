"""torchvision's Faster and Mask R-CNN on a timm encoder, built as in MoCo's transfer to detection.

- ``c4``, ResNets only: regions are pooled from the output of the third stage (stride 16). The last stage and an extra
  BatchNorm are the head (MoCo's Res5ROIHeadsExtraNorm), which masks share.
- ``fpn``: a feature pyramid on the maps of strides 4, 8, 16 and 32. For plain ViTs, which have one map, ViTDet's simple
  feature pyramid (arXiv:2203.16527).
"""

import itertools
from collections import OrderedDict
from functools import partial
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

from sslkit.errors import UserError, first_line
from sslkit.evaluate.features.encoder import Encoder
from sslkit.parts.backbone import family

Arch = Literal["c4", "fpn"]

ASPECT_RATIOS = (0.5, 1.0, 2.0)
PYRAMID_LEVELS = 4
PYRAMID_WIDTH = 256
HEAD_WIDTH = 1024
MASK_WIDTH = 256
# With anchors of 32 to 512 pixels, a region of 224 pixels is pooled from the third level (arXiv:1612.03144).
REGION_PER_MIDDLE_ANCHOR = 224 / 128
# Proposals before NMS in training and in testing, and after NMS in training: detectron2's defaults, and MoCo's for
# testing C4. For FPN, those before NMS are per level.
PROPOSALS = {"c4": (12000, 6000, 2000), "fpn": (2000, 1000, 1000)}
MAX_TEST_REGIONS = 1000


def choose_arch(encoder: Encoder, name: str = "") -> Arch:
    """Check the name of an architecture. Default: ``c4`` for ResNets, as in the papers, else ``fpn``."""
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
    """Build a detector on a copy of the encoder. All parameters are trainable. The encoder itself does not change.

    ``num_classes`` does not count the background. ``anchor_sizes`` are five sides of square anchors, ascending; see
    `DetectProtocol` for the other sizes. Raises `UserError` if the encoder has no suitable feature maps.
    """
    # The position embedding of a ViT is interpolated to each image's size.
    model = encoder.copy(dynamic_img_size=True)
    body: C4Body | PyramidBody = _c4_body(encoder, model) if arch == "c4" else _pyramid_body(encoder, model)
    _check_any_size(body, encoder)
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
        rpn_anchor_generator=AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)),
        rpn_pre_nms_top_n_train=before_train,
        rpn_pre_nms_top_n_test=before_test,
        rpn_post_nms_top_n_train=after_train,
        rpn_post_nms_top_n_test=min(2 * regions, MAX_TEST_REGIONS),
        box_batch_size_per_image=regions,
        box_roi_pool=pool,
        box_head=head,
        box_predictor=predictor,
        size_divisible=body.size_divisible,
    )
    if masks:
        _add_masks(detector, body, pool, width, num_classes)
    return detector


class C4Body(nn.Module):
    """A ResNet up to its third stage. The fourth stage is not part of it: it becomes the head."""

    def __init__(self, model: Any, stride: int) -> None:
        super().__init__()
        parts = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3")
        self.stages = nn.Sequential(OrderedDict((name, getattr(model, name)) for name in parts))
        # In a list, so that its parameters belong to the head only.
        self.last_stage = [model.layer4]
        self.out_channels: int = model.feature_info[-2]["num_chs"]
        self.last_width: int = model.num_features
        self.strides = (stride,)
        self.size_divisible = 2 * stride

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to one map ``"0"``, (B, C, H / stride, W / stride)."""
        return {"0": self.stages(images)}


class PyramidBody(nn.Module):
    """An encoder with a feature pyramid: levels "0" to "3", and a pooled level above them for proposals."""

    out_channels = PYRAMID_WIDTH

    def __init__(self, model: Any, layers: list[int], strides: tuple[int, ...], pyramid: nn.Module) -> None:
        super().__init__()
        self.model, self.layers, self.pyramid, self.strides = model, layers, pyramid, strides
        self.size_divisible = 2 * strides[-1]  # the pooled level also has whole cells

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to five maps of `PYRAMID_WIDTH` channels."""
        norm = len(self.layers) == 1  # the last map of a ViT is read after the final norm, those of a CNN before it
        maps = self.model.forward_intermediates(images, indices=self.layers, intermediates_only=True, norm=norm)
        levels: dict[str, Tensor] = self.pyramid(OrderedDict((str(number), each) for number, each in enumerate(maps)))
        return levels


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid: from one map of stride s, maps of strides s / 4 to 2 s, without sums."""

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
        stems: list[nn.Module] = [up_4, up_2, nn.Identity(), nn.MaxPool2d(2)]
        self.levels = nn.ModuleList(
            nn.Sequential(
                stem,
                nn.Conv2d(channels, PYRAMID_WIDTH, 1, bias=False),
                LayerNorm2d(PYRAMID_WIDTH),
                nn.Conv2d(PYRAMID_WIDTH, PYRAMID_WIDTH, 3, padding=1, bias=False),
                LayerNorm2d(PYRAMID_WIDTH),
            )
            for stem, channels in zip(stems, (quarter, half, width, width), strict=True)
        )

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """The map ``"0"`` to four levels, and a pooled one above them."""
        levels = {str(number): level(maps["0"]) for number, level in enumerate(self.levels)}
        return levels | {"pool": nn.functional.max_pool2d(levels["3"], 1, stride=2)}


class RegionPool(MultiScaleRoIAlign):  # type: ignore[misc]
    """Pooling of regions as detectron2's ROIAlignV2, which samples half a pixel right of torchvision's default.

    ``strides`` are those of the maps, ``side`` is the side of the pooled square, and ``middle_region`` the square root
    of the area, in pixels, of a region that is pooled from the third of four maps.
    """

    def __init__(self, strides: tuple[int, ...], side: int, middle_region: float) -> None:
        super().__init__([str(level) for level in range(len(strides))], side, sampling_ratio=0)
        self.strides, self.side, self.middle_region = strides, side, middle_region

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """Pool all boxes of all images: (boxes, C, side, side)."""
        regions = torch.cat(boxes)
        images = torch.cat([torch.full_like(each[:, :1], number) for number, each in enumerate(boxes)])
        rows = torch.cat([images, regions], dim=1)
        align = partial(roi_align, output_size=self.side, sampling_ratio=0, aligned=True)
        if len(self.strides) == 1:  # without a copy of the result
            only: Tensor = align(x["0"], rows, spatial_scale=1 / self.strides[0])
            return only
        level_of = self.levels_of(regions)
        pooled = x["0"].new_zeros(len(rows), x["0"].shape[1], self.side, self.side)
        for level, stride in enumerate(self.strides):
            chosen = (level_of == level).nonzero().flatten()
            pooled[chosen] = align(x[str(level)], rows[chosen], spatial_scale=1 / stride)
        return pooled

    def levels_of(self, regions: Tensor) -> Tensor:
        """The level of each region, (N,): one level up for each doubling of its side (arXiv:1612.03144)."""
        sides = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])).clamp_min(1e-8).sqrt()
        levels = (2 + torch.log2(sides / self.middle_region) + 1e-6).floor()
        return levels.clamp(0, len(self.strides) - 1).long()


def _strides(encoder: Encoder, model: Any) -> list[int]:
    # The stem for small images has a stride smaller by 4, which timm's feature_info does not know.
    return [max(each["reduction"] // (4 if encoder.small_stem else 1), 1) for each in model.feature_info]


def _c4_body(encoder: Encoder, model: Any) -> C4Body:
    if family(encoder.architecture) != "resnet":
        raise UserError(f"--arch c4: supports ResNets only, not {encoder.architecture}; use --arch fpn")
    return C4Body(model, _strides(encoder, model)[-2])


def _pyramid_body(encoder: Encoder, model: Any) -> PyramidBody:
    name = encoder.architecture
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UserError(f"{name}: timm does not return its intermediate feature maps, which a detector needs")
    strides, widths = _strides(encoder, model), [each["num_chs"] for each in model.feature_info]
    if len(set(strides)) == 1:
        patch = strides[0]
        if patch % 4:
            raise UserError(f"{name}: has patches of {patch} pixels; a simple feature pyramid needs a multiple of 4")
        levels = (patch // 4, patch // 2, patch, 2 * patch)
        return PyramidBody(model, [len(strides) - 1], levels, SimplePyramid(widths[-1]))
    last_of = {stride: layer for layer, stride in enumerate(strides)}
    chosen = sorted(last_of)[-PYRAMID_LEVELS:]
    if len(chosen) < PYRAMID_LEVELS or any(2 * low != high for low, high in itertools.pairwise(chosen)):
        raise UserError(f"{name}: its maps have strides {sorted(last_of)}; a feature pyramid needs four that double")
    layers = [last_of[stride] for stride in chosen]
    # With BatchNorm, as in MoCo, to calibrate the new layers (arXiv:1911.05722, section 4.2).
    pyramid = FeaturePyramidNetwork(
        [widths[layer] for layer in layers], PYRAMID_WIDTH, LastLevelMaxPool(), nn.BatchNorm2d
    )
    return PyramidBody(model, layers, tuple(chosen), pyramid)


def _check_any_size(body: C4Body | PyramidBody, encoder: Encoder) -> None:
    """Run the body once on a blank image that is not square, before hours of training."""
    try:
        with torch.no_grad():
            body.eval()(torch.zeros(1, 3, 2 * body.size_divisible, 3 * body.size_divisible))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"{encoder.architecture}: does not take images of any size, as a detector must: {first_line(error, 150)}"
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
    """As detectron2: class scores N(0, 0.01), box offsets N(0, 0.001)."""
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
