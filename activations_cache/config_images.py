"""The images that a vision model reads: where they lie, and how they become pixels.

Like `activations_cache.config`, this imports neither torch nor a third-party package.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from activations_cache.checks import at_least, package_path, positive, require, split_fractions
from activations_cache.locations import DATASET

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
Tokens = Literal["patches", "cls", "all"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A set of images and where their classes stand."""

    path: str
    """A folder or .tar (class = its subfolder), a .npy, .parquet, saved dataset,
    package://PACKAGE/FILE, or dataset://NAME: one of the `datasets` library, on the hub or not."""
    field: str = "image"
    """Field of a record that holds the image (.parquet, dataset)."""
    label: str | None = None
    """Field of a record with the class; for a .npy, the path of a .npy with the classes."""
    subset: str | None = None
    """Configuration of a dataset on the hub."""
    part: str = "train"
    """Split of a dataset://NAME, as its authors call it."""

    def __post_init__(self) -> None:
        """Check the fields that need no disk."""
        require(bool(self.path), "path", "not be empty", self.path)
        package_path(self.path)
        is_dataset = self.path.startswith(DATASET)
        require(self.path != DATASET, "path", f"have the form {DATASET}NAME", self.path)
        only = f"be absent where path is not {DATASET}NAME"
        require(self.subset is None or is_dataset, "subset", only, self.subset)
        require(bool(self.part), "part", "not be empty", self.part)
        require(bool(self.field), "field", "not be empty", self.field)
        require(self.label != "", "label", "not be empty", self.label)
        if self.path.endswith(".npy") and self.label is not None:
            is_array = self.label.endswith(".npy")
            require(is_array, "label", "be the path of a .npy file where path is one", self.label)


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """How an image becomes pixels; what is absent is taken from the model's own settings."""

    size: int | None = None
    """Height and width that the model reads, in pixels."""
    crop: bool | None = None
    """Whether the middle is cut out; otherwise the whole image is squeezed into the square."""
    shortest_edge: int | None = None
    """Where the middle is cut out: length to which the shorter side is brought before."""
    interpolation: Interpolation | None = None
    """How pixels are mixed when the image is resized."""
    mean: tuple[float, float, float] | None = None
    """What is subtracted from red, green and blue, which go from 0 to 1."""
    std: tuple[float, float, float] | None = None
    """By what they are divided then."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent pixels, each part from 0 to 255."""

    def __post_init__(self) -> None:
        """Check sizes and colours."""
        for name in ("size", "shortest_edge"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
        squeezed = self.crop is False and self.shortest_edge is not None
        require(not squeezed, "shortest_edge", "be absent where crop is false", self.shortest_edge)
        if self.size is not None and self.shortest_edge is not None:
            at_least("shortest_edge", self.shortest_edge, self.size)
        if self.interpolation is not None:
            rule = f"be one of {', '.join(INTERPOLATIONS)}"
            require(self.interpolation in INTERPOLATIONS, "interpolation", rule, self.interpolation)
        for value in self.std or ():
            positive("std", value)
        inside = all(0 <= value <= 255 for value in self.background)
        require(inside, "background", "have parts from 0 to 255", self.background)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """The images that the model reads: sources, pixels, positions, the three splits."""

    sources: tuple[ImageSource, ...]
    """Sets of images."""
    preprocessing: ImagePreprocessing = ImagePreprocessing()
    """How an image becomes pixels."""
    tokens: Tokens = "patches"
    """Positions that give rows: patches, cls (the class token alone), or all, registers too."""
    explain: float = 0.6
    """Fraction of the images from which explanations are made."""
    score: float = 0.3
    """Fraction of the images on which explanations are scored."""
    hold: float = 0.1
    """Fraction of the images that neither training nor explaining sees."""
    seed: int = 0
    """Decides, with an image's bytes, its split and its place in the order."""

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        require(len(self.sources) > 0, "sources", "name at least one source", self.sources)
        distinct = len(set(self.sources)) == len(self.sources)
        require(distinct, "sources", "differ from each other", [s.path for s in self.sources])
        require(self.tokens in TOKENS, "tokens", f"be one of {', '.join(TOKENS)}", self.tokens)
        split_fractions(self.explain, self.score, self.hold, "images")
        at_least("seed", self.seed, 0)
