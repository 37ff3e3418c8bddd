"""Whose checkpoint is it, which of its tensors are the encoder, and what does timm call them: names and shapes only.

Facts from the code that writes the files: facebookresearch/moco, moco-v3, swav and vissl, lightly-ai/lightly
(its benchmarks: MoCo's ``backbone`` is the teacher there), vturrisi/solo-learn, open-mmlab/mmselfsup.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sslkit.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Layout:
    """How one project names what it saves, without the ``module.`` that DistributedDataParallel puts before all.

    Attributes:
        name: What a report calls it.
        tag: timm's tag for weights of this kind.
        marks: It is this layout if a name begins with one of these.
        encoders: Where the trained (not the averaged) encoder lies: the first of these that any name begins with.
        heads: What in the encoder is not backbone, by the beginning of its name there.
        std: Of the pixels the weights were trained on.
        twelve_heads: Whether a ViT of width 384 has MoCo v3's 12 heads; else the file does not say.
    """

    name: str
    tag: str
    marks: tuple[str, ...]
    encoders: tuple[str, ...]
    heads: tuple[str, ...] = ()
    std: tuple[float, float, float] = IMAGENET_STD
    twelve_heads: bool = False


# The first that fits.
LAYOUTS = (
    Layout("MoCo v3", "moco_v3", ("base_encoder.",), ("base_encoder.",), ("fc.", "head."), twelve_heads=True),
    Layout("mmselfsup", "mmselfsup", ("encoder_q.0.conv1.", "encoder_q.0.patch_embed."), ("encoder_q.0.",)),
    Layout("MoCo v1 or v2", "moco", ("encoder_q.",), ("encoder_q.",), ("fc.",)),
    Layout("VISSL", "vissl", ("trunk.",), ("trunk._feature_blocks.", "trunk.")),
    Layout(
        "mmselfsup's MoCo v3",
        "moco_v3",
        ("momentum_encoder.module.0.",),
        ("backbone.",),
        twelve_heads=True,
    ),
    Layout(
        "lightly",
        "lightly",
        ("query_backbone.", "student_backbone.", "projection_head.", "student_projection_head.", "online_classifier."),
        ("query_backbone.", "student_backbone.", "backbone."),
        ("fc.",),
    ),
    Layout(
        "solo-learn",
        "solo_learn",
        ("projector.", "momentum_backbone.", "momentum_projector.", "classifier.", "momentum_encoder."),
        ("backbone.", "encoder."),
        ("fc.",),
    ),
    Layout("mmselfsup", "mmselfsup", ("neck.", "data_preprocessor.", "backbone.layers.0.ln1."), ("backbone.",)),
    Layout("an encoder under backbone.", "imported", ("backbone.",), ("backbone.",), ("fc.", "head.")),
)
SWAV = Layout(
    "SwAV", "swav", (), ("",), ("projection_head.", "prototypes."), std=(0.228, IMAGENET_STD[1], IMAGENET_STD[2])
)
BARE = Layout("a bare encoder", "imported", (), ("",))
BACKBONE_MARKS = ("conv1.weight", "patch_embed.proj.weight")

# What the tensors outside the encoder are, by the beginning of their names.
OUTSIDE = (
    ("encoder_k.", "the momentum encoder, which the papers do not evaluate"),
    ("momentum_", "the momentum encoder, which the papers do not evaluate"),
    ("backbone", "the momentum encoder, which the papers do not evaluate"),
    ("encoder_q.", "a copy of the encoder or its projector"),
    ("queue", "the queue of keys"),
    ("criterion.", "state of the loss, such as a queue of keys"),
    ("predictor.", "the predictor"),
    ("prediction_head.", "the predictor"),
    ("online_classifier.", "a classifier trained beside the encoder"),
    ("classifier.", "a classifier trained beside the encoder"),
    ("heads.", "the heads of pretraining or evaluation"),
    ("head.", "the head of pretraining"),
    ("neck.", "the projector"),
    ("projector.", "the projector"),
    ("projection_head.", "the projector"),
    ("query_projection_head.", "the projector"),
    ("student_projection_head.", "the projector"),
    ("prototypes.", "the prototypes"),
    ("data_preprocessor.", "pixel means and deviations"),
)

# Other projects' names of a backbone's tensors, and timm's.
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        # torchvision's ResNet as a Sequential of its children (lightly's examples)
        (r"^0\.(weight)$", r"conv1.\1"),
        (r"^1\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r"bn1.\1"),
        (r"^4\.(\d+\.)", r"layer1.\1"),
        (r"^5\.(\d+\.)", r"layer2.\1"),
        (r"^6\.(\d+\.)", r"layer3.\1"),
        (r"^7\.(\d+\.)", r"layer4.\1"),
        # OpenMMLab's ViT
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
        (r"^layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
        (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
        (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
        (r"^ln1\.", "norm."),
    )
)

# ResNets by stem's width, blocks, convolutions of a block, and the shape of the first 3 x 3 (its width and groups).
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
# ViTs by width, blocks and side of a patch.
VITS = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (384, 12, 8): "vit_small_patch8_224",
    (768, 12, 16): "vit_base_patch16_224",
    (768, 12, 8): "vit_base_patch8_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
DOUBTFUL_WIDTH = 384  # 6 heads in timm, DeiT and DINO, 12 in MoCo v3; every shape is the same
MOCO_V3_HEADS = 12

# What the authors published of their files (README of facebookresearch/moco): first characters of the MD5.
RELEASED = {
    "moco_v1_200ep_pretrain.pth.tar": "b251726a",
    "moco_v2_200ep_pretrain.pth.tar": "59fd9945",
    "moco_v2_800ep_pretrain.pth.tar": "a04e12f8",
}


@dataclass(frozen=True)
class Fate:
    """What becomes of one tensor of the file.

    Attributes:
        name: In the file.
        shape: Its shape.
        kept_as: timm's name for it; empty if it is left out.
        why: Why it is left out; empty if it is kept.
    """

    name: str
    shape: tuple[int, ...]
    kept_as: str
    why: str


def sort_out(shapes: Shapes) -> tuple[Layout, list[Fate]]:
    """Say whose layout it is and what becomes of every tensor.

    Raises:
        UserError: No known layout, a trained classifier, or two tensors that would get the same name.
    """
    bare = {name.replace("_orig_mod.", ""): name for name in shapes}  # as torch.compile wraps whatever it compiled
    if len(bare) < len(shapes):
        raise UserError("a tensor is in the file twice, compiled and not")
    if all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): own for name, own in bare.items()}
    layout = find_layout({name: shapes[own] for name, own in bare.items()})
    encoder = next(prefix for prefix in layout.encoders if any(name.startswith(prefix) for name in bare))
    fates = []
    for name, own in bare.items():
        inside = name.removeprefix(encoder) if name.startswith(encoder) and name != encoder else None
        why = _outside(name) if inside is None else _head(layout, inside)
        fates.append(Fate(own, tuple(shapes[own]), "" if why or inside is None else timm_name(inside), why))
    kept = [fate.kept_as for fate in fates if fate.kept_as]
    doubled = sorted(name for name in set(kept) if kept.count(name) > 1)
    if doubled:
        raise UserError(f"{doubled[0]!r} is in the file twice, under names that mean the same")
    return layout, fates


def find_layout(shapes: Shapes) -> Layout:
    """Whose layout these names are, the ``module.`` before them already gone.

    Raises:
        UserError: Nobody's known here, or a trained classifier.
    """
    for classifier in ("head.fc.weight", "head.layers.head.weight"):
        if len(shapes.get(classifier, ())) == 2 and not _any_begins(shapes, ("neck.",)):
            raise UserError(
                f"a trained classifier of {shapes[classifier][0]} classes ({classifier}), as mmpretrain's supervised "
                "and linear files are; take the file of the pretraining itself"
            )
    for layout in LAYOUTS:
        if _any_begins(shapes, layout.marks) and _any_begins(shapes, layout.encoders):
            return layout
    if _any_begins(shapes, BACKBONE_MARKS):
        if _any_begins(shapes, ("prototypes.",)):
            return SWAV
        for head in ("fc", "head"):
            if len(shapes.get(f"{head}.weight", ())) == 2:
                raise UserError(
                    f"a trained classifier of {shapes[f'{head}.weight'][0]} classes ({head}.weight), as MoCo's "
                    "linear-*.pth.tar files and supervised weights are; take the file of the pretraining itself"
                )
        return BARE
    raise UserError(
        f"no layout known here ({len(shapes)} tensors, such as {', '.join(repr(name) for name in list(shapes)[:3])}); "
        f"known are {', '.join(dict.fromkeys(layout.name for layout in (*LAYOUTS, SWAV, BARE)))}"
    )


def timm_name(name: str) -> str:
    """timm's name of a backbone's tensor; most projects use torchvision's, which for ResNets is the same."""
    for pattern, replacement in RENAMES:
        name, found = pattern.subn(replacement, name)
        if found:
            return name
    return name


