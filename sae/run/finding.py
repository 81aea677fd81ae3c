"""Finding latents: by texts, by neighbours, or by what a prediction depends on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import ImagePreprocessing, ModelConfig
from activations_cache.image_rows import CachedImages
from activations_cache.image_sources import UNREADABLE
from activations_cache.images import read_pixels
from activations_cache.loading import one_line
from activations_cache.models import LoadedModel
from activations_cache.preprocessing import resolve
from activations_cache.probe import require_next_token
from activations_cache.towers import ZeroShot, load_towers
from activations_cache.vision import LoadedVisionModel, load_any_model
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.config import load_overrides
from sae.pretrained import load as load_dictionary
from sae.run.context import (
    Section,
    Steps,
    opened,
    pieces_of,
    silent_steps,
    steps_to,
    with_differences,
)
from sae.run.steering import model_of_dictionary, neutral_tokens, placed
from sae.steer.attribution import (
    Attribution,
    AttributionAgreement,
    Metric,
    agreement,
    attribute,
    logit_difference,
    stream_of,
)
from sae.steer.config import FindRequest
from sae.steer.paths import PathAttribution, agreements, integrated_gradients
from sae.steer.search import Counting, find_in_pictures, find_latents, nearest_latents


class LatentMatches(NamedTuple):
    """Latents that were looked for, the best first."""

    latents: tuple[int, ...]
    scores: tuple[float, ...]
    """Cosines, scores of texts, or gradient times activation."""
    title: str
    table: ResultTable

    def _repr_html_(self) -> str:
        return Section(self.title, self.table)._repr_html_()


def find(dictionary: str | Path, progress: Progress = silent, **request: object) -> LatentMatches:
    """Find latents by texts (pos, neg), near another one (near), or behind a prediction (prompt).

    Args:
        dictionary: Its path, or its name on the hub.
        progress: Called while it runs.
        request: Fields of `sae.steer.config.FindRequest`, such as pos=["Paris is"], n=20.

    Raises:
        ConfigError: If a field is unknown or out of range.
        ValueError: If the model is not known and not named.
    """
    return find_latents_of(dictionary, load_overrides(FindRequest, [], request), steps_to(progress))


def find_latents_of(
    path: str | Path, request: FindRequest, steps: Steps = silent_steps
) -> LatentMatches:
    """Return the latents that a request asks for."""
    if request.near is not None:
        return _near(path, request.near, request)
    known, differs = placed(
        path, request.hook_point, force=request.force, read_out=request.read_out
    )
    loaded, of_model = model_of_dictionary(
        path, known, request.model, request.dtype, load_any_model, request.force
    )
    differs += of_model
    if isinstance(loaded, LoadedVisionModel):
        for name, default in {"where": "any", "first_position": 1}.items():
            if (got := getattr(request, name)) != default:
                raise MonosemaError(
                    f"{name} must be absent for pictures, got {got!r}; leave it out"
                )
        show = _by_pictures if request.prompt is None else _behind_picture
        matches = show(known, loaded, request, steps)
    elif request.cache is not None:
        raise MonosemaError(f"cache must be absent for a model of texts, got {request.cache}")
    else:
        ways = _by_texts if request.prompt is None else _behind
        matches = ways(known, loaded, request, steps)
    note = with_differences(matches.table.note, {str(path): differs} if differs else {})
    return matches._replace(table=replace(matches.table, note=note))


def _near(path: str | Path, latent: int, request: FindRequest) -> LatentMatches:
    other = None if request.among is None else load_dictionary(request.among)
    near = nearest_latents(load_dictionary(path), torch.tensor([latent]), other, k=request.n)
    latents, cosines = near.latent[0].tolist(), near.cosine[0].tolist()
    rows = tuple((str(n), f"{cosine:+.3f}") for n, cosine in zip(latents, cosines, strict=True))
    title = f"latents of {request.among or path} near latent {latent} of {path}"
    table = ResultTable(("latent", "cosine"), rows, "cosines of the decoder's rows")
    return LatentMatches(tuple(latents), tuple(cosines), title, table)


def _by_texts(
    placed: SparseAutoencoder, loaded: LoadedModel, request: FindRequest, steps: Steps
) -> LatentMatches:
    with steps("find") as progress:
        entries = find_latents(
            loaded.model, loaded.tokenizer, placed, request.pos, request.neg,
            Counting(request.where, request.first_position), progress=progress,
        )  # fmt: skip
    n_fitting, entries = len(entries), entries[: request.n]
    pieces = pieces_of(loaded)
    texts = [pieces.row(loaded.tokenizer(text)["input_ids"]) for text in request.pos]
    rows = []
    for entry in entries:
        tokens = [text[place] for text, place in zip(texts, entry.tokens, strict=True)]
        where = " ".join(tokens)
        rows.append((str(entry.latent), f"{entry.score:.3f}", f"{entry.weakest:.3f}", where))
    unit = "of its maximum" if placed.stats is not None else "no statistics: as it is"
    title = (
        f"latents that fire in all of {len(request.pos)} texts and in none of {len(request.neg)}"
    )
    note = f"{n_fitting} of {placed.config.d_sae:,}; its weakest peak among the texts"
    columns = ("latent", f"score, {unit}", "activation", "where")
    latents, scores = (
        tuple(getattr(entry, name) for entry in entries) for name in ("latent", "score")
    )
    return LatentMatches(latents, scores, title, ResultTable(columns, tuple(rows), note))


def _behind(
    placed: SparseAutoencoder, loaded: LoadedModel, request: FindRequest, steps: Steps
) -> LatentMatches:
    assert request.prompt is not None
    assert request.target is not None
    require_next_token(loaded.model, "to say what a prediction depends on")
    ids = torch.tensor([loaded.tokenizer(request.prompt)["input_ids"]])
    target = token_of(loaded, request.target)
    against = None if request.against is None else token_of(loaded, request.against)
    metric = logit_difference(target, against)
    first = {"first_position": request.first_position}
    attributed = attribute(loaded.model, placed, ids, metric, **first)
    with steps("paths") as progress:
        paths = _paths(placed, loaded, ids, metric, request, progress)
    with steps("ablate") as progress:
        agreed = agreement(
            loaded.model, placed, ids, metric, n=request.n_ablated, progress=progress
        )
    strings = pieces_of(loaded).row(ids[0].tolist())
    where = [f"{position} {string}" for position, string in enumerate(strings)]
    what = f"{request.target!r} after {request.prompt!r}"
    return _attributed(attributed, paths, agreed, where, request.n, what)


def _attributed(
    attributed: Attribution,
    paths: Mapping[str, PathAttribution],
    agreed: AttributionAgreement,
    where: Sequence[str],
    n: int,
    title: str,
) -> LatentMatches:
    """The entries of the largest scores, beside integrated gradients and what ablation says."""
    activations, indices = attributed.latents.values, attributed.latents.indices
    top, rows = attributed.top(n), []
    for position, latent, score in top:
        entry = indices[position] == latent
        f = float((activations[position] * entry).sum())
        along = [float((p.attribution.scores[position] * entry).sum()) for p in paths.values()]
        figures = (f"{figure:+.3f}" for figure in (score, *along))
        rows.append((where[position], str(latent), *figures, f"{f:.2f}"))
    agree = agreements(paths)
    sums = (
        f"{name}: {path.total:+.2f} of {path.difference:+.2f}, rank correlation {agree[name]:.2f}"
        for name, path in paths.items()
    )
    note = (
        f"logit {attributed.metric:+.2f}; over {agreed.n} ablations attribution correlates "
        f"{agreed.attribution:.2f} with the effect and activation {agreed.activation:.2f}; "
        f"integrated gradients by where they begin, with what they sum to and how their scores go "
        f"along with the first: {'; '.join(sums)}"
    )
    integrated = (f"IG, {name}" for name in paths)
    columns = ("position", "latent", "gradient x activation", *integrated, "activation")
    latents, scores = tuple(entry[1] for entry in top), tuple(entry[2] for entry in top)
    return LatentMatches(latents, scores, title, ResultTable(columns, tuple(rows), note))


def _paths(
    placed: SparseAutoencoder,
    loaded: LoadedModel,
    ids: Int[Tensor, "example pos"],
    metric: Metric,
    request: FindRequest,
    report: Progress,
) -> dict[str, PathAttribution]:
    """Integrated gradients from each baseline."""
    rows, paths = None, {}
    if {"mean", "sampled"} & set(request.baselines):
        device = next(loaded.model.parameters()).device
        parts = []
        for text in neutral_tokens(loaded.tokenizer):
            stream = stream_of(loaded.model, placed.hook_point, text[text >= 0][None].to(device))
            parts.append(stream[0, request.first_position :].float())
        rows = torch.cat(parts)
    for baseline in request.baselines:
        paths[baseline] = integrated_gradients(
            loaded.model, placed, ids, metric, baseline=baseline, rows=rows,
            first_position=request.first_position,
        )  # fmt: skip
        report(len(paths), len(request.baselines), "baselines")
    return paths


class PictureReader:
    """Reads image files as the model of a dictionary does."""

    def __init__(self, loaded: LoadedVisionModel, cache: str | None) -> None:
        """Make pixels as the cache says, else as the model's own files do."""
        if cache is None:
            self._made = resolve(ImagePreprocessing(), loaded.settings)
        else:
            self._made = CachedImages(opened(cache)).preprocessing
        self.options = loaded.reading.options(self._made.size)
        self.n_prefix = loaded.reading.n_prefix
        self._side = self._made.size // loaded.reading.patch

    def pixels(self, files: Sequence[str]) -> Float[Tensor, "example 3 size size"]:
        """What the model reads of some files."""
        if not files:
            return torch.zeros(0, 3, self._made.size, self._made.size)
        return torch.from_numpy(
            read_pixels(self._made, lambda i: _picture(files[i]), range(len(files)))
        )

    def place(self, patch: int) -> str:
        """Where a patch lies."""
        row, column = divmod(patch, self._side)
        return f"row {row + 1}, column {column + 1}" if row < self._side else "no patch"


