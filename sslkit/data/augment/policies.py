"""Named view policies, with the numbers of the papers' official code. A recipe states them and may override each.

``moco_*`` and ``swav`` follow torchvision and Pillow. ``simclr`` and ``byol`` follow the TensorFlow and JAX code of
their authors: google-research/simclr ``data_util.py`` and deepmind-research ``byol/utils``. Three differences remain,
whose measured sizes docs/reproduce.md gives:

- A crop is rounded to 8 bits after the resize, and the view again at the end; the official code never rounds.
- SimCLR's official code clips the overshoot of its bicubic resize after the first jitter step; here, before it.
- SimCLR's official code draws one blur sigma for all images in a replica's batch; here each view has its own.
"""

from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SIMCLR_COLOURS = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_prob": 0.8, "blur_prob": 0.5}  # of SwAV too
BYOL_COLOURS = {  # of MoCo v3 too
    **{"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "blur_prob": 0.1, "solarize_prob": 0.2},
    "global1": {"blur_prob": 1.0, "solarize_prob": 0.0},
}

# What each policy sets over the defaults of `ViewsConfig`; docs/methods.md gives the sources.
POLICIES: dict[str, dict[str, Any]] = {
    "moco_v1": {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_prob": 1.0, "gray_first": True, "blur_prob": 0.0},
    "moco_v2": {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_prob": 0.8, "blur_prob": 0.5},
    "moco_v3": {"crop_scale": (0.08, 1.0), **BYOL_COLOURS},
    # Pixels in [0, 1] are not normalised further.
    "simclr": {
        "crop_scale": (0.08, 1.0),
        "crop_sampler": "tensorflow",
        "min_object_covered": 0.1,
        "interpolation": "bicubic",
        "resize": "tensorflow_v1",
        "transforms": "tensorflow",
        **SIMCLR_COLOURS,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    },
    "byol": {
        "crop_scale": (0.08, 1.0),
        "crop_sampler": "clamped",
        "interpolation": "bicubic",
        "resize": "tensorflow",
        "transforms": "tensorflow",
        "brightness": "add",
        **BYOL_COLOURS,
    },
    "swav": {"crop_scale": (0.14, 1.0), **SIMCLR_COLOURS, "std": (0.228, 0.224, 0.225), "local": {"count": 6}},
    "moco_cifar10": {
        "size": 32,
        "crop_scale": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "jitter_prob": 0.8,
        "blur_prob": 0.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "crop_pct": 1.0,
    },
    # Saturation and hue do nothing on grey images, and small crops of 28-pixel images show nothing.
    "small_gray": {
        "size": 32,
        "crop_scale": (0.3, 1.0),
        "jitter": (0.4, 0.4, 0.0, 0.0),
        "jitter_prob": 0.8,
        "gray_prob": 0.0,
        "blur_prob": 0.0,
        "crop_pct": 1.0,
    },
}
