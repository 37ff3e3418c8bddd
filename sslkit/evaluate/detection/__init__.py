"""Detection: annotated folders, detectors over an encoder, and average precision as COCO defines it."""
