"""What labels are worth as tables: scores next to what nobody trained, failures first."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae.browser import ResultTable
from sae.explain.config import AutointerpConfig
from sae.explain.image_run import ExplainedImages
from sae.explain.llm.store import Cost
from sae.explain.results import Summary
from sae.run.context import FactTable, Section, with_differences
from sae.run.explaining import DictionaryExplanation
from sae.run.images import image_label_table, with_ends


def label_table(summary: Summary, baselines: Mapping[str, Summary]) -> ResultTable:
    """What came of the labels without a language model, failures first."""
    arms = {"its latents": summary, **baselines}
    rows = tuple(
        (
            name,
            f"{arm.n_insufficient:,}",
            f"{arm.n_scored:,}",
            with_ends(arm.beats_null),
            with_ends(arm.auc),
            with_ends(arm.auc_strong),
        )
        for name, arm in arms.items()
    )
    columns = ("", "too rare", "scored", "beat null", "AUC", "strongest 10 %")
    note = (
        f"{summary.n_latents:,} latents, {summary.n_dead:,} dead; labels without a language model, "
        f"scored on {summary.n_rows_score:,} rows of other documents; beat null: share of the live "
        "latents whose AUC beats its permutations at 1 %; AUC of all and of the strongest tenth of "
        f"the firings, chance is 0.5; with another latent's label {with_ends(summary.control_auc)}"
    )
    return ResultTable(columns, rows, note)


def score_facts(title: str, summary: dict[str, Any], path: Path) -> FactTable:
    """Scores of labels and of their controls, failures first."""
    return FactTable(title, _scores(summary), str(path))


def _scores(summary: dict[str, Any]) -> list[tuple[str, str]]:
    reasons = ", ".join(f"{n} {reason}" for reason, n in summary["failed_by_reason"].items())
    facts = [
        ("failed", f"{summary['n_failed']:,}" + (f" ({reasons})" if reasons else "")),
        ("insufficient", f"{summary['n_insufficient']:,}"),
        ("labelled", f"{summary['n_done']:,}, {summary['n_different_labels']:,} different labels"),
    ]
    facts += [(scorer, _figures(figures)) for scorer, figures in summary["scores"].items()]
    arms = {**summary["controls"]}
    arms |= {arm: one["scores"] for arm, one in summary.get("baselines", {}).items()}
    for arm, scores in arms.items():
        facts += [(f"{scorer}: {arm}", _figures(figures)) for scorer, figures in scores.items()]
    return facts


def atlas_facts(drawn: dict[str, Any], path: Path) -> FactTable:
    """What the map says, and its caution."""
    facts = []
    if correlation := drawn.get("correlation_with_the_stream"):
        small = correlation["share_at_most_0.3"]
        facts.append((
            "largest correlation with a coordinate of the stream",
            f"median {correlation['median']:.2f}; at most 0.3 for {small:.0%}",
        ))
    if neurons := drawn.get("neurons"):
        facts.append(("largest correlation with a unit before it", _with_neurons(neurons)))
    if counts := drawn.get("splitting"):
        facts += [(name.replace("_", " "), f"{n:,}") for name, n in counts.items()]
    return FactTable("atlas", facts, f"{path}. {drawn['caution']}")


def _with_neurons(neurons: dict[str, Any]) -> str:
    if "median" not in neurons:
        return neurons.get("reason", "no latent fires")
    small, n = neurons["share_at_most_0.3"], len(neurons["hook_points"])
    return f"median {neurons['median']:.2f}; at most 0.3 for {small:.0%}; {n} hook points"


def estimate_facts(title: str, cost: Cost, config: AutointerpConfig) -> FactTable:
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
    return FactTable(f"{title}: estimate", facts, note)


def llm_facts(name: str, summary: dict[str, Any], path: Path) -> FactTable:
    """What came of the labels by a language model, failures first."""
    facts = _scores(summary)
    cost = summary["cost"]
    calls = f"{cost['requests']:,} calls, {cost['cached']:,} answers from the cache"
    n_tokens = cost["input_tokens"] + cost["output_tokens"]
    facts.append(("cost", f"{calls}, {n_tokens:,} tokens, ${cost['usd']:.4f}"))
    total = cost["all_runs"]
    if total["requests"] != cost["requests"]:
        before = f"{total['requests']:,} calls, {total['tokens']:,} tokens, ${total['usd']:.4f}"
        facts.append(("cost of all runs so far", before))
    facts += [(f"first {name}", words) for name, words in summary["first_words"].items()]
    return FactTable(f"{name}: labels by {_model(summary)}", facts, str(path))


def _figures(figures: dict[str, Any]) -> str:
    if figures["mean"] is None:
        return f"no value for {figures['n_without_value']} latents"
    half = "" if figures["half_width"] is None else f" ± {figures['half_width']:.3f}"
    return f"{figures['mean']:.3f}{half} (floor {figures['floor']:.2f}, n {figures['n']})"


def _model(summary: dict[str, Any]) -> str:
    return re.sub(r"[^\w./:-]", "", summary["config"]["llm"]["model"])


def explanation_parts(name: str, explanation: DictionaryExplanation) -> list[Section | FactTable]:
    """Everything that explaining a dictionary came to, as tables and lists."""
    labels, path = explanation.labels, explanation.path or Path()
    title = name if explanation.path is None else str(path)
    is_of_images = isinstance(labels, ExplainedImages)
    table = (
        image_label_table(labels) if is_of_images else label_table(labels.summary, labels.baselines)
    )
    if explanation.differs:
        table = replace(table, note=with_differences(table.note, {name: explanation.differs}))
    parts: list[Section | FactTable] = [Section(title, table)]
    if is_of_images:
        return parts
    if explanation.rules is not None:
        parts.append(score_facts("labels executed as rules, on windows", explanation.rules, path))
    if explanation.atlas is not None:
        parts.append(atlas_facts(explanation.atlas, path))
    if explanation.by_llm is not None:
        parts.append(llm_facts(name, explanation.by_llm, path))
    return parts