def _picture(file: str) -> Image.Image:
    if not Path(file).is_file():
        raise FileNotFoundError(f"a picture must be an existing file, got {file}")
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except UNREADABLE as error:
        raise MonosemaError(f"{file} must be a picture, got {one_line(error)}") from error


def _by_pictures(
    placed: SparseAutoencoder, loaded: LoadedVisionModel, request: FindRequest, steps: Steps
) -> LatentMatches:
    reader = PictureReader(loaded, request.cache)
    with steps("find"):
        entries = find_in_pictures(
            loaded.model, placed, reader.pixels(request.pos), reader.pixels(request.neg),
            reader.n_prefix, reader.options,
        )  # fmt: skip
    n_fitting, entries = len(entries), entries[: request.n]
    unit = "of its maximum" if placed.stats is not None else "no statistics: as it is"
    rows = tuple(
        (
            str(e.latent),
            f"{e.score:.3f}",
            f"{e.weakest:.3f}",
            "; ".join(map(reader.place, e.tokens)),
        )
        for e in entries
    )
    n, others = len(request.pos), len(request.neg)
    title = f"latents that fire in all of {n} pictures and in none of {others}"
    note = f"{n_fitting} of {placed.config.d_sae:,}; its weakest peak among the pictures; patches"
    columns = ("latent", f"score, {unit}", "activation", "where")
    latents, scores = tuple(e.latent for e in entries), tuple(e.score for e in entries)
    return LatentMatches(latents, scores, title, ResultTable(columns, tuple(rows), note))


