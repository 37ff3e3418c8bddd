"""The galleries of a run: neighbours, map, views and attention, or the sentence that says why one is not there."""

from dataclasses import dataclass

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder, load_encoder
from sslkit.report.attention import AttentionRow, draw_attention
from sslkit.report.neighbours import Map, Row, draw_map, find_neighbours
from sslkit.report.run_reader import RunRecord
from sslkit.report.sample import Sample, draw_sample, features_of
from sslkit.report.view_gallery import ViewGallery, draw_views


@dataclass
class Galleries:
    """What a page shows of a run's images.

    Attributes:
        run: The run's name.
        sample: Which images neighbours, map and attention are of.
        neighbours: Queries and their nearest images.
        right: How many of the neighbours are of the query's class, in words; None without labels.
        map: The images in the plane.
        absent: Why neighbours and map are not there.
        attention: Images and where the class token looks.
        attention_absent: Why not.
        views: What the augmentations do.
        views_absent: Why not.
    """

    run: str
    sample: str = ""
    neighbours: list[Row] | None = None
    right: str | None = None
    map: Map | None = None
    absent: str = ""
    attention: list[AttentionRow] | None = None
    attention_absent: str = ""
    views: ViewGallery | None = None
    views_absent: str = ""


def draw_galleries(run: RunRecord, data: str = "") -> Galleries:
    """Everything that can be shown of a run's images.

    Args:
        run: The run.
        data: Images to look for neighbours in; empty takes the monitor's, else the run's own.

    Raises:
        UserError: ``data`` is given and cannot be read. What the recipe names may be gone; the page then says so.
    """
    galleries = Galleries(run.name)
    try:
        galleries.views = draw_views(run.recipe)
    except UserError as error:
        galleries.views_absent = f"The run's data cannot be read here: {error}"
    encoder: Encoder | None = None
    try:
        encoder = load_encoder(str(run.folder))
        sample = draw_sample(run.recipe, data)
    except UserError as error:
        if data and encoder is not None:
            raise
        how = "; name images with --data DIR." if encoder is not None else "; it is written with the first checkpoint."
        galleries.absent = galleries.attention_absent = f"{error}{how}"
        return galleries
    _look_through(galleries, encoder, sample)
    return galleries


def _look_through(galleries: Galleries, encoder: Encoder, sample: Sample) -> None:
    bank, queries = features_of(encoder, sample)
    galleries.sample = sample.description
    galleries.neighbours = find_neighbours(sample, bank, queries)
    galleries.map = draw_map(sample, queries)
    if sample.query_labels is not None:
        marks = [found.right for row in galleries.neighbours for found in row.neighbours]
        galleries.right = f"{sum(map(bool, marks))} of {len(marks)} here"
    try:
        galleries.attention = draw_attention(encoder, sample)
    except UserError as error:
        galleries.attention_absent = f"Not for {encoder.architecture}: {error}."
