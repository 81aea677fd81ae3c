"""What a model loses when a dictionary's reconstruction takes the place of its stream.

Cross-entropy and KL are per token and in nats, from float32 log-probabilities of the logits in the
model's dtype. Predictions made at special positions (the attention sinks at the start) are never
scored; whether the stream there is left intact or spliced too are two treatments, because what
flows there reaches all later tokens.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.hooks import capture
from activations_cache.logits import Loss
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.resume_forward import (
    LogitTally,
    Replacement,
    Replay,
    compare,
    logits_of,
    logits_of_padded,
)
from sae.metrics import ce_recovered
from sae.statistics import Interval, Resamples, interval

SHARE_HIDDEN = 0.15
"""Share of the tokens that a masked model has to tell, as in its training (Devlin et al. 2019)."""


class EvaluationContexts(NamedTuple):
    """The contexts that are read, and what an ablation puts in the stream's place."""

    tokens: Int[Tensor, "example pos"]
    """Token ids; -1 where a context is short."""
    skip_positions: int
    """Special positions at the start of each context."""
    mean: Float[Tensor, " d_model"]
    """The mean row of the stream."""
    means: Mapping[str, Float[Tensor, " _"]] = MappingProxyType({})
    """Mean rows of other hook points, for the dictionaries that predict these."""
    exclude_tokens: tuple[int, ...] = ()
    """Tokens that give no row; at them the stream stays the model's own, and nothing is scored."""

    limits: Mapping[str, float] = MappingProxyType({})
    """Norms by hook point; where the stream is larger it stays the model's own."""
    mask_token: int | None = None
    """What hides the tokens that a masked model predicts; None for one that predicts the next."""

    def excluded(self, tokens: Int[Tensor, "some pos"]) -> Bool[Tensor, "some pos"]:
        """Say which tokens of some contexts are excluded."""
        return torch.isin(tokens, torch.tensor(self.exclude_tokens, dtype=tokens.dtype))


@dataclass(frozen=True, kw_only=True)
class SubstitutionEffect:
    """What the model does with another stream, over the scored tokens; 95 % intervals."""

    ce: Interval
    """Cross-entropy in nats per token."""
    ce_increase: Interval
    """Cross-entropy above that of the model as it is, in nats per token."""
    kl: Interval
    """KL(model as it is || model with this stream), in nats per token."""
    top1_agreement: Interval
    """Share of the tokens at which both hold the same token most likely."""
    ce_recovered_zero: Interval
    """Share of what zero ablation loses that is recovered (see `sae.metrics.ce_recovered`)."""
    ce_recovered_mean: Interval
    """Share of what mean ablation loses that is recovered."""


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """All effects under one treatment of the special positions."""

    special: str
    """`intact`: the stream at special positions is the model's own; `spliced`: replaced too."""
    n_contexts: int
    """Contexts that were read."""
    n_tokens: int
    """Predictions that were scored."""
    ce_base: Interval
    """Cross-entropy of the model as it is, in nats per token."""
    zero: SubstitutionEffect
    """The stream replaced by 0."""
    mean: SubstitutionEffect
    """The stream replaced by its mean row."""
    dictionaries: dict[str, SubstitutionEffect]
    """The stream replaced by each dictionary's reconstruction."""
    loss: Loss = "next token"
    """Which token a prediction is scored on."""


class _Task(NamedTuple):
    places: tuple[str, ...]
    special: str
    name: str
    replacements: Mapping[str, Replacement]
    n_contexts: int


class _Streams:
    """What dictionaries of several or other hook points read, of the contexts at hand.

    It is read from the model as it is, so that every part of a dictionary's output stands for the
    same rows. The dictionaries of all places are read at once.
    """

    def __init__(self, model: nn.Module, dictionaries: Mapping[str, SparseAutoencoder]) -> None:
        read = (part.hook_point for d in dictionaries.values() for part in d.config.inputs)
        self._model, self._points = model, tuple(dict.fromkeys(read))
        self._streams: dict[str, Tensor] = {}
        self.excluded: Tensor = torch.empty(0)
        """Which tokens of the contexts at hand give no row."""

    def read(
        self, input_ids: Int[Tensor, "example pos"], excluded: Bool[Tensor, "example pos"]
    ) -> None:
        """Run the model up to the last of the hook points."""
        self.excluded = excluded
        if self._points:
            padding = input_ids < 0  # which a masked model may not see
            mask = {"attention_mask": (~padding).long()} if bool(padding.any()) else {}
            with capture(self._model, self._points) as run:
                self._streams = run(input_ids.clamp_min(0), **mask)

    def reconstructed(self, dictionary: SparseAutoencoder, part: int) -> Replacement:
        """The dictionary's output for one of the hook points that it predicts."""
        config = dictionary.config

        def replace(stream: Float[Tensor, "example pos _"]) -> Float[Tensor, "example pos _"]:
            streams = [self._streams[p.hook_point].flatten(0, 1).float() for p in config.inputs]
            x_hat = dictionary(torch.cat(streams, dim=1))
            x_hat_here = x_hat.split([p.width for p in config.slices_out], dim=1)[part]
            return x_hat_here.view(stream.shape).to(stream)

        return replace


