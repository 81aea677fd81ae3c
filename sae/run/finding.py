"""Finding latents: by texts, by neighbours, or by what a prediction depends on."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.models import LoadedModel
from activations_cache.probe import require_next_token
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.config import load_overrides
from sae.pretrained import load as load_dictionary
from sae.run.context import Section, Steps, pieces_of, silent_steps, steps_to, with_differences
from sae.run.steering import neutral_tokens, placed_in_model
from sae.steer.attribution import Metric, agreement, attribute, logit_difference, stream_of
from sae.steer.config import FindRequest
from sae.steer.paths import PathAttribution, agreements, integrated_gradients
from sae.steer.search import Counting, find_latents, nearest_latents


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
    where = (request.model, request.dtype, request.hook_point)
    placed, loaded, differs = placed_in_model(
        path, *where, force=request.force, read_out=request.read_out
    )
    ways = _by_texts if request.prompt is None else _behind
    matches = ways(placed, loaded, request, steps)
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
    activations, indices = attributed.latents.values, attributed.latents.indices
    top, rows = attributed.top(request.n), []
    for position, latent, score in top:
        entry = indices[position] == latent
        f = float((activations[position] * entry).sum())
        along = [float((p.attribution.scores[position] * entry).sum()) for p in paths.values()]
        figures = (f"{figure:+.3f}" for figure in (score, *along))
        rows.append((f"{position} {strings[position]}", str(latent), *figures, f"{f:.2f}"))
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
    title = f"{request.target!r} after {request.prompt!r}"
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
