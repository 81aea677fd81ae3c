"""What a model loses when a dictionary's reconstruction takes the place of its stream.

Cross-entropy and KL are per token and in nats, from float32 log-probabilities of the logits in the
model's dtype. Predictions made at special positions (the attention sinks at the start) are never
scored; whether the stream there is left intact or spliced too are two treatments, because what
flows there reaches all later tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from activations_cache.progress import Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.intervals import Interval, Resamples, interval
from sae.evaluate.replay import Replacement, Replay
from sae.evaluate.scoring import Tally, compare
from sae.metrics import ce_recovered


class HeldOut(NamedTuple):
    """The contexts that are read, and what an ablation puts in the stream's place."""

    tokens: Int[Tensor, "example pos"]
    """Token ids; -1 where a context is short."""
    skip_positions: int
    """Special positions at the start of each context."""
    mean: Float[Tensor, " d_model"]
    """The mean row of the stream."""


@dataclass(frozen=True, kw_only=True)
class Effect:
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
    zero: Effect
    """The stream replaced by 0."""
    mean: Effect
    """The stream replaced by its mean row."""
    dictionaries: dict[str, Effect]
    """The stream replaced by each dictionary's reconstruction."""


class _Task(NamedTuple):
    special: str
    name: str
    replacement: Replacement
    n_contexts: int


def measure_substitution(
    dictionaries: Mapping[str, SparseAutoencoder],
    model: nn.Module,
    hook_point: str,
    held_out: HeldOut,
    config: EvaluateConfig,
    *,
    progress: Progress | None = None,
) -> dict[str, Substitution]:
    """Run the model over the same contexts as it is, ablated, and with each dictionary.

    Args:
        dictionaries: By name; "zero" and "mean" are taken.
        model: A causal language model in evaluation mode.
        hook_point: Where the stream is replaced.
        held_out: What the model reads.
        config: Sizes; the first `n_contexts_special` contexts are also run with the special
            positions spliced.
        progress: Called after each forward.

    Returns:
        By treatment: "intact", and "spliced" if it was asked for.

    Raises:
        ValueError: If a dictionary has a reserved name.
    """
    tasks = list(_tasks(dictionaries, held_out, config))
    tallies = _run(tasks, Replay(model, hook_point), held_out, config, progress or silent)
    return {
        special: _summary(special, of_special, config)
        for special in dict.fromkeys(task.special for task in tasks)
        if (of_special := {n: t for (s, n), t in tallies.items() if s == special})
    }


def _tasks(
    dictionaries: Mapping[str, SparseAutoencoder], held_out: HeldOut, config: EvaluateConfig
) -> Iterator[_Task]:
    if reserved := {"zero", "mean"} & set(dictionaries):
        raise ValueError(f"dictionaries must not be named {min(reserved)!r}; rename it")
    rows: dict[str, Replacement] = {
        "zero": torch.zeros_like,
        "mean": lambda stream: held_out.mean.to(stream).expand_as(stream),
        **{name: _reconstructed(dictionary) for name, dictionary in dictionaries.items()},
    }
    n_contexts = len(held_out.tokens)
    for name, replacement in rows.items():
        kept = _keeping(replacement, held_out.skip_positions)
        yield _Task("intact", name, kept, n_contexts)
    if config.n_contexts_special:
        for name, replacement in rows.items():
            yield _Task("spliced", name, replacement, min(n_contexts, config.n_contexts_special))


def _reconstructed(dictionary: SparseAutoencoder) -> Replacement:
    return lambda stream: dictionary(stream.flatten(0, 1).float()).view(stream.shape).to(stream)


def _keeping(replacement: Replacement, skip_positions: int) -> Replacement:
    def replace(stream: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example pos _"]:
        return torch.cat([stream[:, :skip_positions], replacement(stream)[:, skip_positions:]], 1)

    return replace


def _run(
    tasks: list[_Task],
    replay: Replay,
    held_out: HeldOut,
    config: EvaluateConfig,
    progress: Progress,
) -> dict[tuple[str, str], Tally]:
    parts: dict[tuple[str, str], list[Tally]] = {}
    total = sum(task.n_contexts for task in tasks)
    done = 0
    for start in range(0, len(held_out.tokens), config.contexts_per_forward):
        tokens = held_out.tokens[start : start + config.contexts_per_forward]
        input_ids = tokens.clamp_min(0)
        base = replay.base(input_ids).logits
        for task in tasks:
            n_here = min(len(tokens), task.n_contexts - start)
            if n_here <= 0:
                continue
            logits = replay.spliced(input_ids, task.replacement)
            tally = compare(base, logits, tokens, held_out.skip_positions)
            part = Tally(*(values[:n_here] for values in tally))
            parts.setdefault((task.special, task.name), []).append(part)
            done += n_here
            progress(done, total, "spliced contexts")
    return {key: Tally.joined(of_key) for key, of_key in parts.items()}


def _summary(special: str, tallies: dict[str, Tally], config: EvaluateConfig) -> Substitution:
    zero, mean = tallies["zero"], tallies["mean"]
    resamples = Resamples(len(zero.ce), config.n_resamples, config.seed)
    ablated = _Ablated(
        resamples.mean(zero.ce, zero.n_tokens), resamples.mean(mean.ce, mean.n_tokens)
    )
    effects = {name: _effect(tally, ablated, resamples) for name, tally in tallies.items()}
    return Substitution(
        special=special,
        n_contexts=len(zero.ce),
        n_tokens=int(zero.n_tokens.sum()),
        ce_base=interval(resamples.mean(zero.ce_base, zero.n_tokens)),
        zero=effects.pop("zero"),
        mean=effects.pop("mean"),
        dictionaries=effects,
    )


class _Ablated(NamedTuple):
    """Cross-entropies over the resamples."""

    zero: Float64[Tensor, " batch"]
    mean: Float64[Tensor, " batch"]


def _effect(tally: Tally, ablated: _Ablated, resamples: Resamples) -> Effect:
    base, ce = (resamples.mean(sums, tally.n_tokens) for sums in (tally.ce_base, tally.ce))
    return Effect(
        ce=interval(ce),
        ce_increase=interval(ce - base),
        kl=interval(resamples.mean(tally.kl, tally.n_tokens)),
        top1_agreement=interval(resamples.mean(tally.same, tally.n_tokens)),
        ce_recovered_zero=interval(ce_recovered(base, ce, ablated.zero)),
        ce_recovered_mean=interval(ce_recovered(base, ce, ablated.mean)),
    )
