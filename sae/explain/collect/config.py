"""Which windows are kept for every latent; standard library only."""

from dataclasses import dataclass

from activations_cache.checks import at_least, require


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How examples are cut into windows, and how many of which kind are kept in each split."""

    tokens: int = 32
    """Tokens of a window; 0 takes whole examples, as for images."""
    n_top: int = 10
    """Windows with the largest peaks."""
    n_buckets: int = 5
    """Equal steps of activation from 0 to the latent's maximum."""
    per_bucket: int = 4
    """Windows taken at random from each step."""
    weak_share: float = 0.1
    """A window whose peak is at most this share of the maximum is weakly active, not active."""
    n_negatives: int = 10
    """Windows of each of the four sources of negatives."""
    pool: int = 2048
    """Random windows of each split, kept with all their activations, to take negatives from."""
    n_neighbours: int = 8
    """Latents that fire together with each one most, by Jaccard's index."""
    rows_per_chunk: int = 8192
    """Rows encoded at once, rounded up to whole examples."""
    save_every: int = 64
    """Chunks between two saved states, from which an interrupted pass goes on."""
    seed: int = 0
    """Seed of the hash that decides what is kept."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        least = {"tokens": 0, "n_top": 0, "per_bucket": 0, "n_negatives": 0, "n_neighbours": 0}
        least |= {"n_buckets": 1, "pool": 1, "rows_per_chunk": 1, "save_every": 1, "seed": 0}
        for name, value in least.items():
            at_least(name, getattr(self, name), value)
        require(0 <= self.weak_share < 1, "weak_share", "lie in [0, 1)", self.weak_share)
