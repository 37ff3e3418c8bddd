"""Continue public weights on own images, and say whether it helped. Read `adapt_weights` first.

It chooses a recipe (`adapt_recipe`), judges start and end on labelled images (`judged_images`, `candidates`), and
without labels by `label_free_verdict`.
"""

from sslkit.adapt.adapt_weights import AdaptOptions, AdaptResult, adapt_weights

__all__ = ["AdaptOptions", "AdaptResult", "adapt_weights"]
