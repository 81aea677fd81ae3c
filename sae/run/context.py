"""What the jobs share: their progress, a run's parts, a cache's model, a dictionary's origin."""

import contextlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import activations_cache
from activations_cache import ActivationCache
from activations_cache.checks import Progress, silent
from activations_cache.config import ModelConfig
from activations_cache.models import LoadedModel, load_model
from activations_cache.pieces import Pieces
from activations_cache.vision import LoadedVisionModel, load_any_model, load_vision_model
from sae import pretrained
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.pretrained import Source
from sae.pretrained.hub import directory_of
from sae.run.config import RunConfig

CacheOrPath = ActivationCache | str | Path
"""A cache, or its path."""

DictionaryOrPath = SparseAutoencoder | str | Path
"""A dictionary, or its path, or its name on the hub."""

Steps = Callable[[str], AbstractContextManager[Progress]]
"""Shows a job's steps, each while it runs: `with steps("probe") as progress: ...`."""


def steps_to(progress: Progress) -> Steps:
    """Return steps that all report to one function."""

    def step(_name: str) -> AbstractContextManager[Progress]:
        return contextlib.nullcontext(progress)

    return step


silent_steps = steps_to(silent)
"""What a job uses when its caller shows nothing."""


class Section(NamedTuple):
    """A titled table."""

    title: str
    table: ResultTable


class Facts(NamedTuple):
    """A titled list of names and what they stand for."""

    title: str
    rows: list[tuple[str, str]]
    note: str = ""


class Run:
    """What the steps of one run share; slow things are loaded when a step first needs them."""

    def __init__(self, config: RunConfig) -> None:
        """Take a checked config; nothing is read yet."""
        self.config = config
        self.output = Path(config.output)
        self.cache_path = Path(config.cache_path or self.output / "cache")
        self.hook_point = config.cache.hook_points[0]

    def path(self, step: str) -> Path:
        """Directory of a step's result."""
        return self.cache_path if step == "cache" else self.output / step

    @cached_property
    def cache(self) -> ActivationCache:
        """The finished cache."""
        return activations_cache.open(self.cache_path)

    @property
    def of_images(self) -> bool:
        """Whether the cache is of images."""
        return self.config.cache.images is not None

    @cached_property
    def vision(self) -> LoadedVisionModel:
        """The vision model of a cache of images."""
        return load_vision_model(self.config.cache.model)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model and its tokenizer."""
        return load_model(self.config.cache.model)

    @cached_property
    def pieces(self) -> Pieces:
        """What turns rows of tokens into text."""
        return pieces_of(self.loaded)

    @cached_property
    def dictionaries(self) -> dict[str, SparseAutoencoder]:
        """The trained dictionaries by name."""
        return {n: pretrained.load(self.path("train") / n) for n in self.config.train.saes}

    def is_frozen(self, name: str) -> bool:
        """Whether an entry of `saes:` is a frozen baseline."""
        return self.config.train.saes[name].frozen != "none"


def pieces_of(loaded: LoadedModel) -> Pieces:
    """Return what turns the rows of a model's tokens into text, and its tokens one by one."""
    embeddings = loaded.model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor), type(embeddings)
    return Pieces(loaded.tokenizer, embeddings.shape[0])


def holds_images(cache: ActivationCache) -> bool:
    """Whether a cache is of images."""
    return "images" in cache.identity


def model_of(cache: ActivationCache, moved: str | None = None) -> ModelConfig:
    """Return the configuration of the model that a cache records.

    Args:
        cache: The cache.
        moved: Where the model is now, if not where it was.

    Raises:
        ValueError: If it records none.
    """
    recorded = recorded_model(cache)
    if recorded is None:
        raise ValueError(f"{cache.path} must record its model to be compared, got a cache without")
    path, revision = (moved, None) if moved else (recorded["path"], recorded["revision"])
    return ModelConfig(path=path, revision=revision, dtype=recorded["dtype"])


def recorded_model(cache: ActivationCache) -> dict[str, Any] | None:
    """Return what a cache records of its model; None for a cache of an array."""
    return cache.manifest.plan.request.get("config", {}).get("model")


def load_model_of(
    cache: ActivationCache, progress: Progress = silent
) -> LoadedModel | LoadedVisionModel | None:
    """Load the model that a cache records; None for caches that record none."""
    if recorded_model(cache) is None:
        return None
    return load_any_model(model_of(cache), progress=progress)


def opened(cache: CacheOrPath) -> ActivationCache:
    """Return the cache, opened if its path is given."""
    if isinstance(cache, ActivationCache):
        return cache
    if isinstance(cache, str | Path):
        return activations_cache.open(cache)
    raise wrong_class(
        "cache", "be a cache or the path of one", cache, "pass what sae.run.cache returns"
    )


def results_of(path: str | Path, source: Source | None = None) -> Path:
    """Return where labels and pages of a dictionary go if nobody names another place.

    Args:
        path: A directory, which holds them itself; or another path or name, whose results go into
            the user's cache under the hash of the weights.
        source: What it was read from; it is read here when absent.
    """
    if Path(path).is_dir():
        return Path(path)
    return directory_of(path, source or pretrained.load_with_source(path).source)


def loaded_dictionary(dictionary: DictionaryOrPath) -> SparseAutoencoder:
    """Return the dictionary, loaded if its path or its name is given."""
    if isinstance(dictionary, SparseAutoencoder):
        return dictionary
    if isinstance(dictionary, str | Path):
        return pretrained.load(dictionary)
    raise wrong_class(
        "dictionary", "be a SparseAutoencoder or the path of one", dictionary, "see sae.load"
    )


def wrong_class(what: str, rule: str, got: object, advice: str) -> TypeError:
    """Return the error for an argument of another class than a job takes."""
    return TypeError(f"{what} must {rule}, got {type(got).__name__}; {advice}")


def provenance_of(path: Path | None) -> dict[str, Any]:
    """Return what a dictionary of our own says of how it came about; empty for others."""
    file = None if path is None else path / "provenance.json"
    return json.loads(file.read_bytes()) if file is not None and file.is_file() else {}


def check_origin(
    name: str,
    dictionary: SparseAutoencoder,
    provenance: Mapping[str, Any],
    cache: ActivationCache,
    hook_point: str,
) -> None:
    """Refuse a dictionary that was trained elsewhere than on what the cache holds.

    Args:
        name: Of the dictionary, for the message.
        dictionary: Its hook points decide, where it records some.
        provenance: What its directory says, as `provenance_of` returns it.
        cache: What it is to be used on.
        hook_point: Which stream.

    Raises:
        ValueError: If the hook points or the models differ.
    """
    recorded = provenance.get("hook_points") or [provenance.get("hook_point")]
    points = [part.hook_point for part in dictionary.config.inputs] or recorded
    origin = {
        "hook point": ", ".join(point for point in points if point),
        "model": _model_id(provenance.get("model")),
    }
    held = {"hook point": hook_point, "model": _model_id(cache.identity.get("model"))}
    for what, of_cache in held.items():
        if origin[what] and of_cache and origin[what] != of_cache:
            raise ValueError(
                f"{name} must be a dictionary of the cache's {what} {of_cache}, got one of "
                f"{origin[what]}; pass the cache that it was trained on"
            )


def _model_id(recorded: object) -> str:
    """The hash of its weights, or what stands in its place; empty where nothing is recorded."""
    if isinstance(recorded, dict):
        return str(recorded.get("model_sha256", ""))
    return str(recorded or "")
