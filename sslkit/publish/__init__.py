"""How weights leave: folders that timm and transformers load."""

from sslkit.publish.export import EncoderFolderError, export_encoder, write_encoder

__all__ = ["EncoderFolderError", "export_encoder", "write_encoder"]
