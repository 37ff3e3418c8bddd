"""Independent plain-PyTorch oracles for MoCo v1, v2 and v3, written from the facts document alone."""