def guess_backbone(shapes: Shapes) -> str:
    """The timm model whose tensors these are, by timm's names.

    Raises:
        UserError: None known here.
    """
    stem, patches = shapes.get("conv1.weight", ()), shapes.get("patch_embed.proj.weight", ())
    found: str | None = None
    if len(stem) == 4:
        first = shapes.get("layer1.0.conv2.weight", ())
        blocks = tuple(_count(shapes, f"layer{stage}") for stage in (1, 2, 3, 4))
        deep = 3 if "layer1.0.conv3.weight" in shapes else 2
        found = RESNETS.get((stem[0], blocks, deep, first[:2]))
        if found and stem[2:] != (7, 7):
            raise UserError(
                f"a {found} with a first convolution of {stem[2]} x {stem[3]}, for small images: stride and padding "
                "of it differ between projects and are not in the file, so it cannot be rebuilt"
            )
    elif len(patches) == 4:
        found = VITS.get((patches[0], _count(shapes, "blocks"), patches[2]))
    elif any(name.startswith("patch_embed.proj.0.") for name in shapes):
        raise UserError("a ViT with a convolutional stem (MoCo v3's vit_conv_*), which timm has not")
    if found is None:
        raise UserError("the encoder is none of the ResNets and ViTs known here; name its timm model with --backbone")
    return found


