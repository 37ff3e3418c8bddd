"""What the images are and how they are cut into views. Knows no method."""
