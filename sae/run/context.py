"""What the jobs share: their progress, a run's parts, a cache's model, a dictionary's origin."""

import contextlib
import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import activations_cache
from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress, WrongClassError, silent
from activations_cache.config import ModelConfig
from activations_cache.models import LoadedModel, load_model
from activations_cache.tokens import Pieces
from activations_cache.vision import LoadedVisionModel, load_any_model, load_vision_model
from sae import notebook, pretrained
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.evaluate.probe_tasks import check_hook_point
from sae.pretrained import Source, monosema_format
from sae.pretrained.hub import directory_of
from sae.pretrained.origin import Difference, Origin, origin_of
from sae.read_out import ReadOutName, checked
from sae.run.config import RunConfig
from sae.run.read_outs import ROWS, set_read_out

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

    def _repr_html_(self) -> str:
        return notebook.table(self.title, self.table.columns, self.table.rows, self.table.note)


class FactTable(NamedTuple):
    """A titled list of names and what they stand for."""

    title: str
    rows: list[tuple[str, str]]
    note: str = ""

    def _repr_html_(self) -> str:
        return notebook.facts(*self)


class FittedDictionary(NamedTuple):
    """A dictionary that may be used on a cache: the hook points and the model were compared."""

    name: str
    """For messages and tables."""
    dictionary: SparseAutoencoder
    """It reads and predicts hook points of the cache."""
    path: str | Path | None
    """None for one that was passed as it is."""
    source: Source | None
    """What it was read from; None for one that was passed as it is."""
    inputs: tuple[str, ...]
    """The hook points that it reads."""
    outputs: tuple[str, ...]
    """Those that it predicts."""
    provenance: Mapping[str, Any]
    """What our own files say of how it came about."""
    differs: tuple[str, ...]
    """In what the cache differs from what it was trained on, in words; only where forced."""

    @property
    def hook_point(self) -> str:
        """The first hook point that it reads."""
        return self.inputs[0]

    def rows_of(self, cache: ActivationCache) -> ActivationCache:
        """Return a cache as the dictionary reads it."""
        return cache.concatenated(self.inputs)

    def refined(
        self, cache: ActivationCache, n: int = ROWS, seed: int = 0, progress: Progress = silent
    ) -> Path | None:
        """Set the refined read-out on training rows; return its file, if it has a place."""
        where = (self.rows_of(cache), self.hook_point)
        read_out = set_read_out(self.dictionary, *where, n, seed, progress)
        if self.path is None or self.source is None:
            return None
        home, digest = directory_of(self.path, self.source), self.source.weights_sha256
        return monosema_format.save_read_out(read_out, home, digest)


class Run:
    """What the steps of one run share; slow things are loaded when a step first needs them."""

    def __init__(self, config: RunConfig) -> None:
        """Take a checked config; nothing is read yet."""
        self.config = config
        self.output = Path(config.output)
        self.cache_path = Path(config.cache_path or self.output / "cache")
        self.hook_point = config.cache.hook_points[0]
        self.is_held = False
        """Whether this process holds the lock of the run's directory."""
        self.identity = ""
        """Digest of all that decides the step that is being done."""

    def release(self) -> None:
        """The lock of the run's directory is given back."""
        self.is_held = False

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
        return {name: part.dictionary for name, part in self.fitted.items()}

    @cached_property
    def fitted(self) -> dict[str, FittedDictionary]:
        """The same with the hook points that they read, compared with the cache."""
        path = self.path("train")
        read_out = self.config.read_out
        return {
            name: fitted(path / name, self.cache, read_out=read_out)
            for name in self.config.train.saes
        }

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
        raise MonosemaError(
            f"{cache.path} must record its model to be compared, got a cache without"
        )
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


def wrong_class(what: str, rule: str, got: object, advice: str) -> WrongClassError:
    """Return the error for an argument of another class than a job takes."""
    return WrongClassError(f"{what} must {rule}, got {type(got).__name__}; {advice}")


