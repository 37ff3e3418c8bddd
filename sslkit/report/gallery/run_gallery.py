"""The images of a run in its report: neighbours, map, views and attention, or the reason why one is missing."""

from dataclasses import dataclass

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder, load_encoder
from sslkit.report.gallery.attention import AttentionRow, draw_attention
from sslkit.report.gallery.gallery_images import GalleryImages, choose_images, extract
from sslkit.report.gallery.neighbours import Map, NeighbourRow, draw_map, find_neighbours
from sslkit.report.gallery.view_gallery import ViewGallery, draw_views
from sslkit.report.run_record import RunRecord


@dataclass
class RunGallery:
    """The images that a report shows of a run.

    Attributes:
        run: Name of the run.
        data: Description of the images of neighbours, map and attention.
        neighbours: Query images and their nearest images.
        correct: How many neighbours have the class of their query, as text; None without labels.
        map: The images in two dimensions.
        absent: Why neighbours and map are missing.
        attention: Images and their attention maps.
        attention_absent: Why attention is missing.
        views: Augmented views.
        views_absent: Why the views are missing.
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
    """Draw all images of a run that its encoder and data allow.

    Args:
        run: The run.
        data: Images to find neighbours in. Default: those of the monitor, or the training images.
        split: Split of ``data``.

    Raises:
        UserError: ``data`` is given and cannot be read. If the data of the recipe cannot be read, the gallery says so.
    """
    gallery = RunGallery(run.name)
    try:
        gallery.views = draw_views(run.recipe)
    except UserError as error:
        gallery.views_absent = f"The data of the run cannot be read: {error}"
    encoder: Encoder | None = None
    try:
        encoder = load_encoder(str(run.folder))
        images = choose_images(run.recipe, data, split)
    except UserError as error:
        if data and encoder is not None:
            raise
        how = "; give images with --data DIR." if encoder is not None else "; it is written with the first checkpoint."
        gallery.absent = gallery.attention_absent = f"{error}{how}"
        return gallery
    _add_encoder_panels(gallery, encoder, images)
    return gallery


def _add_encoder_panels(gallery: RunGallery, encoder: Encoder, images: GalleryImages) -> None:
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
