"""`evaluate`: everything that is measured of dictionaries, in one report of plain data (JSON).

Groups of dictionaries at equal L0: figures of seeds and sweeps brought to one L0, and fronts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations_cache import io, seals
from activations_cache.checks import Progress
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.isolation import pieces_of
from activations_cache.probe import record_of
from activations_cache.reader import ActivationCache
from activations_cache.summary import BoundedCache
from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.downstream import Accuracy, Downstream
from sae.evaluate.reconstruction import (
    FiringSummary,
    Reconstruction,
    firing_statistics,
    measure_reconstruction,
    summary,
)
from sae.evaluate.substitution import (
    EvaluationContexts,
    Substitution,
    SubstitutionEffect,
    measure_substitution,
)
from sae.metrics import Firing
from sae.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Everything that was measured of several dictionaries over the same rows and contexts."""

    hook_point: str
    """Place of the stream in the model."""
    cache_fingerprint: str
    """Fingerprint of the cache whose rows and contexts were read."""
    skip_positions: int
    """Special positions at the start of each context: they give no row and are not scored."""
    reconstruction: dict[str, Reconstruction]
    """By dictionary, over the held-out rows."""
    firing: dict[str, FiringSummary]
    """By dictionary, over training rows and all held-out rows."""
    substitution: dict[str, Substitution]
    """By treatment of the special positions: `intact`, and `spliced` where it was asked for."""
    config: dict[str, Any]
    """The EvaluateConfig."""
    downstream: Downstream | None = None
    """What classes of images are told by, where the cache is of images with classes."""
    read_out: dict[str, str] = field(default_factory=dict)
    """How dictionaries are read that are not read linearly, by name."""

    def spliced(self, name: str) -> Substitution:
        """Where the effect of a dictionary with intact special positions stands."""
        found = (s for s in self.substitution.values() if s.special == "intact")
        return next(s for s in found if name in s.dictionaries)


def write_json(report: EvaluationReport, path: str | Path) -> None:
    """Write a report; nan, which JSON has not, becomes null."""
    text = json.dumps(plain(report), indent=1, allow_nan=False)
    path = Path(path)
    seals.write(path.parent, {path.name: (text + "\n").encode()})


def read_json(path: str | Path) -> EvaluationReport:
    """Read a report that `write_json` wrote.

    Raises:
        ValueError: If the file holds something else.
        DamagedFileError: If it is not as it was written.
    """
    data = seals.read(Path(path), advice="run `sae evaluate` again to make it anew")
    try:
        record = json.loads(data)
        return EvaluationReport(**{
            **record,
            "reconstruction": _each(record["reconstruction"], _reconstruction),
            "firing": _each(record["firing"], _firing),
            "substitution": _each(record["substitution"], _substitution),
            "downstream": _downstream(record.get("downstream")),
        })
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MonosemaError(f"{path} must be a report of `sae evaluate`, got: {error}") from error


def _each(records: dict[str, dict], read: Any) -> dict[str, Any]:
    return {name: read(record) for name, record in records.items()}


def _reconstruction(record: dict[str, Any]) -> Reconstruction:
    return Reconstruction(**{key: _number(value) for key, value in record.items()})


def _firing(record: dict[str, Any]) -> FiringSummary:
    record = {key: _number(value) for key, value in record.items()}
    for key in ("density_edges", "density_histogram"):
        record[key] = tuple(record[key])
    return FiringSummary(**record)


def _substitution(record: dict[str, Any]) -> Substitution:
    effects = {key: _effect(record[key]) for key in ("zero", "mean")}
    dictionaries = _each(record["dictionaries"], _effect)
    ce_base = _interval(record["ce_base"])
    return Substitution(**{**record, **effects, "dictionaries": dictionaries, "ce_base": ce_base})


def _downstream(record: dict[str, Any] | None) -> Downstream | None:
    if record is None:
        return None
    sides = {side: _each(record[side], _accuracy) for side in ("spliced", "intact")}
    return Downstream(**{**record, **sides})


def _accuracy(record: dict[str, Any]) -> Accuracy:
    return Accuracy(**_each(record, _interval))


def _effect(record: dict[str, Any]) -> SubstitutionEffect:
    return SubstitutionEffect(**_each(record, _interval))


def _interval(record: dict[str, Any]) -> Interval:
    return Interval(**{key: _number(value) for key, value in record.items()})


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def plain(value: Any) -> Any:
    """Dataclasses as what JSON has, at any depth; nan becomes None."""
    match value:
        case dict():
            return {str(key): plain(entry) for key, entry in value.items()}
        case Interval():
            return plain(value._asdict())
        case list() | tuple():
            return [plain(entry) for entry in value]
        case float() if math.isnan(value):
            return None
        case _ if is_dataclass(value) and not isinstance(value, type):
            return plain({field.name: getattr(value, field.name) for field in fields(value)})
        case _:
            return value


TOLERANCE = 0.1
"""Share by which a dictionary's L0 may be off and still be taken as it is."""


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """One dictionary."""

    l0: float
    """Mean number of latents that fire."""
    value: float
    """A figure of it, such as its FVU."""
    seed: int = 0
    """Of its training: points of one seed are one sweep over L0."""


def at_equal_l0(
    points: Sequence[ParetoPoint], target: float, tolerance: float = TOLERANCE
) -> list[float]:
    """The figure of each seed at one L0.

    Taken as it is where a dictionary's L0 is within the tolerance, else read between the two
    neighbours of that seed, linearly in log L0; seeds that have neither are left out.

    Raises:
        ValueError: If target is not above 0.
    """
    if target <= 0:
        raise MonosemaError(f"target must be above 0, got {target}")
    seeds = dict.fromkeys(point.seed for point in points)
    found = (_of_sweep([p for p in points if p.seed == s], target, tolerance) for s in seeds)
    return [value for value in found if not math.isnan(value)]


def _of_sweep(points: Sequence[ParetoPoint], target: float, tolerance: float) -> float:
    usable = sorted((p for p in points if p.l0 > 0), key=lambda p: p.l0)
    near = [p for p in usable if abs(p.l0 - target) <= tolerance * target]
    if near:
        return min(near, key=lambda p: abs(p.l0 - target)).value
    below = [p for p in usable if p.l0 < target]
    above = [p for p in usable if p.l0 > target]
    if not below or not above:
        return math.nan
    a, b = below[-1], above[0]
    share = math.log(target / a.l0) / math.log(b.l0 / a.l0)
    return a.value + share * (b.value - a.value)


def pareto(points: Sequence[ParetoPoint], *, smaller_is_better: bool) -> list[ParetoPoint]:
    """The points that none of the same or a smaller L0 beats, by ascending L0."""
    sign = 1 if smaller_is_better else -1
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.l0, sign * p.value)):
        if not math.isnan(point.value) and (
            not front or sign * point.value < sign * front[-1].value
        ):
            front.append(point)
    return front


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write JSON; nan becomes null."""
    text = json.dumps(plain(record), indent=1, allow_nan=False)
    io.write_files({path: (text + "\n").encode()})


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
