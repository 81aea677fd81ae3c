"""How much is read to evaluate dictionaries, as a frozen config; no torch here."""

from dataclasses import dataclass

from activations_cache.checks import at_least, require


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Sizes of an evaluation."""

    n_contexts: int = 24
    """Held-out contexts through which the model runs with each dictionary spliced in."""
    n_contexts_special: int = 8
    """Those among them that are run again with the special positions spliced too; 0 for none."""
    contexts_per_forward: int = 8
    """Contexts that the model reads at once; their logits are held twice."""
    rows_per_chunk: int = 4096
    """Rows that are encoded at once."""
    n_rows_firing: int = 50_000
    """Training rows in which firing is counted, beside all held-out rows; 0 for none."""
    n_images: int = 2000
    """Training images, and as many held out, whose classes are told with each dictionary spliced
    in; 0 for none."""
    n_neighbours: int = 5
    """Nearest training images that tell a class."""
    n_resamples: int = 2000
    """Bootstrap resamples of the contexts or images, for the intervals."""
    seed: int = 0
    """Decides which contexts and rows are taken, and the resamples."""

    def __post_init__(self) -> None:
        """Check ranges, and the fields against each other."""
        for name in (
            "n_contexts",
            "contexts_per_forward",
            "rows_per_chunk",
            "n_neighbours",
            "n_resamples",
        ):
            at_least(name, getattr(self, name), 1)
        for name in ("n_contexts_special", "n_rows_firing", "n_images", "seed"):
            at_least(name, getattr(self, name), 0)
        fewer = self.n_contexts_special <= self.n_contexts
        rule = f"be at most n_contexts={self.n_contexts}"
        require(fewer, "n_contexts_special", rule, self.n_contexts_special)
