"""`sae inspect`."""

from pathlib import Path

from sae import pretrained
from sae.cli import console


def inspect_dictionary(path: str) -> None:
    """Print a dictionary's form and how it is applied."""
    dictionary = pretrained.load(Path(path))
    config = dictionary.config
    norms = dictionary.W_dec.norm(dim=1)
    rows = [
        ("latents", f"{config.d_sae:,}"),
        ("width", f"{config.d_in} -> {config.width_out}"),
        ("activation", str(config.activation)),
        ("input", f"x * {config.input_scale:.6g}, minus {config.b_in}"),
        ("decoder norms", f"{float(norms.min()):.3g} to {float(norms.max()):.3g}"),
    ]
    console.table(path, ("", ""), rows, "read as: x_hat = (a @ W_dec + b_dec) / input_scale")
