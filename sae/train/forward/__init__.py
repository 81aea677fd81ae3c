"""One forward pass of training: losses, and what fired; `run` chooses by the activation."""
