"""Encoders of unknown origin and of the Hugging Face Hub: checked before they are built, pinned to one revision.

Read `untrusted` first.
"""
