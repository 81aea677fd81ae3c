"""What the directions and activations of dictionaries say about each other and about themselves."""
