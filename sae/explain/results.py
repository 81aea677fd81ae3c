"""What explaining leaves: JSON lines, Parquet, an export, and a summary, failures first."""

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activations_cache import seals
from sae.explain.examples import SplitCodes
from sae.explain.held_out import HeldOut
from sae.explain.judges import Score
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import OPEN
from sae.explain.pipeline import LatentOutcome
from sae.explain.scores import FLOOR, Mean, RuleScores, bootstrap_mean
from sae.explain.tables import WRITING, as_json
from sae.explain.windows import LatentWindows
from sae.statistics import Interval, wilson

STEM = "explanations"
JSON_LINES = f"{STEM}.jsonl"
NEURONPEDIA = "neuronpedia"

_SCORE = pa.struct({
    "scorer": pa.string(), "control": pa.string(), "value": pa.float64(), "low": pa.float64(),
    "high": pa.float64(), "floor": pa.float64(), "worst": pa.float64(), "best": pa.float64(),
    "n": pa.int64(), "n_failed": pa.int64(), "reason": pa.string(),
})  # fmt: skip
_SCHEMA = pa.schema({
    "latent": pa.int32(), "status": pa.string(), "reason": pa.string(), "label": pa.string(),
    "method": pa.string(), "client": pa.string(),
    "scores": pa.list_(_SCORE),
})  # fmt: skip


def summarise(results: Sequence[LatentOutcome], caller: Caller | None) -> dict[str, object]:
    """The run in a few figures, failures first.

    Means are over the latents with a value; `mean_worst` and `mean_best` are over all latents that
    were tried, a failed one counted at the floor of ignorance and at 1. A weak language model gives
    one label to many latents, which `n_different_labels` tells. `first_words` has what was first
    said of each way to fail; `all_runs` is what all calls through the same store took.
    """
    statuses = Counter(f.status for f in results)
    is_open = [any(f.lost.get(reason) for reason in OPEN) for f in results]
    reasons = Counter(f.reason.split(":")[0] for f in results if f.status == "failed")
    labels = {f.explanation.text for f in results if f.status == "done" and f.explanation}
    summary: dict[str, object] = {
        "n_failed": statuses["failed"],
        "failed_by_reason": dict(sorted(reasons.items())),
        "n_open": sum(is_open),
        "n_insufficient": statuses["insufficient"],
        "n_done": statuses["done"],
        "n_different_labels": len(labels),
        "scores": _means([f.scores for f in results if f.status == "done"], statuses["failed"]),
        "controls": {
            name: _means([f.controls[name] for f in results if name in f.controls], 0)
            for name in sorted({name for f in results for name in f.controls})
        },
    }
    if caller is not None:
        spent = caller.budget.spent
        total, usd = caller.budget.ledger.total()
        summary["outcomes"] = dict(sorted(caller.tally.outcomes.items()))
        summary["questions_lost"] = dict(sorted(caller.tally.lost.items()))
        summary["first_words"] = dict(sorted(caller.tally.words.items()))
        summary["cost"] = {
            "failed_calls_and_answers": dict(sorted(caller.failures.items())),
            "requests": spent.requests,
            "cached": caller.n_cached,
            "input_tokens": spent.input_tokens,
            "output_tokens": spent.output_tokens,
            "usd": round(spent.usd(caller.config), 6),
            "all_runs": {"requests": total.requests, "tokens": total.tokens, "usd": round(usd, 6)},
        }
    return summary


def _means(scores: Sequence[Sequence[Score]], n_failed: int) -> dict[str, dict[str, object]]:
    by_name: dict[str, list[Score]] = {}
    for score in (score for of_latent in scores for score in of_latent):
        by_name.setdefault(score.scorer, []).append(score)
    return {name: _mean(of_name, n_failed) for name, of_name in by_name.items()}


def _mean(scores: list[Score], n_failed: int) -> dict[str, object]:
    values = np.array([s.value for s in scores if s.value is not None])
    floor, n = scores[0].floor, len(scores) + n_failed
    worst = [floor if s.worst is None else s.worst for s in scores] + [floor] * n_failed
    best = [1.0 if s.best is None else s.best for s in scores] + [1.0] * n_failed
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    mean = float(values.mean()) if len(values) else None
    return {
        "mean": mean,
        "half_width": None if half is None else float(half),
        "floor": floor,
        "n": len(values),
        "n_without_value": len(scores) - len(values),
        "mean_worst": float(np.sum(worst) / n),
        "mean_best": float(np.sum(best) / n),
        "share_above_floor": _share([s.low is not None and s.low > floor for s in scores], n),
    }


