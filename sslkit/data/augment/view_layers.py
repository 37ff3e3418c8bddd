"""``[views]`` tables as plain data: one laid over another, keys of earlier versions, pipeline files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslkit.data.augment.user_pipeline import SUFFIXES, read_pipeline

ROLES = ("global1", "global2", "local")
# For these, views of role ``local`` do not follow [views]; [views.local] has defaults of its own.
LOCAL_DEFAULTS: dict[str, Any] = {"size": 96, "crop_scale": (0.05, 0.14), "min_object_covered": 0.0}
EARLIER_KEYS = {"small_crops": "count", "small_size": "size", "small_scale": "crop_scale"}  # now of [views.local]
PROBABILITIES = ("jitter_prob", "gray_prob", "blur_prob", "solarize_prob", "flip_prob", "erase_prob")


def layer_views(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``[views]`` tables over each other; later ones win.

    A value that a table gives for all views also replaces what earlier tables gave for a role.
    """
    merged: dict[str, Any] = {}
    for layer in map(with_present_keys, layers):
        for role in ROLES:
            kept = LOCAL_DEFAULTS if role == "local" else {}
            before, given = merged.get(role, {}), layer.get(role, {})
            if isinstance(before, dict) and isinstance(given, dict):
                before = {key: value for key, value in before.items() if key not in layer or key in kept}
                if both := {**before, **given}:
                    layer[role] = both
                else:
                    merged.pop(role, None)
        merged |= layer
    return merged


def with_present_keys(views: Mapping[str, Any]) -> dict[str, Any]:
    """The table with keys of earlier versions replaced by the present ones.

    ``small_crops``, ``small_size`` and ``small_scale`` are now keys of ``[views.local]``. A pair of probabilities is
    that of role ``global1``, then that of all other views. An earlier key beside the present one is left.
    """
    views = dict(views)
    roles = {role: dict(views[role]) for role in ROLES if isinstance(views.get(role), Mapping)}
    for earlier, key in EARLIER_KEYS.items():
        if earlier in views and key not in roles.get("local", {}):
            roles.setdefault("local", {})[key] = views.pop(earlier)
    for key in PROBABILITIES:
        pair = views.get(key)
        if isinstance(pair, list | tuple) and len(pair) == 2:
            roles.setdefault("global1", {}).setdefault(key, pair[0])
            views[key] = pair[1]
    return {**views, **roles}


def flat_views(views: Mapping[str, Any]) -> dict[str, Any]:
    """The table without tables in it, for comparisons: keys of roles as ``role.key``, pipelines by their digests."""
    flat: dict[str, Any] = {}
    for key, value in views.items():
        if key in ROLES and isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": each for inner, each in flat_views(value).items()}
        elif key == "transforms" and isinstance(value, Mapping):
            flat[key] = f"pipeline file with sha256 {str(value.get('pipeline_sha256', ''))[:16]}"
        else:
            flat[key] = value
    return flat


def read_pipelines(views: Mapping[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Replace each pipeline file's path, ``transforms`` of the table or of a role, by what the file holds.

    Relative paths are looked for in the working directory, then in ``folder``, that of the recipe. Returns the table,
    and a sentence for each file that cannot be read.
    """
    views, mistakes = dict(views), []
    for key, value in list(views.items()):
        if key in ROLES and isinstance(value, Mapping):
            views[key], wrong = read_pipelines(value, folder)
            mistakes += [sentence.replace("[views]", f"[views.{key}]", 1) for sentence in wrong]
        elif key == "transforms" and isinstance(value, str) and value.endswith(SUFFIXES):
            try:
                views[key] = read_pipeline(value, folder)
            except ValueError as error:
                mistakes.append(f"[views] transforms: {error}")
                del views[key]
    return views, mistakes
