"""Features of images: load an encoder, choose layers, extract and store their features. Read `encoder` first."""
