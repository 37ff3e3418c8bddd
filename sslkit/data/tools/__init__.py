"""Tools that read a whole source: inspection, duplicates, packing. Read `inspection` first."""
