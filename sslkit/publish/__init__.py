"""How weights leave and come in: folders that timm and transformers load."""

from sslkit.publish.detectron2 import export_detectron2
from sslkit.publish.export import EncoderFolderError, encoder_config, export_encoder, write_encoder
from sslkit.publish.importing.convert import Imported, import_checkpoint
from sslkit.publish.repository import Published, PublishError, publish_run

__all__ = [
    "EncoderFolderError",
    "Imported",
    "PublishError",
    "Published",
    "encoder_config",
    "export_detectron2",
    "export_encoder",
    "import_checkpoint",
    "publish_run",
    "write_encoder",
]