def _share(holds: list[bool], n: int) -> float | None:
    return sum(holds) / n if n else None


def write_results(
    directory: Path,
    results: Sequence[LatentOutcome],
    summary: Mapping[str, object],
    stem: str = STEM,
) -> None:
    """Write STEM.jsonl, STEM.parquet and STEM.json durably and listed, in this order."""
    lines, table, last = (f"{stem}.{end}" for end in ("jsonl", "parquet", "json"))
    seals.remove(directory, (last,))
    seals.write(directory, {lines: "".join(_line(asdict(f)) for f in results).encode()})
    rows = pa.Table.from_pylist([_row(f) for f in results], schema=_SCHEMA)
    with seals.replacing(directory / table) as unfinished:
        pq.write_table(rows, unfinished, **WRITING)
    seals.write(directory, {last: as_json(summary)})


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record, sort_keys=True, allow_nan=False) + "\n"


def _row(f: LatentOutcome) -> dict[str, object]:
    scores = [{"control": "", **asdict(score)} for score in f.scores]
    for name, controls in f.controls.items():
        scores += [{"control": name, **asdict(score)} for score in controls]
    row: dict[str, object] = {"latent": f.latent, "status": f.status, "reason": f.reason}
    if f.explanation is not None:
        known = asdict(f.explanation)
        row |= {name: known[name] for name in ("method", "client")}
        row["label"] = f.explanation.text
    fields = [field.name for field in _SCORE]
    return row | {"scores": [{name: score[name] for name in fields} for score in scores]}


def export_neuronpedia(
    directory: Path,
    result: Iterable[LatentOutcome],
    latents: Iterable[LatentWindows],
    model_id: str,
    layer_id: str,
) -> None:
    """Write what Neuronpedia's bulk files hold: explanations, activations and features.

    Each is gzipped JSON lines under the names of its public data sets; `values` are activations
    in the dictionary's units.

    Args:
        directory: Where the folder "neuronpedia" is made.
        result: Results; those without a label are left out of the explanations.
        latents: The windows of the same latents.
        model_id: Neuronpedia's name of the model, such as "gpt2-small".
        layer_id: Its name of the dictionary, such as "6-res-jb".
    """
    base = directory / NEURONPEDIA / model_id / layer_id
    explanations = [
        {
            "modelId": model_id, "layer": layer_id, "index": str(f.latent),
            "description": f.explanation.text, "typeName": f.explanation.method,
            "explanationModelName": f.explanation.client.split(" ")[-1],
        }
        for f in result if f.explanation
    ]  # fmt: skip
    features, activations = [], []
    for latent in latents:
        named = {"modelId": model_id, "layer": layer_id, "index": str(latent.latent)}
        features.append(
            named | {
                "frac_nonzero": latent.density, "maxActApprox": latent.max_activation,
                "pos_str": list(latent.promoted), "neg_str": list(latent.suppressed),
            }
        )  # fmt: skip
        for window in latent.of("explain", "active"):
            values = list(window.activations)
            activations.append(
                named | {
                    "tokens": list(window.tokens), "values": values, "maxValue": max(values),
                    "minValue": min(values), "maxValueTokenIndex": values.index(max(values)),
                }
            )  # fmt: skip
    for name, rows in (
        ("explanations", explanations), ("features", features), ("activations", activations),
    ):  # fmt: skip
        path = base / name / "batch-0.jsonl.gz"
        data = gzip.compress("".join(map(_line, rows)).encode(), mtime=0)
        seals.write(path.parent, {path.name: data})


LEVEL = 0.01
"""Where a label beats its permutation null; 1 % of labels that say nothing do."""


