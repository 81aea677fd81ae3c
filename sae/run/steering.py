"""Steering: a model with latents changed, its texts, sweeps over strengths, latents by words."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations_cache import io
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import ModelConfig, TextSource
from activations_cache.documents import documents
from activations_cache.models import LoadedModel, Tokenizer, load_model
from activations_cache.probe import readout
from activations_cache.vision import LoadedVisionModel
from sae import notebook
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.config import load_overrides
from sae.explain.logit_lens import promoted_tokens
from sae.explain.tables import LATENTS, LatentAbout, latents_about
from sae.pretrained import load as load_dictionary
from sae.pretrained.origin import origin_of, require_model
from sae.read_out import ReadOutName
from sae.run.context import (
    Section,
    at_places,
    pieces_of,
    results_of,
    with_differences,
    wrong_class,
)
from sae.steer.config import SteerRequest, SteerWordsRequest, latent_change
from sae.steer.edits import Calibrate, Change, Edit
from sae.steer.generation import Positions, generate
from sae.steer.steering import Steering
from sae.steer.sweep import CELLS, Sweep, Target, plot, sweep

GLOSSES = TextSource(path="package://sae/demo_data/wordnet_glosses.jsonl.gz", field="gloss")
EVERY = 997
"""Of the glosses one in so many is neutral text, so that they come from all over WordNet."""

N_NEUTRAL_TOKENS = 48
N_TARGETS = 10
"""So many promoted tokens stand for a latent."""

_log = logging.getLogger(__name__)


class SteeredText(NamedTuple):
    """A prompt, continued as the model is and with latents changed."""

    prompt: str
    base: str
    steered: str
    n_chosen: int
    """Tokens on which the change ran."""
    n_changed: int
    """Tokens that it changed."""
    relative_size: float
    """Mean size of the change, in norms of the stream."""

    def _repr_html_(self) -> str:
        note = (
            f"ran on {self.n_chosen} tokens and changed {self.n_changed}, by "
            f"{self.relative_size:.2f} of the stream's norm"
        )
        return notebook.texts(self.prompt, [("base", self.base), ("steered", self.steered)], note)


class LatentSweep(NamedTuple):
    """What many strengths of one latent do."""

    latent: int
    points: Sweep
    title: str
    unit: str
    promoted: list[str]
    """The tokens that stand for the latent."""
    differs: tuple[str, ...] = ()
    """In what the model or the place is not the dictionary's; only where forced."""

    def write(self, output: Path) -> Section:
        """Write the sweep as CSV, JSON and a picture; returns a row for each arm and strength."""
        output.mkdir(parents=True, exist_ok=True)
        self.points.write_csv(output / "sweep.csv")
        picture = plot(self.points, self.title, self.unit)
        record = json.dumps(asdict(self.points) | {"differs": self.differs}, indent=1).encode()
        io.write_files({output / "sweep.png": picture, output / "sweep.json": record})
        files = ", ".join([f"{output}/sweep.png", ".csv", ".json"])
        return self._section(f"{self.points.verdict}; {files}")

    def _section(self, note: str) -> Section:
        columns = tuple(self.unit if name == "strength" else name for name in CELLS)
        rows = tuple(point.cells for point in self.points.points)
        promoted = " ".join(map(repr, self.promoted))
        differs = {f"latent {self.latent}": self.differs} if self.differs else {}
        table = ResultTable(columns, rows, with_differences(note, differs))
        return Section(f"{self.title}; promoted: {promoted}", table)

    def _repr_html_(self) -> str:
        drawn = notebook.picture(plot(self.points, self.title, self.unit), self.title)
        return self._section(self.points.verdict)._repr_html_() + drawn


