"""Images: where they are, their order, decoding, views and batches. Knows no method.

To follow a batch, read `sources/image_source`, `order/sampler`, `loading/loader`, `augment/cpu`. Subpackages import
only what stands before them: decode, config and batch, order, formats, sources, augment, loading, tools.
"""
