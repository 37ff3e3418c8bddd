"""Features of images: load an encoder, extract, read out, store. Read `extraction` first."""
