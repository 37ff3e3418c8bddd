"""Detection: annotated images, detectors on an encoder, and COCO's average precision. Read `detect` first."""
