"""Independent plain-PyTorch oracles for the self-supervised methods, written from the facts document alone."""
