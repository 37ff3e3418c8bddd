"""Checkpoint formats of other projects: which tensors are the encoder, and their names in timm. Uses shapes only.

The formats are those of the code that writes the files: facebookresearch/moco, moco-v3, swav and vissl;
lightly-ai/lightly (benchmarks, where MoCo's ``backbone`` is the teacher); vturrisi/solo-learn; open-mmlab/mmselfsup.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sslkit.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CheckpointFormat:
    """Prefixes of the names of a project's tensors, after ``module.`` of DistributedDataParallel.

    The trained encoder, not its moving average, has the first prefix of ``encoders`` that is in the file.
    """

    name: str
    tag: str  # timm's pretrained tag
    marks: tuple[str, ...]  # one of these is in the file
    encoders: tuple[str, ...]
    heads: tuple[str, ...] = ()  # in the encoder, but not part of the backbone
    std: tuple[float, float, float] = IMAGENET_STD  # of the normalisation of the images
    twelve_heads: bool = False  # of a ViT of width 384, as in MoCo v3; else their number is unknown


# The first match applies.
CHECKPOINT_FORMATS = (
    CheckpointFormat("MoCo v3", "moco_v3", ("base_encoder.",), ("base_encoder.",), ("fc.", "head."), twelve_heads=True),
    CheckpointFormat("mmselfsup", "mmselfsup", ("encoder_q.0.conv1.", "encoder_q.0.patch_embed."), ("encoder_q.0.",)),
    CheckpointFormat("MoCo v1 or v2", "moco", ("encoder_q.",), ("encoder_q.",), ("fc.",)),
    CheckpointFormat("VISSL", "vissl", ("trunk.",), ("trunk._feature_blocks.", "trunk.")),
    CheckpointFormat(
        "mmselfsup's MoCo v3", "moco_v3", ("momentum_encoder.module.0.",), ("backbone.",), twelve_heads=True
    ),
    CheckpointFormat(
        "lightly",
        "lightly",
        ("query_backbone.", "student_backbone.", "projection_head.", "student_projection_head.", "online_classifier."),
        ("query_backbone.", "student_backbone.", "backbone."),
        ("fc.",),
    ),
    CheckpointFormat(
        "solo-learn",
        "solo_learn",
        ("projector.", "momentum_backbone.", "momentum_projector.", "classifier.", "momentum_encoder."),
        ("backbone.", "encoder."),
        ("fc.",),
    ),
    CheckpointFormat(
        "mmselfsup", "mmselfsup", ("neck.", "data_preprocessor.", "backbone.layers.0.ln1."), ("backbone.",)
    ),
    CheckpointFormat("an encoder under backbone.", "imported", ("backbone.",), ("backbone.",), ("fc.", "head.")),
)
SWAV = CheckpointFormat(
    "SwAV", "swav", (), ("",), ("projection_head.", "prototypes."), std=(0.228, IMAGENET_STD[1], IMAGENET_STD[2])
)
BARE = CheckpointFormat("a bare encoder", "imported", (), ("",))
BACKBONE_MARKS = ("conv1.weight", "patch_embed.proj.weight")

# What tensors outside the encoder are, by prefix.
OUTSIDE = {
    ("encoder_k.", "momentum_", "backbone"): "the momentum encoder, which the papers do not evaluate",
    ("encoder_q.",): "a copy of the encoder or its projector",
    ("queue",): "the queue of keys",
    ("criterion.",): "state of the loss, such as a queue of keys",
    ("predictor.", "prediction_head."): "the predictor",
    ("online_classifier.", "classifier."): "a classifier trained with the encoder",
    ("heads.",): "the heads of pretraining or evaluation",
    ("head.",): "the head of pretraining",
    ("neck.", "projector.", "projection_head.", "query_projection_head.", "student_projection_head."): "the projector",
    ("prototypes.",): "the prototypes",
    ("data_preprocessor.",): "pixel means and deviations",
}

# Names of a backbone's tensors in other projects and in timm.
RENAMES = (
    # torchvision's ResNet as a Sequential (lightly's examples)
    (r"^0\.(weight)$", r"conv1.\1"),
    (r"^1\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r"bn1.\1"),
    *((rf"^{stage + 3}\.(\d+\.)", rf"layer{stage}.\1") for stage in (1, 2, 3, 4)),
    # OpenMMLab's ViT
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^ln1\.", "norm."),
)

# ResNets by width of the stem, blocks, convolutions per block, and output and input channels of the first 3 x 3.
RESNETS: dict[tuple[int, tuple[int, ...], int, tuple[int, ...]], str] = {
    (64, (2, 2, 2, 2), 2, (64, 64)): "resnet18",
    (64, (3, 4, 6, 3), 2, (64, 64)): "resnet34",
    (64, (3, 4, 6, 3), 3, (64, 64)): "resnet50",
    (64, (3, 4, 23, 3), 3, (64, 64)): "resnet101",
    (64, (3, 8, 36, 3), 3, (64, 64)): "resnet152",
    (64, (3, 4, 6, 3), 3, (128, 128)): "wide_resnet50_2",
    (64, (3, 4, 23, 3), 3, (128, 128)): "wide_resnet101_2",
    (64, (3, 4, 6, 3), 3, (128, 4)): "resnext50_32x4d",
}
# ViTs by width, blocks and patch size.
VITS = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (384, 12, 8): "vit_small_patch8_224",
    (768, 12, 16): "vit_base_patch16_224",
    (768, 12, 8): "vit_base_patch8_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
AMBIGUOUS_WIDTH = 384  # 6 heads in timm, DeiT and DINO, 12 in MoCo v3, with the same shapes
MOCO_V3_HEADS = 12

# First characters of the MD5 of the authors' files (README of facebookresearch/moco).
RELEASED = {
    "moco_v1_200ep_pretrain.pth.tar": "b251726a",
    "moco_v2_200ep_pretrain.pth.tar": "59fd9945",
    "moco_v2_800ep_pretrain.pth.tar": "a04e12f8",
}


@dataclass(frozen=True)
class TensorMatch:
    """What happens to a tensor of the file: timm's name that it is kept as, or why it is left out. One is empty."""

    name: str
    shape: tuple[int, ...]
    kept_as: str
    why: str


