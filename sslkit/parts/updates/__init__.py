"""Updates that a GPU decides about itself, while the host goes on."""
