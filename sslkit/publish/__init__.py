"""How weights leave and come in: folders that timm and transformers load."""

from sslkit.publish.detectron2 import export_detectron2
from sslkit.publish.export import EncoderFolderError, encoder_config, export_encoder, write_encoder
from sslkit.publish.hub import Published, PublishError, publish_run
from sslkit.publish.importing import Imported, import_checkpoint

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
