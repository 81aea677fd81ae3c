"""What an evaluation found, as plain data that is written to and read from JSON.

Groups of dictionaries at equal L0: figures of seeds and sweeps brought to one L0, and fronts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from activations_cache import io, seals
from monosema.checks import MonosemaError
from sae.evaluate.downstream import Accuracy, Downstream
from sae.evaluate.reconstruction import FiringSummary, Reconstruction
from sae.evaluate.substitution import Substitution, SubstitutionEffect
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