def match_tensors(shapes: Shapes) -> tuple[CheckpointFormat, list[TensorMatch]]:
    """Detect the format of a checkpoint and find timm's name of every tensor of the encoder.

    Raises `UserError` if the format is unknown or a trained classifier, or if two tensors have one name in timm.
    """
    bare = {name.replace("_orig_mod.", ""): name for name in shapes}  # torch.compile's prefix
    if len(bare) < len(shapes):
        raise UserError("a tensor is in the file twice, with and without torch.compile's prefix _orig_mod")
    if all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): own for name, own in bare.items()}
    source = detect_format({name: shapes[own] for name, own in bare.items()})
    encoder = next(prefix for prefix in source.encoders if any(name.startswith(prefix) for name in bare))
    matches = []
    for name, own in bare.items():
        inside = name.removeprefix(encoder) if name.startswith(encoder) else ""
        if inside.startswith(source.heads):
            why = "the projector or prototypes"
        elif inside:
            why = ""
        else:
            why = next(
                (what for prefixes, what in OUTSIDE.items() if name.startswith(prefixes)), "not part of the encoder"
            )
        matches.append(TensorMatch(own, tuple(shapes[own]), "" if why else timm_name(inside), why))
    kept = [match.kept_as for match in matches if match.kept_as]
    if duplicates := sorted(name for name in set(kept) if kept.count(name) > 1):
        raise UserError(f"two tensors of the file are {duplicates[0]!r}")
    return source, matches


