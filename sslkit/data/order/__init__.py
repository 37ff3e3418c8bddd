"""Which samples make an epoch, as pure functions of the seed and the epoch. Read `mixture` first."""
