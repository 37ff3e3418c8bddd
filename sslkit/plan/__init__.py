"""A recipe for somebody's own images, made from the images, the machine and the time there is.

Read `make_plan` first: it looks at the images, applies the `rules` in order, and measures a step.
"""