def fitted(
    given: DictionaryOrPath,
    cache: ActivationCache,
    hook_point: str | None = None,
    *,
    force: bool = False,
    name: str = "",
    read_out: ReadOutName | None = None,
) -> FittedDictionary:
    """Load a dictionary and compare its origin with a cache: the one place where that is done.

    The hook points that it records decide; `hook_point` is needed for one that records none, where
    the cache has several.

    Args:
        given: The dictionary, its path, or its name on the hub.
        cache: What it is to be used on.
        hook_point: A stream of the cache.
        force: Go on where the origin differs; `differs` then says in what.
        name: How it is called; its path when empty.
        read_out: How its latents are read; as the dictionary is when absent. A refined read-out
            that was never set is set on rows of the cache, and written.

    Raises:
        TypeError: If it is of another class.
        ValueError: If the hook points, the models or the widths differ, or none is named.
    """
    path = source = None
    if isinstance(given, str | Path):
        path, (dictionary, source, origin) = given, pretrained.load_with_source(given)
    else:
        dictionary = loaded_dictionary(given)
        origin = origin_of(dictionary.config, dictionary.provenance)
    name = name or ("the dictionary" if path is None else str(given))
    inputs, outputs = _place(name, origin, cache, hook_point, dictionary.config.hook_points)
    differs = require_origin(name, origin, cache, inputs, None, force)
    dictionary = at_places(dictionary, inputs)
    for side, points, width in (
        ("read", inputs, dictionary.config.d_in),
        ("predict", outputs, dictionary.config.width_out),
    ):
        held = sum(cache.d_model(point) for point in points)
        if held != width:
            raise MonosemaError(
                f"{name} must {side} rows as wide as {', '.join(points)} of {cache.path}, {held}, "
                f"got {width}; name the hook point it was trained on"
            )
    where = (path, source, inputs, outputs)
    one = FittedDictionary(name, dictionary, *where, dictionary.provenance, differs)
    read_out = checked(read_out or dictionary.read_by)
    if read_out == "refined" and dictionary.read_out is None:
        one.refined(cache)
    return one._replace(dictionary=dictionary.reading(read_out))


def _place(
    name: str,
    origin: Origin,
    cache: ActivationCache,
    hook_point: str | None,
    measured: tuple[str, ...],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The hook points that are read and predicted; the recorded ones where the cache has them."""
    if hook_point is not None:
        check_hook_point(cache, hook_point)
    recorded, held = (*origin.inputs, *origin.outputs), cache.hook_points
    if recorded and set(recorded) <= set(held) and hook_point in (None, *recorded):
        return origin.inputs, origin.outputs or origin.inputs
    known = [point for point in measured if len(measured) == 1 and point in held]
    point = hook_point or (held[0] if len(held) == 1 else next(iter(known), None))
    if recorded and (point is None or len(recorded) > 1):
        used = hook_point or ", ".join(held)
        raise _elsewhere(name, Difference("hook point", ", ".join(recorded), used), "")
    if point is None:
        raise MonosemaError(
            f"--hook-point must be one of {', '.join(held)} for {name}, whose files name none, got "
            "none; name one"
        )
    return (point,), (point,)


def require_origin(
    name: str,
    origin: Origin,
    cache: ActivationCache,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...] | None,
    force: bool,
) -> tuple[str, ...]:
    """Refuse a dictionary of another place or model than the cache, or return what differs.

    Raises:
        ValueError: If something differs and is not forced.
    """
    differences = origin.places(inputs, outputs) + origin.models(*model_identity(cache))
    if differences and not force:
        raise _elsewhere(name, differences[0], ", or go on with --force (force=True)")
    return tuple(map(str, differences))


def _elsewhere(name: str, difference: Difference, advice: str) -> MonosemaError:
    what, trained, used = difference
    return MonosemaError(
        f"{name} must be a dictionary of the cache's {what} {used}, got one of {trained}; pass the "
        f"cache that it was trained on{advice}"
    )


def at_places(dictionary: SparseAutoencoder, inputs: tuple[str, ...]) -> SparseAutoencoder:
    """Return the dictionary, which names these hook points if it names any."""
    config = dictionary.config
    if not config.inputs or tuple(part.hook_point for part in config.inputs) == inputs:
        return dictionary
    slices = zip(config.inputs, inputs, strict=True)
    moved = copy.copy(dictionary)  # with the same parameters
    moved.config = replace(config, inputs=tuple(replace(s, hook_point=p) for s, p in slices))
    return moved


def with_differences(note: str, differs: Mapping[str, tuple[str, ...]]) -> str:
    """A table's note, and in what dictionaries are used elsewhere than where they were trained."""
    lines = [f"forced: {name}: {'; '.join(parts)}" for name, parts in differs.items()]
    return "; ".join([*([note] if note else []), *lines])


def model_identity(cache: ActivationCache) -> tuple[Mapping[str, Any], str]:
    """Return the hashes of the model that made a cache and its path, as far as they are known."""
    recorded, model = cache.manifest.provenance.get("model"), cache.identity.get("model")
    path = str(recorded.get("path", "")) if isinstance(recorded, dict) else ""
    if isinstance(model, dict):
        return model, path
    return ({"model_sha256": model} if model else {}), path
