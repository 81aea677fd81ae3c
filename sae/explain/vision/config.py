"""How latents of images are labelled and scored; neither torch nor a third-party package here."""

from dataclasses import dataclass
from typing import Literal

from activations_cache.checks import require

Method = Literal["enrichment", "soft_wpmi"]
"""What makes the labels: Fisher's test of classes and groups, or CLIP-Dissect over the classes."""


@dataclass(frozen=True, kw_only=True)
class ImageLabelConfig:
    """Labels from the classes of images, and their scores on other images."""

    method: Method = "enrichment"
    """What makes the labels; the other one's score is reported beside it."""
    group_separator: str | None = None
    """Classes that share what stands before it also make a group, such as "-" in animals-birds."""
    min_images: int = 5
    """A latent that fires on fewer images of either split is "insufficient"."""
    max_p: float = 0.05
    """A class less certain than this on the explain split, all classes allowed for, is no label."""
    permutations: int = 999
    """Permuted copies of the score split's classes that show what chance gives."""
    top_images: int = 8
    """Images kept per latent, by their largest activation."""
    bucket_images: int = 1
    """Further images of each fifth of a latent's activations, from 0 to its largest."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        least = {"min_images": 2, "permutations": 99, "top_images": 1, "bucket_images": 0}
        for name, n in least.items():
            require(getattr(self, name) >= n, name, f"be at least {n}", getattr(self, name))
        require(0 < self.max_p <= 1, "max_p", "lie above 0 and be at most 1", self.max_p)
        separator = self.group_separator
        require(separator != "", "group_separator", "not be empty", separator)