@dataclass(frozen=True, kw_only=True)
class LabelFigures:
    """The labels of texts or images in a few figures; nan where there is nothing to average."""

    n_insufficient: int
    """Live latents that fire too seldom to be scored; counted, never dropped."""
    n_dead: int
    """Latents that never fire in the two splits."""
    n_scored: int
    """Live latents whose label was scored."""
    n_latents: int
    """All latents."""
    auc: Mean
    """Mean AUC over the scored latents; its interval is a bootstrap over latents, of images one
    over images."""
    auc_median: float
    """Median AUC over the scored latents."""
    auc_all_live: float
    """Mean AUC over all live latents, those without a score counted at the floor."""
    control_auc: Mean
    """Mean AUC when every latent is scored with another latent's label."""
    floor: float
    """The AUC of knowing nothing."""
    n_rows_explain: int
    """Rows from which the labels were made."""
    n_rows_score: int
    """Rows on which they were scored."""


@dataclass(frozen=True, kw_only=True)
class Summary(LabelFigures):
    """What is said of labels of texts as well."""

    beats_null: Mean
    """Share of the live latents whose held-out AUC beats its permutation null at 1 %; Wilson's
    interval. Latents without a score count as not beating it."""
    beats_null_strong: Mean
    """The same for the AUC of the strongest tenth of the firings."""
    auc_strong: Mean
    """Mean AUC of the strongest tenth of the firings, over the latents that have one."""
    n_strong: int
    """Latents that have one."""
    auc_wide: Mean
    """Mean AUC of the larger rules, which are not what the labels say."""
    share_above_chance: float
    """Share of the scored latents whose interval lies above the floor."""
    curve: tuple[float, ...]
    """Share of a latent's firings that its words explain, by fifths of its largest activation;
    means over the latents that fire there."""
    curve_n: tuple[int, ...]
    """Firings in each fifth, of all scored latents together."""
    base: float
    """What the curve is for words that say nothing: the mean share of rows with them."""


def common_figures(
    status: np.ndarray, auc: np.ndarray, parts: Sequence[SplitCodes]
) -> dict[str, Any]:
    """What `LabelFigures` holds besides the means, by the status and the AUC of all latents."""
    n = Counter(status.tolist())
    n_live, scored = len(status) - n["dead"], auc[status == "scored"]
    at_floor = FLOOR * (n_live - len(scored))
    return {
        "n_latents": len(status),
        "n_scored": len(scored),
        "n_insufficient": n["insufficient"],
        "n_dead": n["dead"],
        "auc_median": float(np.median(scored)) if len(scored) else math.nan,
        "auc_all_live": float(scored.sum() + at_floor) / n_live if n_live else math.nan,
        "floor": FLOOR,
        **{f"n_rows_{part.split}": part.codes.n_rows for part in parts},
    }


def share_of_live(holds: np.ndarray, status: np.ndarray) -> Interval:
    """Share of the live latents of which something holds, with Wilson's interval."""
    live = status != "dead"
    n_live = int(live.sum())
    return wilson(int(holds[live].sum()), n_live) if n_live else Interval(*[math.nan] * 3)


class SummaryInputs(NamedTuple):
    """What a summary is made of."""

    scores: RuleScores
    wide: RuleScores
    control: RuleScores
    held_out: HeldOut


def summary_of(
    result: SummaryInputs,
    status: np.ndarray,
    parts: Sequence[SplitCodes],
    generator: np.random.Generator,
) -> Summary:
    """Average over latents.

    Args:
        result: Scores of all latents.
        status: "scored", "insufficient" or "dead", of each.
        parts: Firings on the explain and on the score split.
        generator: Of the bootstrap.
    """
    scores, wide, control, unseen = result
    wanted = status == "scored"
    strong = unseen.auc_strong[np.isfinite(unseen.auc_strong)]
    return Summary(
        **common_figures(status, scores.auc, parts),
        beats_null=Mean(*share_of_live(unseen.beats(LEVEL), status)),
        beats_null_strong=Mean(*share_of_live(unseen.beats(LEVEL, strong=True), status)),
        auc=bootstrap_mean(scores.auc[wanted], generator),
        auc_strong=bootstrap_mean(strong, generator),
        n_strong=len(strong),
        auc_wide=bootstrap_mean(wide.auc[wanted], generator),
        control_auc=bootstrap_mean(control.auc[np.isfinite(control.auc)], generator),
        share_above_chance=_mean_of(scores.low[wanted] > FLOOR),
        curve=tuple(_mean_of(step[np.isfinite(step)]) for step in unseen.curve[wanted].T),
        curve_n=tuple(unseen.curve_n[wanted].sum(axis=0).tolist()),
        base=_mean_of(unseen.base[wanted]),
    )


def _mean_of(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