def _behind_picture(
    placed: SparseAutoencoder, loaded: LoadedVisionModel, request: FindRequest, steps: Steps
) -> LatentMatches:
    """What the logit of a word depends on, for a picture and towers for texts and images."""
    assert request.prompt is not None
    assert request.target is not None
    if unread := sorted({"mean", "sampled"} & set(request.baselines)):
        raise MonosemaError(f"baselines must be off or zero for a picture, got {unread[0]}")
    reader = PictureReader(loaded, request.cache)
    words = [word for word in (request.target, request.against) if word is not None]
    model, pixels = zero_shot(loaded, words), reader.pixels([request.prompt])
    metric = logit_difference(0, None if request.against is None else 1)
    first = reader.n_prefix
    attributed = attribute(model, placed, pixels, metric, first_position=first)
    paths = {
        baseline: integrated_gradients(
            model, placed, pixels, metric, baseline=baseline, first_position=first
        )
        for baseline in request.baselines
    }
    with steps("ablate") as progress:
        agreed = agreement(model, placed, pixels, metric, n=request.n_ablated, progress=progress)
    where = [reader.place(i - reader.n_prefix) for i in range(len(attributed.scores))]
    what = f"{request.target!r} for {request.prompt}"
    return _attributed(attributed, paths, agreed, where, request.n, what)


def zero_shot(loaded: LoadedVisionModel, words: Sequence[str]) -> ZeroShot:
    """The whole of a model of which the tower for images is loaded, asked for some words.

    Raises:
        ModelError: If it has no tower for texts.
    """
    towers = load_towers(ModelConfig(path=loaded.provenance["path"], dtype="float32"))
    nn.Module.to(towers.model, "cpu")  # where the dictionary is; there are but a few pictures
    return ZeroShot(towers, towers.texts(words))


def token_of(loaded: LoadedModel, text: str) -> int:
    """The one token that a text is.

    Raises:
        ValueError: If it is none or several.
    """
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise MonosemaError(
            f"target and against must be one token each, got {text!r} with {len(ids)}"
        )
    return ids[0]
