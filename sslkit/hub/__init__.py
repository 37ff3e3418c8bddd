"""Checks of encoders of unknown origin, in folders and on the Hugging Face Hub. Read `untrusted` first."""
