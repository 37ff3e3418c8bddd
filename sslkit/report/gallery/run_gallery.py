"""The images of a run in its report: neighbours, map, views and attention, or the reason why one is missing."""

from dataclasses import dataclass

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import load_encoder
from sslkit.report.gallery.attention import AttentionRow, draw_attention
from sslkit.report.gallery.gallery_images import choose_images, extract
from sslkit.report.gallery.neighbours import Map, NeighbourRow, draw_map, find_neighbours
from sslkit.report.gallery.view_gallery import ViewGallery, draw_views
from sslkit.report.run_record import RunRecord


@dataclass
class RunGallery:
    """The images that a report shows of a run, and why some are missing.

    ``data`` describes the images of neighbours, map and attention. ``correct`` says how many neighbours have the class
    of their query; None without labels.
    """

    run: str
    data: str = ""
    neighbours: list[NeighbourRow] | None = None
    correct: str | None = None
    map: Map | None = None
    absent: str = ""
    attention: list[AttentionRow] | None = None
    attention_absent: str = ""
    views: ViewGallery | None = None
    views_absent: str = ""


def draw_gallery(run: RunRecord, data: str = "", split: str = "train") -> RunGallery:
    """Draw all images of a run that its encoder and data allow. See `write_report` for ``data``.

    Raises `UserError` if ``data`` is given and cannot be read. For the data of the recipe, the gallery says so.
    """
    gallery = RunGallery(run.name)
    try:
        gallery.views = draw_views(run.recipe)
    except UserError as error:
        gallery.views_absent = f"The data of the run cannot be read: {error}"
    try:
        encoder = load_encoder(str(run.folder))
    except UserError as error:
        gallery.absent = gallery.attention_absent = f"{error}; it is written with the first checkpoint."
        return gallery
    try:
        images = choose_images(run.recipe, data, split)
    except UserError as error:
        if data:
            raise
        gallery.absent = gallery.attention_absent = f"{error}; give images with --data DIR."
        return gallery
    bank, queries = extract(encoder, images)
    gallery.data = images.description
    gallery.neighbours = find_neighbours(images, bank, queries)
    gallery.map = draw_map(images, queries)
    if images.query_labels is not None:
        same_class = [found.same_class for row in gallery.neighbours for found in row.neighbours]
        gallery.correct = f"{sum(map(bool, same_class))} of {len(same_class)}"
    try:
        gallery.attention = draw_attention(encoder, images)
    except UserError as error:
        gallery.attention_absent = f"Not available for {encoder.architecture}: {error}."
    return gallery