def detect_format(shapes: Shapes) -> CheckpointFormat:
    """Detect the format of tensors by their names, without the prefix ``module.``; raises as `match_tensors`."""
    if not _any_starts(shapes, ("neck.",)):
        _refuse_classifier(shapes, "mmpretrain's supervised and linear files", "head.fc", "head.layers.head")
    for candidate in CHECKPOINT_FORMATS:
        if _any_starts(shapes, candidate.marks) and _any_starts(shapes, candidate.encoders):
            return candidate
    if _any_starts(shapes, BACKBONE_MARKS):
        if _any_starts(shapes, ("prototypes.",)):
            return SWAV
        _refuse_classifier(shapes, "MoCo's linear-*.pth.tar files and supervised weights", "fc", "head")
        return BARE
    examples = ", ".join(repr(name) for name in list(shapes)[:3])
    known = ", ".join(dict.fromkeys(each.name for each in (*CHECKPOINT_FORMATS, SWAV, BARE)))
    raise UserError(f"unknown checkpoint format ({len(shapes)} tensors, such as {examples}); supported are {known}")


def _refuse_classifier(shapes: Shapes, examples: str, *layers: str) -> None:
    for name in (f"{layer}.weight" for layer in layers):
        if len(shapes.get(name, ())) == 2:
            raise UserError(
                f"a trained classifier of {shapes[name][0]} classes ({name}), such as {examples}; take the checkpoint "
                "of the pretraining"
            )


def timm_name(name: str) -> str:
    """timm's name of a backbone's tensor. Most projects use torchvision's names, which are the same for ResNets."""
    for pattern, replacement in RENAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            return name
    return name


def guess_backbone(shapes: Shapes) -> str:
    """Find the timm model with tensors of these names and shapes; raises `UserError` if none is known here."""
    stem, patches = shapes.get("conv1.weight", ()), shapes.get("patch_embed.proj.weight", ())
    found: str | None = None
    if len(stem) == 4:
        first = shapes.get("layer1.0.conv2.weight", ())
        blocks = tuple(_count(shapes, f"layer{stage}") for stage in (1, 2, 3, 4))
        deep = 3 if "layer1.0.conv3.weight" in shapes else 2
        found = RESNETS.get((stem[0], blocks, deep, first[:2]))
        if found and stem[2:] != (7, 7):
            raise UserError(
                f"a {found} with a first convolution of {stem[2]} x {stem[3]} for small images cannot be rebuilt: its "
                "stride and padding differ between projects and are not in the file"
            )
    elif len(patches) == 4:
        found = VITS.get((patches[0], _count(shapes, "blocks"), patches[2]))
    elif any(name.startswith("patch_embed.proj.0.") for name in shapes):
        raise UserError("is a ViT with a convolutional stem (MoCo v3's vit_conv_*), which timm does not have")
    if found is None:
        raise UserError("cannot tell the encoder from its shapes; name its timm model with --backbone")
    return found


def vit_arguments(source: CheckpointFormat, shapes: Shapes, num_heads: int) -> dict[str, int]:
    """timm's arguments for a ViT with these tensors: image size and number of heads. Empty for a ResNet.

    Raises `UserError` if ``num_heads`` is 0 and cannot be known from the shapes, or is given for a ResNet.
    """
    positions, patches = shapes.get("pos_embed", ()), shapes.get("patch_embed.proj.weight", ())
    if len(positions) != 3 or len(patches) != 4:
        if num_heads:
            raise UserError("--num-heads: the encoder is not a ViT; leave it out")
        return {}
    if patches[0] == AMBIGUOUS_WIDTH and not num_heads:
        if not source.twelve_heads:
            raise UserError(
                "a ViT of width 384 has 6 heads (timm, DeiT, DINO) or 12 (MoCo v3), and the file does not tell; give "
                "--num-heads: a wrong number loads without an error and gives wrong features"
            )
        num_heads = MOCO_V3_HEADS
    arguments = {"img_size": math.isqrt(max(positions[1] - 1, 0)) * patches[2]}
    return {**arguments, "num_heads": num_heads} if num_heads else arguments


def _any_starts(shapes: Shapes, prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in shapes)


def _count(shapes: Shapes, stem: str) -> int:
    """Number of modules ``stem.0``, ``stem.1``, ..."""
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{stem}.")})
