"""What can be read off rows and latents with labels: probes, concept directions, bottlenecks."""
