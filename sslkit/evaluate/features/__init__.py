"""Features of images: load an encoder, extract its features, choose which layers to read, store the features.

Read `encoder` first, then `extraction`.
"""
