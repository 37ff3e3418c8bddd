"""The nearest images of query images in feature space, and a map of the features in two dimensions."""

import importlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from plotly.colors import qualitative
from torch import Tensor

from sslkit.evaluate.probes.exact_search import nearest
from sslkit.report.figures import escape_html, to_json
from sslkit.report.gallery.gallery_images import SEED, GalleryImages
from sslkit.report.gallery.thumbnails import Sprite, data_uri, make_sprite

NUM_QUERIES, NUM_NEIGHBOURS = 12, 6
UMAP_NEIGHBOURS = 15  # UMAP's default
MAX_POINTS, TILE, SIDE = 500, 48, 96
MAX_CLASSES = 16
# Ten colours and eight symbols, because a map has more classes than a figure has curves.
COLOURS = tuple(qualitative.T10)
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon")
OTHERS = "other classes"


@dataclass(frozen=True)
class GalleryImage:
    """An image as a ``data:`` URI, the name of its class, and its cosine similarity to a query."""

    uri: str
    label: str  # empty without labels
    similarity: float = 1.0
    same_class: bool | None = None  # as the query; None without labels


@dataclass(frozen=True)
class NeighbourRow:
    """A query image and its nearest images, the nearest first."""

    query: GalleryImage
    neighbours: list[GalleryImage]


def find_neighbours(images: GalleryImages, bank: Tensor, queries: Tensor) -> list[NeighbourRow]:
    """The nearest images in the bank of twelve random queries, spread over the classes.

    ``bank`` (N, D) and ``queries`` (Q, D) are features of unit length.
    """
    chosen = _choose_queries(images.query_labels, len(queries))
    similarity, rows = nearest(queries[torch.tensor(chosen)], bank, min(NUM_NEIGHBOURS, len(bank)))
    gallery = []
    for query, near, values in zip(chosen, rows.tolist(), similarity.tolist(), strict=True):
        query_label = images.query_labels[query] if images.query_labels else ""
        found = []
        for row, value in zip(near, values, strict=True):
            label = images.bank_labels[row] if images.bank_labels else ""
            uri = data_uri(images.bank.read(row), SIDE)
            found.append(GalleryImage(uri, label, value, label == query_label if images.bank_labels else None))
        gallery.append(NeighbourRow(GalleryImage(data_uri(images.queries.read(query), SIDE), query_label), found))
    return gallery


def _choose_queries(labels: list[str] | None, count: int) -> list[int]:
    """Indices of random queries, one of each class in turn."""
    order: list[int] = np.random.default_rng(SEED).permutation(count).tolist()
    if labels is None:
        return order[:NUM_QUERIES]
    turns: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    by_turn = sorted((next(turns[labels[index]]), labels[index], index) for index in order)
    return [index for _, _, index in by_turn[:NUM_QUERIES]]


@dataclass(frozen=True)
class Map:
    """Images as points in two dimensions. The ``customdata`` of a point is the index of its tile in the sprite."""

    figure: str  # plotly's JSON
    sprite: Sprite
    note: str  # the projection


def draw_map(images: GalleryImages, queries: Tensor) -> Map:
    """Map of at most 500 queries in two dimensions, by UMAP if it is installed, else by PCA."""
    count = min(len(queries), MAX_POINTS)
    points, note, axes = project(queries[:count])
    groups = group_by_class(images.query_labels[:count] if images.query_labels else [""] * count)
    figure = go.Figure()
    for index, (name, members) in enumerate(groups.items()):
        colour = "#808080" if name == OTHERS else COLOURS[index % len(COLOURS)]
        figure.add_trace(
            go.Scatter(
                x=points[members, 0].tolist(),
                y=points[members, 1].tolist(),
                customdata=members,
                text=[escape_html(images.query_labels[each]) if images.query_labels else "" for each in members],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8, "opacity": 0.85},
                hovertemplate="%{text}",
            )
        )
    plane = {"showticklabels": False, "zeroline": False}
    layout: dict[str, Any] = {
        "showlegend": len(groups) > 1,
        "yaxis": {**plane, "title": {"text": axes[1]}},
        "xaxis": {**plane, "rangemode": "normal", "title": {"text": axes[0]}},
        "legend": {"orientation": "h", "y": -0.1, "yanchor": "top", "x": 0},
    }
    sprite = make_sprite([images.queries.read(index) for index in range(count)], TILE)
    return Map(to_json(figure, height=560, **layout), sprite, note)


def group_by_class(labels: list[str]) -> dict[str, list[int]]:
    """Indices by class; beyond 16 classes, those with the fewest images form one group."""
    kept = {name for name, _ in Counter(labels).most_common(MAX_CLASSES)}
    groups: dict[str, list[int]] = {name: [] for name in sorted(kept)}
    for index, label in enumerate(labels):
        groups.setdefault(label if label in kept else OTHERS, []).append(index)
    return groups


def project(features: Tensor) -> tuple[NDArray[np.float64], str, tuple[str, str]]:
    """Project features (N, D), N at least 3, to points (N, 2); also a description and the titles of the axes."""
    with suppress(ImportError):
        if len(features) > UMAP_NEIGHBOURS:
            umap = importlib.import_module("umap")
            reducer = umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, metric="cosine", random_state=SEED, n_jobs=1)
            note = f"UMAP, {UMAP_NEIGHBOURS} neighbours, cosine distance: only small distances are meaningful."
            return reducer.fit_transform(features.numpy()), note, ("", "")
    centred = (features - features.mean(dim=0)).double()
    left, scales, _ = torch.linalg.svd(centred, full_matrices=False)
    points = torch.zeros(len(features), 2, dtype=torch.float64)
    points[:, : min(2, len(scales))] = left[:, :2] * scales[:2]
    variance = [*(scales.square() / scales.square().sum().clamp_min(1e-30)).tolist(), 0.0]
    note = "PCA of normalised features: points that overlap may differ in other directions. UMAP is used if installed."
    return points.numpy(), note, (f"{variance[0]:.0%} of variance", f"{variance[1]:.0%} of variance")
