"""`sae verify` and `sae inspect`."""

from pathlib import Path

import activations_cache
from sae import pretrained
from sae.cli import console


def verify_cache(path: str) -> int:
    """Check a cache's files against their checksums; returns the exit code."""
    cache = activations_cache.open(path)
    with console.step("verify") as report:
        problems = cache.verify(progress=report)
    for problem in problems:
        console.error(str(problem))
    if not problems:
        console.OUT.print(
            f"{path}: {cache.n_rows:,} rows in {len(cache.hook_points)} hook points, whole"
        )
    return 1 if problems else 0


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
