"""Which images an encoder holds for alike, and where it puts them."""

import importlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from plotly.colors import qualitative
from torch import Tensor

from sslkit.evaluate.probes.knn import nearest
from sslkit.report.figures import lay_out, plain
from sslkit.report.sample import SEED, Sample
from sslkit.report.thumbnails import Sprite, data_uri, make_sprite

NUM_QUERIES, NUM_NEIGHBOURS = 12, 6
UMAP_NEIGHBOURS = 15  # its own default
MAX_POINTS, TILE, SIDE = 500, 48, 96
MAX_CLASSES = 16
# Tableau's ten: more classes than curves must be told apart, and marks have symbols too.
COLOURS = tuple(qualitative.T10)
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon")
OTHERS = "other classes"


@dataclass(frozen=True)
class Picture:
    """An image of a gallery.

    Attributes:
        address: Its ``data:`` address.
        label: Its class, or empty.
        similarity: Cosine similarity to the query; 1 for the query.
        right: Whether its class is the query's; None without labels.
    """

    address: str
    label: str
    similarity: float = 1.0
    right: bool | None = None


@dataclass(frozen=True)
class Row:
    """A query and its nearest images, the nearest first."""

    query: Picture
    neighbours: list[Picture]


def find_neighbours(sample: Sample, bank: Tensor, queries: Tensor) -> list[Row]:
    """A dozen queries, drawn by lot and spread over the classes, with their nearest images of the bank.

    Args:
        sample: The images.
        bank: (N, D) unit rows.
        queries: (Q, D) unit rows.
    """
    chosen = _spread(sample.query_labels, len(queries))
    similarity, rows = nearest(queries[torch.tensor(chosen)], bank, min(NUM_NEIGHBOURS, len(bank)))
    gallery = []
    for query, near, values in zip(chosen, rows.tolist(), similarity.tolist(), strict=True):
        truth = sample.query_labels[query] if sample.query_labels else ""
        found = []
        for row, value in zip(near, values, strict=True):
            label = sample.bank_labels[row] if sample.bank_labels else ""
            address = data_uri(sample.bank.read(row), SIDE)
            found.append(Picture(address, label, value, label == truth if sample.bank_labels else None))
        gallery.append(Row(Picture(data_uri(sample.queries.read(query), SIDE), truth), found))
    return gallery


def _spread(labels: list[str] | None, count: int) -> list[int]:
    """Positions of queries: of each class in turn one, in a seeded order."""
    order: list[int] = np.random.default_rng(SEED).permutation(count).tolist()
    if labels is None:
        return order[:NUM_QUERIES]
    met: Counter[str] = Counter()
    turn = {}
    for index in order:
        turn[index] = met[labels[index]]
        met[labels[index]] += 1
    return sorted(order, key=lambda index: (turn[index], labels[index]))[:NUM_QUERIES]


@dataclass(frozen=True)
class Map:
    """Images in the plane, near each other where their features are.

    Attributes:
        figure: Plotly's JSON; each point's ``customdata`` is its tile in the sprite.
        sprite: The images, for hover.
        note: How it was made.
    """

    figure: str
    sprite: Sprite
    note: str


def draw_map(sample: Sample, queries: Tensor) -> Map:
    """At most 500 of the queries in two dimensions, by UMAP if it is installed, else by PCA."""
    count = min(len(queries), MAX_POINTS)
    points, note, axes = flatten(queries[:count])
    groups = group_by_class(sample.query_labels[:count] if sample.query_labels else [""] * count)
    figure = go.Figure()
    for place, (name, members) in enumerate(groups.items()):
        colour = "#808080" if name == OTHERS else COLOURS[place % len(COLOURS)]
        symbol = SYMBOLS[place % len(SYMBOLS)]
        figure.add_trace(
            go.Scatter(
                x=points[members, 0].tolist(),
                y=points[members, 1].tolist(),
                customdata=members,
                text=[plain(sample.query_labels[index]) if sample.query_labels else "" for index in members],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 8, "opacity": 0.85},
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
    sprite = make_sprite([sample.queries.read(index) for index in range(count)], TILE)
    return Map(lay_out(figure, height=560, **layout), sprite, note)


def group_by_class(labels: list[str]) -> dict[str, list[int]]:
    """Positions by class; of many classes, those with fewest images are put together."""
    counts = Counter(labels)
    kept = {name for name, _ in counts.most_common(MAX_CLASSES)} if len(counts) > MAX_CLASSES else set(counts)
    groups: dict[str, list[int]] = {name: [] for name in sorted(kept)}
    for index, label in enumerate(labels):
        groups.setdefault(label if label in kept else OTHERS, []).append(index)
    return groups


def flatten(features: Tensor) -> tuple[NDArray[np.float64], str, tuple[str, str]]:
    """Points (N, 2), how they were made, and the axes' titles. Features are (N, D), N at least 3."""
    if len(features) <= UMAP_NEIGHBOURS:
        return _principal_axes(features)
    try:
        umap = importlib.import_module("umap")
    except ImportError:
        return _principal_axes(features)
    reducer = umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, metric="cosine", random_state=SEED, n_jobs=1)
    note = f"UMAP, {UMAP_NEIGHBOURS} neighbours, cosine: only nearness has meaning."
    return reducer.fit_transform(features.numpy()), note, ("", "")


def _principal_axes(features: Tensor) -> tuple[NDArray[np.float64], str, tuple[str, str]]:
    centred = (features - features.mean(dim=0)).double()
    left, scales, _ = torch.linalg.svd(centred, full_matrices=False)
    points = torch.zeros(len(features), 2, dtype=torch.float64)
    points[:, : min(2, len(scales))] = left[:, :2] * scales[:2]
    shares = [*(scales.square() / scales.square().sum().clamp_min(1e-30)).tolist(), 0.0]
    note = "PCA of unit features: what lies apart in other directions falls together here; UMAP is used if installed."
    return points.numpy(), note, (f"{shares[0]:.0%} of variance", f"{shares[1]:.0%} of variance")
