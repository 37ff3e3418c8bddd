"""How weights leave: folders that timm and transformers load."""

from sslkit.publish.detectron2 import export_detectron2
from sslkit.publish.export import EncoderFolderError, encoder_config, export_encoder, write_encoder

__all__ = ["EncoderFolderError", "encoder_config", "export_detectron2", "export_encoder", "write_encoder"]
