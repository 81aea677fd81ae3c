"""Labels of image latents from concepts, classes and attributes; any embedding model will do."""
