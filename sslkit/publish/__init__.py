"""Export, publish and import of encoders, as folders that timm and transformers load. Read `encoder_folder` first."""

from sslkit.publish.detectron2 import export_detectron2
from sslkit.publish.encoder_folder import EncoderFolderError, encoder_config, write_encoder
from sslkit.publish.export import export_encoder
from sslkit.publish.hub_upload import PublishError
from sslkit.publish.importing.convert import Imported, import_checkpoint
from sslkit.publish.repository import Published, publish_run

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
