"""`evaluate`: everything that is measured of dictionaries, in one report."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations_cache.checks import MonosemaError, Progress
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.isolation import pieces_of
from activations_cache.probe import record_of
from activations_cache.reader import ActivationCache
from activations_cache.summary import BoundedCache
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.reconstruction import firing_statistics, measure_reconstruction, summary
from sae.evaluate.report import EvaluationReport
from sae.evaluate.substitution import EvaluationContexts, measure_substitution
from sae.metrics import Firing


class Evaluation(NamedTuple):
    """The report, and the statistics that are too long for it."""

    report: EvaluationReport
    """Plain data; `write_json` writes it."""
    firing: dict[str, Firing]
    """By dictionary; `Firing.save` writes it beside the dictionary."""


@torch.no_grad()
def evaluate(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    model: nn.Module | None,
    config: EvaluateConfig,
    *,
    mask_token: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure dictionaries of one hook point over a cache's held-out rows and contexts.

    A baseline, such as a dictionary with a frozen random decoder, is one of the dictionaries.

    Args:
        dictionaries: By name; "zero" and "mean" are taken.
        cache: Made from the model at the hook point; rows that `summary.within` leaves out are
            not measured, and the stream there stays the model's own.
        hook_point: Which stream.
        model: The language model that the cache was made from, in evaluation mode. Nothing is
            spliced without one, or into one that predicts neither the next token nor masked ones.
        config: Sizes.
        mask_token: What hides the tokens that a masked model predicts, of its tokenizer; without
            it nothing is spliced into such a model.
        progress: Called with the units "rows" and "spliced contexts", one after the other.

    Raises:
        ValueError: If the cache holds no held-out rows, or a dictionary has another width or a
            name that is taken.
    """
    hold = held_out_rows(cache)
    chunks = config.rows_per_chunk
    measured = measure_reconstruction(
        dictionaries, cache, hook_point, hold, rows_per_chunk=chunks, progress=progress
    )
    training = _sample(cache.rows(TRAINING_SPLITS), config.n_rows_firing, config.seed)
    firing = firing_statistics(
        dictionaries, cache, hook_point, training, rows_per_chunk=chunks, progress=progress
    )
    for name, of_one in measured.items():
        firing[name].merge(of_one.firing)
    substitution, loss = {}, None if model is None else record_of(model).loss
    if model is not None and (loss == "next token" or (loss and mask_token is not None)):
        context = held_out(cache, hook_point, config)
        if loss == "masked token":
            context = context._replace(mask_token=mask_token)
        substitution = measure_substitution(
            dictionaries, model, hook_point, context, config, progress=progress
        )
    report = EvaluationReport(
        hook_point=hook_point,
        cache_fingerprint=cache.fingerprint,
        skip_positions=cache.manifest.plan.skip_positions,
        reconstruction={name: of_one.reconstruction for name, of_one in measured.items()},
        firing={name: summary(of_one) for name, of_one in firing.items()},
        substitution=substitution,
        config=asdict(config),
        read_out={n: d.read_by for n, d in dictionaries.items() if d.read_by != "linear"},
    )
    return Evaluation(report, firing)


def held_out_rows(cache: ActivationCache) -> Int[Tensor, " row"]:
    """The rows that no dictionary was trained on.

    Raises:
        ValueError: If there are none.
    """
    rows = cache.rows(("hold",))
    if len(rows) == 0:
        raise MonosemaError(
            f"{cache.path} must have rows in the split hold, got none; build it with a share of "
            "hold above 0"
        )
    return rows


def held_out(cache: ActivationCache, hook_point: str, config: EvaluateConfig) -> EvaluationContexts:
    """The held-out contexts that the model reads, ascending, and the mean training row.

    Documents that share a context without seeing each other are read one by one.
    """
    numbers = (cache.examples.split == SPLITS.index("hold")).nonzero().flatten()
    numbers = _sample(numbers, config.n_contexts, config.seed)
    tokens, segment = cache.examples.tokens[numbers], cache.examples.segment
    if segment is not None:
        pieces = pieces_of(tokens, segment[numbers])
        parts = [tokens[p.example, p.start : p.stop] for p in pieces]
        tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)
    return EvaluationContexts(
        tokens=tokens,
        skip_positions=cache.manifest.plan.skip_positions,
        mean=cache[hook_point].mean,
        means={point: cache[point].mean for point in cache.hook_points},
        exclude_tokens=cache.manifest.plan.exclude_tokens,
        limits=cache.limits if isinstance(cache, BoundedCache) else {},
    )


def _sample(numbers: Int[Tensor, " row"], n: int, seed: int) -> Int[Tensor, " batch"]:
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return numbers[order[:n]].sort().values
