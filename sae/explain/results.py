"""What explaining by a language model leaves: JSON lines, Parquet, a summary, an export."""

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activations_cache import seals
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import OPEN
from sae.explain.pipeline import Explained
from sae.explain.scorers.score import Score
from sae.explain.tables import WRITING, as_json
from sae.explain.windows import LatentWindows

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
    "method": pa.string(), "client": pa.string(), "borrowed_from": pa.int32(),
    "scores": pa.list_(_SCORE),
})  # fmt: skip


def summarise(found: Sequence[Explained], caller: Caller | None) -> dict[str, object]:
    """The run in a few figures, failures first.

    Means are over the latents with a value; `mean_worst` and `mean_best` are over all latents that
    were tried, a failed one counted at the floor of ignorance and at 1. A weak language model gives
    one label to many latents, which `n_different_labels` tells. `first_words` has what was first
    said of each way to fail; `all_runs` is what all calls through the same store took.
    """
    statuses = Counter(f.status for f in found)
    is_open = [any(f.lost.get(reason) for reason in OPEN) for f in found]
    reasons = Counter(f.reason.split(":")[0] for f in found if f.status == "failed")
    labels = {f.explanation.text for f in found if f.status == "done" and f.explanation}
    summary: dict[str, object] = {
        "n_failed": statuses["failed"],
        "failed_by_reason": dict(sorted(reasons.items())),
        "n_open": sum(is_open),
        "n_insufficient": statuses["insufficient"],
        "n_done": statuses["done"],
        "n_different_labels": len(labels),
        "scores": _means([f.scores for f in found if f.status == "done"], statuses["failed"]),
        "controls": {
            name: _means([f.controls[name] for f in found if name in f.controls], 0)
            for name in sorted({name for f in found for name in f.controls})
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
    directory: Path, found: Sequence[Explained], summary: Mapping[str, object], stem: str = STEM
) -> None:
    """Write STEM.jsonl, STEM.parquet and STEM.json durably and listed, in this order."""
    lines, table, last = (f"{stem}.{end}" for end in ("jsonl", "parquet", "json"))
    seals.remove(directory, (last,))
    seals.write(directory, {lines: "".join(_line(asdict(f)) for f in found).encode()})
    rows = pa.Table.from_pylist([_row(f) for f in found], schema=_SCHEMA)
    with seals.replacing(directory / table) as unfinished:
        pq.write_table(rows, unfinished, **WRITING)
    seals.write(directory, {last: as_json(summary)})


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record, sort_keys=True, allow_nan=False) + "\n"


def _row(f: Explained) -> dict[str, object]:
    scores = [{"control": "", **asdict(score)} for score in f.scores]
    for name, controls in f.controls.items():
        scores += [{"control": name, **asdict(score)} for score in controls]
    row: dict[str, object] = {"latent": f.latent, "status": f.status, "reason": f.reason}
    if f.explanation is not None:
        known = asdict(f.explanation)
        row |= {name: known[name] for name in ("method", "client", "borrowed_from")}
        row["label"] = f.explanation.text
    fields = [field.name for field in _SCORE]
    return row | {"scores": [{name: score[name] for name in fields} for score in scores]}


def export_neuronpedia(
    directory: Path,
    found: Iterable[Explained],
    latents: Iterable[LatentWindows],
    model_id: str,
    layer_id: str,
) -> None:
    """Write what Neuronpedia's bulk files hold: explanations, activations and features.

    Each is gzipped JSON lines under the names of its public data sets; `values` are activations
    in the dictionary's units.

    Args:
        directory: Where the folder "neuronpedia" is made.
        found: Results; those without a label are left out of the explanations.
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
        for f in found if f.explanation
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