def steer(  # noqa: PLR0913
    model: nn.Module | LoadedModel,
    dictionary: SparseAutoencoder | str | Path,
    latents: Mapping[int, str | float] | None = None,
    *,
    words: Mapping[str, object] | None = None,
    hook_point: str | None = None,
    positions: Positions = "all",
    first_position: int = 1,
    force: bool = False,
    read_out: ReadOutName | None = None,
) -> Steering:
    """Return a context in which the model runs with latents changed.

    Args:
        model: The model.
        dictionary: Whose latents.
        latents: A change for each: "10x" of its largest activation, an activation such as 4.5,
            "+2x" on top of what is there, "*3" times what is there, or "off".
        words: In the place of `latents`, fields of `sae.steer.config.SteerWordsRequest`: words with
            amplify or calibrate, such as {"words": ["cow"], "amplify": "1x"}.
        hook_point: Where the dictionary belongs, if it does not say so itself.
        positions: Which tokens are changed.
        first_position: Positions below this one are left as they are.
        force: Steer another model, or at another place, than the dictionary's; a warning names it.
        read_out: "linear" or "refined"; as the dictionary is read when absent.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the place is unknown, the model or the place is another one, or a change has
            another form.
    """
    inner = model.model if isinstance(model, LoadedModel) else model
    if not isinstance(inner, nn.Module):
        raise wrong_class("model", "be a model or what load_model returns", model, "load it first")
    if latents is not None and words is not None:
        raise MonosemaError("words must be absent beside latents, got both; make two steerings")
    if not isinstance(words if latents is None else latents, Mapping):
        raise wrong_class("latents", "be changes by number", latents, 'such as {123: "10x"}')
    where, differs = placed(dictionary, hook_point, force=force, read_out=read_out)
    if isinstance(model, LoadedModel):
        path = str(model.provenance.get("path", ""))
        differs += require_model(where, model.identity, path, force=force)
    for difference in differs:
        _log.warning("forced: %s", difference)
    if latents is None:
        request = load_overrides(SteerWordsRequest, [], words)
        edits = changes_of(
            where, [one.latent for one in named_latents(dictionary, request)], request
        )
    else:
        given = [latent_change(f"{number}={change}") for number, change in latents.items()]
        edits = [Edit(where, latent=number, **change) for number, change in given]
    return Steering(inner, edits, positions=positions, first_position=first_position)


def named_latents(path: object, request: SteerWordsRequest) -> list[LatentAbout]:
    """The latents whose labels name the words."""
    if request.explained is None and not isinstance(path, str | Path):
        raise MonosemaError(
            "explained must name the directory of the labels beside a dictionary that is no path"
        )
    if request.explained:
        places = [Path(request.explained)]
    else:  # beside the dictionary, or in the run that it is of
        at = results_of(str(path))
        places = [at / "explain", at.parent.parent / "explain" / at.name]
    place = next((p for p in places if (p / LATENTS).is_file()), None)
    if place is None:
        raise FileNotFoundError(
            f"{places[0] / LATENTS} must exist, got no such file; run `sae explain` or name the "
            "directory of the labels with explained=DIR"
        )
    return latents_about(place, request.words, request.n_latents, by=request.by)


def changes_of(
    placed: SparseAutoencoder, latents: Sequence[int], request: SteerWordsRequest
) -> list[Change]:
    """What a request does to latents."""
    if request.calibrate is not None:
        return [Calibrate(placed, tuple(latents), request.calibrate)]
    amount = request.amplify
    return [Edit(placed, latent=i, add=amount, only_firing=True) for i in latents]


def placed(
    dictionary: SparseAutoencoder | str | Path,
    hook_point: str | None = None,
    *,
    force: bool = False,
    read_out: ReadOutName | None = None,
) -> tuple[SparseAutoencoder, tuple[str, ...]]:
    """Return a dictionary that knows the one place where it belongs, and what differs if forced.

    Raises:
        ValueError: If the place is unknown, or another one than the dictionary's and not forced.
    """
    if isinstance(dictionary, str | Path):
        dictionary = load_dictionary(dictionary).requires_grad_(False)
    if not isinstance(dictionary, SparseAutoencoder):
        raise wrong_class(
            "dictionary", "be a dictionary or the path of one", dictionary, "see sae.load"
        )
    dictionary = dictionary.reading(read_out or dictionary.read_by)
    config, differs = dictionary.config, ()
    if hook_point is not None:
        differs = origin_of(config, dictionary.provenance).places((hook_point,))
        if differs and not force:
            raise MonosemaError(
                f"hook_point must be {differs[0].trained}, where the dictionary was trained, got "
                f"{hook_point}; leave it out, or go on with --force (force=True)"
            )
        if differs and len(config.hook_points) == 1:
            dictionary = at_places(dictionary, (hook_point,))
        else:
            dictionary.at(hook_point)
    if not dictionary.config.hook_points:
        site = dictionary.provenance.get("source", {}).get("site", {})
        said = ", ".join(f"{key} {value}" for key, value in site.items()) or "nothing of it"
        raise MonosemaError(
            f"hook_point must be given for a dictionary whose files say {said}, got none; name its "
            "place with hook_point=PLACE, such as hook_point=model.layers.N:out for block N"
        )
    assert dictionary.config.hook_point_out  # one place is read, and one is predicted
    return dictionary, tuple(map(str, differs))


class PlacedInModel(NamedTuple):
    """A dictionary and the model that it is used in."""

    dictionary: SparseAutoencoder
    loaded: LoadedModel
    differs: tuple[str, ...]
    """In what the model or the place is not the dictionary's; only where forced."""