def vit_arguments(layout: Layout, shapes: Shapes, num_heads: int) -> dict[str, int]:
    """timm's arguments for a ViT that its file or layout says: image size and heads; none for a ResNet.

    Args:
        layout: Whose it is.
        shapes: Of the encoder's tensors by timm's names.
        num_heads: What the user says; 0 for nothing.

    Raises:
        UserError: The number of heads is in doubt: the shapes are the same for any.
    """
    positions, patches = shapes.get("pos_embed", ()), shapes.get("patch_embed.proj.weight", ())
    if len(positions) != 3 or len(patches) != 4:
        if num_heads:
            raise UserError("--num-heads: the encoder is no ViT; leave it out")
        return {}
    arguments = {"img_size": math.isqrt(max(positions[1] - 1, 0)) * patches[2]}
    if num_heads:
        return {**arguments, "num_heads": num_heads}
    if patches[0] == DOUBTFUL_WIDTH:
        if not layout.twelve_heads:
            raise UserError(
                "a ViT of width 384 has 6 heads (timm's, DeiT's, DINO's) or 12 (MoCo v3's), and the file does not say; "
                "give --num-heads, for a wrong number loads without an error and ruins the features"
            )
        arguments["num_heads"] = MOCO_V3_HEADS
    return arguments


def _any_begins(shapes: Shapes, beginnings: tuple[str, ...]) -> bool:
    return any(name.startswith(beginnings) for name in shapes)


def _outside(name: str) -> str:
    return next((what for beginning, what in OUTSIDE if name.startswith(beginning)), "not part of the encoder")


def _head(layout: Layout, name: str) -> str:
    return "the projector or prototypes" if name.startswith(layout.heads or ("\0",)) else ""


def _count(shapes: Shapes, stem: str) -> int:
    """How many different numbers follow ``stem.`` in the names."""
    numbers = {name.split(".")[1] for name in shapes if name.startswith(f"{stem}.")}
    return len(numbers)
