"""Encoders of unknown origin, in folders and on the Hugging Face Hub, checked before they are built: `untrusted`."""
