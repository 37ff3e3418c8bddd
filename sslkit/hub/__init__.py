"""Encoder folders of unknown origin, and encoders on the Hugging Face Hub: checked before they are built.

Read `untrusted` first.
"""