def measure_substitution(  # noqa: PLR0913
    dictionaries: Mapping[str, SparseAutoencoder],
    model: nn.Module,
    hook_point: str,
    held_out: EvaluationContexts,
    config: EvaluateConfig,
    *,
    source: nn.Module | None = None,
    zero: bool = True,
    progress: Progress | None = None,
) -> dict[str, Substitution]:
    """Run the model over the same contexts as it is, ablated, and with each dictionary.

    The stream is replaced where a dictionary predicts it, at all of its hook points together.

    Args:
        dictionaries: By name; "zero" and "mean" are taken.
        model: A causal or a masked language model in evaluation mode.
        hook_point: Where the stream is replaced by dictionaries that record no hook point.
        held_out: What the model reads.
        config: Sizes; the first `n_contexts_special` contexts are also run with the special
            positions spliced.
        source: Another model, of the same tokens, from which dictionaries that predict other hook
            points take what they read.
        zero: Also run the model with 0; without it what is measured against it is nan.
        progress: Called after each forward.

    Returns:
        By treatment: "intact", and "spliced" if it was asked for. Where dictionaries predict other
        places, those of each further place stand under "intact at PLACE" and "spliced at PLACE".

    Raises:
        ValueError: If a dictionary has a reserved name.
    """
    if reserved := {"zero", "mean"} & set(dictionaries):
        raise MonosemaError(f"dictionaries must not be named {min(reserved)!r}; rename it")
    groups: dict[tuple[str, ...], dict[str, SparseAutoencoder]] = {}
    for name, dictionary in dictionaries.items():
        groups.setdefault(dictionary.config.hook_points_or(hook_point)[1], {})[name] = dictionary
    first = next(iter(groups), (hook_point,))
    main = (hook_point,) if (hook_point,) in groups else first
    ordered = sorted(groups or {main: {}}, key=lambda points: points != main)
    streams = _Streams(source or model, dictionaries)
    tasks: list[_Task] = []
    for points in ordered:
        means = {point: held_out.means.get(point, held_out.mean) for point in points}
        here = held_out._replace(means=means)
        tasks += _tasks(groups.get(points, {}), streams, here, config)
    tasks = [task for task in tasks if zero or task.name != "zero"]
    read = logits_of if held_out.mask_token is None else logits_of_padded
    replays = {points: Replay(model, *points, read=read) for points in ordered}
    tallies = _run(tasks, replays, streams, held_out, config, progress or silent)
    results: dict[str, Substitution] = {}
    for points, special in dict.fromkeys((task.places, task.special) for task in tasks):
        suffix = "" if points == main else f" at {' + '.join(points)}"
        of_one = {n: t for (p, s, n), t in tallies.items() if (p, s) == (points, special)}
        results[f"{special}{suffix}"] = _summary(special, of_one, config, held_out)
    return results


def _tasks(
    dictionaries: Mapping[str, SparseAutoencoder],
    streams: _Streams,
    held_out: EvaluationContexts,
    config: EvaluateConfig,
) -> Iterator[_Task]:
    points = tuple(held_out.means)
    rows: dict[str, Mapping[str, Replacement]] = {
        "zero": dict.fromkeys(points, torch.zeros_like),
        "mean": {point: _constant(mean) for point, mean in held_out.means.items()},
    }
    for name, dictionary in dictionaries.items():
        plain = not dictionary.config.outputs and len(dictionary.config.inputs) < 2
        rows[name] = {
            point: _reconstructed(dictionary) if plain else streams.reconstructed(dictionary, part)
            for part, point in enumerate(points)
        }
    n_contexts = len(held_out.tokens)
    for name, each in rows.items():
        replacements = {p: _keeping(fn, held_out, streams, p) for p, fn in each.items()}
        yield _Task(points, "intact", name, replacements, n_contexts)
    if config.n_contexts_special:
        for name, each in rows.items():
            n_spliced = min(n_contexts, config.n_contexts_special)
            yield _Task(points, "spliced", name, each, n_spliced)


def _constant(row: Float[Tensor, " d_model"]) -> Replacement:
    return lambda stream: row.to(stream).expand_as(stream)


def _reconstructed(dictionary: SparseAutoencoder) -> Replacement:
    return lambda stream: dictionary(stream.flatten(0, 1).float()).view(stream.shape).to(stream)