def placed_in_model(
    path: str | Path,
    model: str | None,
    dtype: str | None,
    hook_point: str | None,
    *,
    force: bool = False,
    read_out: ReadOutName | None = None,
) -> PlacedInModel:
    """Load a dictionary and the language model that it belongs to, or if forced another one.

    Raises:
        ValueError: If the model is not known and not named, or if it is another one.
    """
    dictionary, differs = placed(path, hook_point, force=force, read_out=read_out)
    loaded, of_model = model_of_dictionary(path, dictionary, model, dtype, load_model, force)
    return PlacedInModel(dictionary, loaded, differs + of_model)


_Loaded = TypeVar("_Loaded", LoadedModel, LoadedModel | LoadedVisionModel)


def model_of_dictionary(
    path: str | Path,
    dictionary: SparseAutoencoder,
    model: str | None,
    dtype: str | None,
    load: Callable[[ModelConfig], _Loaded],
    force: bool,
) -> tuple[_Loaded, tuple[str, ...]]:
    """Load the model that is named, or the one that a dictionary records, and what differs.

    Raises:
        ValueError: If the model is not known and not named, or if it is another one.
    """
    made_from = dictionary.provenance.get("model", {})
    name = model or made_from.get("path")
    if name is None:
        raise MonosemaError(f"--model must name the model of {path}, whose files do not say it")
    kind = dtype or made_from.get("dtype") or "bfloat16"
    loaded = load(ModelConfig(path=name, dtype=kind))  # pyright: ignore[reportArgumentType]
    return loaded, require_model(dictionary, loaded.identity, name, force=force)


def continuations(
    dictionary: SparseAutoencoder, loaded: LoadedModel, request: SteerRequest
) -> list[SteeredText]:
    """Continue each prompt of a request, as the model is and with latents changed."""
    texts = []
    for prompt in request.prompts:
        options = {"max_new_tokens": request.max_new_tokens, "chat": request.chat}
        base = generate(loaded.model, loaded.tokenizer, prompt, **options)
        changes = [latent_change(text) for text in request.latents]
        edits = [Edit(dictionary, latent=latent, **words) for latent, words in changes]
        where = {"positions": request.positions, "first_position": request.first_position}
        with Steering(loaded.model, edits, **where) as steering:
            steered = generate(loaded.model, loaded.tokenizer, prompt, **options)
        (count,) = steering.counts
        figures = (count.n_chosen, count.n_changed, count.relative_size)
        texts.append(SteeredText(prompt, base.text, steered.text, *figures))
    return texts


def sweep_latent(
    path: str | Path,
    dictionary: SparseAutoencoder,
    loaded: LoadedModel,
    request: SteerRequest,
    progress: Progress = silent,
) -> LatentSweep:
    """Try many strengths of the first latent of a request.

    Args:
        path: Of the dictionary.
        dictionary: The same, where it belongs.
        loaded: The model.
        request: Which latent, which strengths.
        progress: Called after each of them.
    """
    latent, words = latent_change(request.latents[0])
    mode = "add" if "add" in words else "clamp"
    tokens = _promoted(path, dictionary, loaded, latent)
    target = Target(loaded.model, loaded.tokenizer, dictionary, latent, tokens)
    config = replace(request, mode=mode)
    points = sweep(
        target,
        neutral_tokens(loaded.tokenizer, request.neutral, request.n_neutral),
        config,
        progress=progress,
    )
    # Tokens may have glyphs that no font has, so the title has none.
    title = f"latent {latent} of {Path(path).name} at {dictionary.config.hook_point_out}"
    pieces = pieces_of(loaded)
    promoted = [pieces[token] for token in tokens.tolist()]
    return LatentSweep(latent, points, title, f"x {request.unit}", promoted)


def _promoted(
    path: str | Path, placed: SparseAutoencoder, loaded: LoadedModel, latent: int
) -> Int[Tensor, " k"]:
    """The tokens that a latent's direction promotes most, which stand for it in a sweep."""
    placed.require_latent(latent)
    alone = load_dictionary(path, latents=slice(latent, latent + 1))
    return promoted_tokens(alone, readout(loaded.model), None, N_TARGETS).promoted[0]


def neutral_tokens(
    tokenizer: Tokenizer, path: str | None = None, n: int = 16
) -> Int[Tensor, "example pos"]:
    """Neutral texts of a file, or glosses, as token ids, -1 where one is short."""
    source = TextSource(path=path) if path else GLOSSES
    step = 1 if path else EVERY
    texts = islice(documents(source), 0, step * n, step)
    ids = [tokenizer(document.text)["input_ids"][:N_NEUTRAL_TOKENS] for document in texts]
    width = max(len(row) for row in ids)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])
