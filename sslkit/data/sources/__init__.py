"""The images of a source, wherever they are stored. Read `image_source` first, then `find`."""
