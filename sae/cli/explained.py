"""What `sae explain` prints: labels and scores beside what nobody trained, failures first."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.cli import console
from sae.explain.config import AutointerpConfig
from sae.explain.llm.caller import Cost
from sae.explain.scores import Mean
from sae.explain.summary import Summary


def show_labels(title: str, summary: Summary, baselines: Mapping[str, Summary]) -> None:
    """Print what came of the labels without a language model, failures first."""
    arms = {"its latents": summary, **baselines}
    rows = [
        (
            name,
            f"{arm.n_insufficient:,}",
            f"{arm.n_scored:,}",
            _with_ends(arm.beats_null),
            _with_ends(arm.auc),
            _with_ends(arm.auc_strong),
        )
        for name, arm in arms.items()
    ]
    columns = ("", "too rare", "scored", "beat null", "AUC", "strongest 10 %")
    note = (
        f"{summary.n_latents:,} latents, {summary.n_dead:,} dead; labels without a language model, "
        f"scored on {summary.n_rows_score:,} rows of other documents; beat null: share of the live "
        "latents whose AUC beats its permutations at 1 %; AUC of all and of the strongest tenth of "
        f"the firings, chance is 0.5; with another latent's label {_with_ends(summary.control_auc)}"
    )
    console.table(title, columns, rows, note)


def _with_ends(found: Mean) -> str:
    return f"{found.mean:.3f} ±{(found.high - found.low) / 2:.3f}"


def show_scores(title: str, summary: dict[str, Any], path: Path) -> None:
    """Print scores of labels and of their controls, failures first."""
    console.facts(title, _scores(summary), str(path))


def _scores(summary: dict[str, Any]) -> list[tuple[str, str]]:
    reasons = ", ".join(f"{n} {reason}" for reason, n in summary["failed_by_reason"].items())
    facts = [
        ("failed", f"{summary['n_failed']:,}" + (f" ({reasons})" if reasons else "")),
        ("insufficient", f"{summary['n_insufficient']:,}"),
        ("labelled", f"{summary['n_done']:,}, {summary['n_different_labels']:,} different labels"),
    ]
    facts += [(scorer, _figures(figures)) for scorer, figures in summary["scores"].items()]
    arms = {**summary["controls"]}
    arms |= {arm: found["scores"] for arm, found in summary.get("baselines", {}).items()}
    for arm, scores in arms.items():
        facts += [(f"{scorer}: {arm}", _figures(figures)) for scorer, figures in scores.items()]
    return facts


def show_atlas(drawn: dict[str, Any], path: Path) -> None:
    """Print what the map says, and its caution."""
    facts = []
    if found := drawn.get("correlation_with_the_stream"):
        facts.append((
            "largest correlation with a coordinate of the stream",
            f"median {found['median']:.2f}; at most 0.3 for {found['share_at_most_0.3']:.0%}",
        ))
    if found := drawn.get("splitting"):
        facts += [(name.replace("_", " "), f"{n:,}") for name, n in found.items()]
    console.facts("atlas", facts, f"{path}. {drawn['caution']}")


def show_estimate(title: str, cost: Cost, config: AutointerpConfig) -> None:
    """What a run would take at most, and what its limits are."""
    limits = [
        (name, f"{getattr(config.llm, name):,}")
        for name in ("max_usd", "max_tokens", "max_requests")
        if getattr(config.llm, name) is not None
    ]
    usd = f"${cost.usd(config.llm):.4f}"
    if not cost.usd(config.llm):
        usd += " (no prices: usd_per_million_input, usd_per_million_output)"
    tokens = f"{cost.input_tokens:,} sent, {cost.output_tokens:,} received"
    facts = [("calls", f"{cost.requests:,}"), ("tokens", tokens), ("cost", usd), *limits]
    note = "at most, before answers that are kept and questions asked again; nothing was called"
    console.facts(f"{title}: estimate", facts, note)


def show_summary(name: str, summary: dict[str, Any], path: Path) -> None:
    """Print what came of the labels by a language model, failures first."""
    facts = _scores(summary)
    cost = summary["cost"]
    calls = f"{cost['requests']:,} calls, {cost['cached']:,} answers from the cache"
    n_tokens = cost["input_tokens"] + cost["output_tokens"]
    facts.append(("cost", f"{calls}, {n_tokens:,} tokens, ${cost['usd']:.4f}"))
    console.facts(f"{name}: labels by {_model(summary)}", facts, str(path))


def _figures(figures: dict[str, Any]) -> str:
    if figures["mean"] is None:
        return f"no value for {figures['n_without_value']} latents"
    half = "" if figures["half_width"] is None else f" ± {figures['half_width']:.3f}"
    return f"{figures['mean']:.3f}{half} (floor {figures['floor']:.2f}, n {figures['n']})"


def _model(summary: dict[str, Any]) -> str:
    return re.sub(r"[^\w./:-]", "", summary["config"]["llm"]["model"])
