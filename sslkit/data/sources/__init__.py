"""Find and open the images a recipe names. Read `image_source` first."""
