"""Readers of image folders, tables, tar files and streams, and the rules for splits and columns.

Read `image_folders` first.
"""
