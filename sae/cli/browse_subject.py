"""A dictionary that is browsed, and what it shares with others."""

from pathlib import Path
from typing import NamedTuple

from activations_cache import ActivationCache
from activations_cache.models import LoadedModel
from sae.autoencoder import SparseAutoencoder
from sae.cli.pictures import Pictures


class Subject(NamedTuple):
    """A dictionary to browse, and where things about it lie."""

    name: str
    dictionary: SparseAutoencoder
    path: Path
    """Its directory, as the steering command is to name it."""
    explained: Path
    """Directory that `sae explain` wrote."""
    hook_point: str


class Around(NamedTuple):
    """What the dictionaries share; a part that is not there leaves parts of the browser out."""

    cache: ActivationCache | None
    loaded: LoadedModel | None
    strings: list[str]
    """Each token id as text; empty without a model."""
    pictures: Pictures | None = None
    """The images of a cache of images."""