def _keeping(
    replacement: Replacement, held_out: EvaluationContexts, streams: _Streams, hook_point: str
) -> Replacement:
    first, limit = held_out.skip_positions, held_out.limits.get(hook_point)

    def replace(stream: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example pos _"]:
        given = torch.cat([stream[:, :first], replacement(stream)[:, first:]], 1)
        if held_out.exclude_tokens:
            given = torch.where(streams.excluded.to(stream.device)[..., None], stream, given)
        if limit is not None:
            is_large = stream.float().norm(dim=-1, keepdim=True) > limit
            given = torch.where(is_large, stream, given)
        return given

    return replace


def _run(
    tasks: list[_Task],
    replays: Mapping[tuple[str, ...], Replay],
    streams: _Streams,
    held_out: EvaluationContexts,
    config: EvaluateConfig,
    progress: Progress,
) -> dict[tuple[tuple[str, ...], str, str], LogitTally]:
    """By places, treatment and name; the model as it is runs once for all places."""
    parts: dict[tuple[tuple[str, ...], str, str], list[LogitTally]] = {}
    deepest = max(replays.values(), key=lambda replay: replay.depth)
    total = sum(task.n_contexts for task in tasks)
    done = 0
    hidden = _hidden(held_out, config)
    ahead = 1 if hidden is None else 0
    for start in range(0, len(held_out.tokens), config.contexts_per_forward):
        here = slice(start, start + config.contexts_per_forward)
        tokens = held_out.tokens[here]
        excluded = held_out.excluded(tokens)
        if hidden is None:
            input_ids, scored = tokens.clamp_min(0), tokens.clone()
            scored[:, 1:][excluded[:, :-1]] = -1  # what an excluded token predicts
        else:
            assert held_out.mask_token is not None  # else nothing is hidden
            input_ids = tokens.masked_fill(hidden[here], held_out.mask_token)
            scored = tokens.where(hidden[here], -1)
        base = deepest.base(input_ids).logits
        for replay in replays.values():
            if replay is not deepest:
                replay.follow(deepest, input_ids)
        streams.read(input_ids, excluded)
        for task in tasks:
            n_here = min(len(tokens), task.n_contexts - start)
            if n_here <= 0:
                continue
            first, *more = task.replacements.items()
            logits = replays[task.places].spliced(input_ids, first[1], dict(more))
            tally = compare(base, logits, scored, held_out.skip_positions, ahead)
            part = LogitTally(*(values[:n_here] for values in tally))
            parts.setdefault((task.places, task.special, task.name), []).append(part)
            done += n_here
            progress(done, total, "spliced contexts")
    return {key: LogitTally.joined(of_key) for key, of_key in parts.items()}


def _hidden(
    held_out: EvaluationContexts, config: EvaluateConfig
) -> Bool[Tensor, "example pos"] | None:
    """Which tokens a masked model predicts; None for a model that predicts the next one."""
    if held_out.mask_token is None:
        return None
    tokens = held_out.tokens
    chance = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(config.seed))
    result = (chance < SHARE_HIDDEN) & (tokens >= 0) & ~held_out.excluded(tokens)
    result[:, : held_out.skip_positions] = False
    return result


def _summary(
    special: str,
    tallies: dict[str, LogitTally],
    config: EvaluateConfig,
    held_out: EvaluationContexts,
) -> Substitution:
    mean = tallies["mean"]
    unknown = LogitTally(mean.n_tokens, *[torch.full_like(mean.ce, math.nan)] * 4)
    zero = tallies.setdefault("zero", unknown)
    resamples = Resamples(len(mean.ce), config.n_resamples, config.seed)
    ablated = _Ablated(
        resamples.mean(zero.ce, zero.n_tokens), resamples.mean(mean.ce, mean.n_tokens)
    )
    effects = {name: _effect(tally, ablated, resamples) for name, tally in tallies.items()}
    return Substitution(
        special=special,
        n_contexts=len(mean.ce),
        n_tokens=int(mean.n_tokens.sum()),
        ce_base=interval(resamples.mean(mean.ce_base, mean.n_tokens)),
        zero=effects.pop("zero"),
        mean=effects.pop("mean"),
        dictionaries=effects,
        loss="next token" if held_out.mask_token is None else "masked token",
    )


class _Ablated(NamedTuple):
    """Cross-entropies over the resamples."""

    zero: Float64[Tensor, " batch"]
    mean: Float64[Tensor, " batch"]


def _effect(tally: LogitTally, ablated: _Ablated, resamples: Resamples) -> SubstitutionEffect:
    base, ce = (resamples.mean(sums, tally.n_tokens) for sums in (tally.ce_base, tally.ce))
    return SubstitutionEffect(
        ce=interval(ce),
        ce_increase=interval(ce - base),
        kl=interval(resamples.mean(tally.kl, tally.n_tokens)),
        top1_agreement=interval(resamples.mean(tally.same, tally.n_tokens)),
        ce_recovered_zero=interval(ce_recovered(base, ce, ablated.zero)),
        ce_recovered_mean=interval(ce_recovered(base, ce, ablated.mean)),
    )
