"""What labels are worth as tables, failures first; what a study of several widths says."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae.browser import ResultTable
from sae.explain.config import AutointerpConfig
from sae.explain.image_summary import ExplainedImages
from sae.explain.llm.store import Cost
from sae.explain.logit_lens import N_FREQUENT
from sae.explain.run import ExplainedTexts
from sae.explain.scores import Mean
from sae.run.context import FactTable, Section, with_differences
from sae.run.explaining import DictionaryExplanation
from sae.run.images import arms_table, image_label_table, with_ends
from sae.run.page import LinePanel, ShownLine

_BOTH = ("auc", "control_auc")


def label_table(labelled: ExplainedTexts) -> ResultTable:
    """What came of the labels without a language model, failures first."""
    summary = labelled.summary
    columns = {
        "too rare": "n_insufficient", "scored": "n_scored", "beat null": "beats_null",
        "AUC": "auc", "strongest 10 %": "auc_strong",
    }  # fmt: skip
    note = (
        f"{summary.n_latents:,} latents, {summary.n_dead:,} dead; labels without a language model, "
        f"scored on {summary.n_rows_score:,} rows of other documents; beat null: share of the live "
        "latents whose AUC beats its permutations at 1 %; AUC of all and of the strongest tenth of "
        f"the firings, chance is 0.5; with another latent's label {with_ends(summary.control_auc)}"
    )
    return arms_table(labelled, columns, note)


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


def weight_facts(summary: Mapping[str, Any], path: Path) -> FactTable:
    """What labels from weights are worth, beside untrained weights."""
    facts = [("AUC of labels from weights", _with_chance(summary))]
    if null := summary.get("null"):
        facts.append((f"AUC of {null['of']}", _with_chance(null)))
    note = f"labels of the {summary['n_words']:,} most frequent words; chance is 0.5; {path}"
    return FactTable("labels from weights", facts, note)


def _with_chance(summary: Mapping[str, Any]) -> str:
    figures = [[math.nan if n is None else n for n in summary[name].values()] for name in _BOTH]
    auc, other = (with_ends(Mean(*ends)) for ends in figures)
    return (
        f"{auc}, with another latent's label {other}; {summary['n_different_words']:,} words, "
        f"{summary['share_frequent']:.0%} of those listed among the {N_FREQUENT} most frequent"
    )


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
    table = image_label_table(labels) if is_of_images else label_table(labels)
    if explanation.differs:
        table = replace(table, note=with_differences(table.note, {name: explanation.differs}))
    parts: list[Section | FactTable] = [Section(title, table)]
    if is_of_images:
        return parts
    if labels.by_weights is not None:
        parts.append(weight_facts(labels.by_weights, path))
    if explanation.rules is not None:
        parts.append(score_facts("labels executed as rules, on windows", explanation.rules, path))
    if explanation.atlas is not None:
        parts.append(atlas_facts(explanation.atlas, path))
    if explanation.by_llm is not None:
        parts.append(llm_facts(name, explanation.by_llm, path))
    return parts


Study = Mapping[str, Any]
"""The record of a study."""
LEVEL = 0.05
"""From this p on a family has no latent of its own."""
N_FIFTHS = 5


def study_sections(record: Study) -> list[Section]:
    """All tables of a study; the first has a row for each width."""
    tables = {
        "widths": _widths_table(record),
        "scaling law": _law_table(record["scaling"]),
        "completeness": _completeness_table(record),
        "levels": _levels_table(record),
        "splitting": _splitting_table(record),
        "trees": _trees_table(record),
        "families": _families_table(record),
    }
    return [Section(title, table) for title, table in tables.items()]


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _widths_table(record: Study) -> ResultTable:
    columns = (
        "dictionary", "latents", "FVU", "L0", "dead", "concepts", "random concepts",
        "f50 x alive", "rubric", "neurons", "families", "twin's families",
    )  # fmt: skip
    rows = []
    for width in record["widths"]:
        name, twin = width["name"], width["twin"]
        measured, found = record["reconstruction"][name], record["completeness"][name]
        null, levels = found.get("null", {}), record["levels"][name]
        grades = [grade for grade in levels["rubric"] if grade is not None]
        neurons = [_number(record["neurons"][one].get("median"), ".2f") if one else "-"
                   for one in (name, twin)]  # fmt: skip
        rows.append((
            name, f"{width['d_sae']:,}", _number(measured["fvu"]), _number(measured["l0"], ".1f"),
            _number(measured["dead"], ".1%"), _number(found["share_present"], ".1%"),
            _number(null.get("share_present"), ".1%"), _number(found.get("times_alive"), ".2f"),
            _number(sum(grades) / len(grades) if grades else None), "{} ({})".format(*neurons),
            _n_found(record, name), "-" if twin is None else _n_found(record, twin),
        ))  # fmt: skip
    judge = record["levels"][record["widths"][0]["name"]]["judge"]
    about = record["neurons"][record["widths"][0]["name"]]
    note = (
        "concepts: share with a latent that singles them out on documents that did not choose it; "
        "random concepts: the same of a random decoder; f50 x alive: the frequency of which half "
        f"have one, times the live latents; rubric: mean grade by {judge}, 1 is the best; neurons: "
        f"median of the largest correlation with a neuron of {_neurons(about)} (the twin's); "
        f"families: with a latent that tells unseen texts from their controls (p <= {LEVEL:g}); "
        "twin's: of the frozen random decoder"
    )
    return ResultTable(columns, tuple(rows), note)


def _neurons(about: Mapping[str, Any]) -> str:
    points = about.get("hook_points")
    return f"all {len(points)} earlier layers" if points else f"none: {about.get('reason')}"


def _n_found(record: Study, name: str) -> str:
    families = record["search"]
    if "reason" in families:
        return "-"
    n = sum(entry["found"][name]["p"] <= LEVEL for entry in families.values())
    return f"{n} of {len(families)}"


def _law_table(law: Mapping[str, Any]) -> ResultTable:
    figures = law.get("figures", {})
    rows = [(n, *(f"{figure[end]:.4g}" for end in ("value", "low", "high")))
            for n, figure in figures.items()]  # fmt: skip
    note = "; ".join(law.get("warnings", ())) or law.get("reason", "")
    note = f"{len(law['runs'])} runs of this study, 95 % intervals{note and '; '}{note}"
    return ResultTable(("figure", "value", "low", "high"), tuple(rows), note)


def _completeness_table(record: Study) -> ResultTable:
    names = [width["name"] for width in record["widths"]]
    twins = [width["twin"] for width in record["widths"] if width["twin"]]
    of = {name: record["completeness"][name]["families"] for name in (*names, *twins)}
    rows = [
        (family, f"{known['n']:,}", *(f"{of[name][family]['share_present']:.0%}" for name in of))
        for family, known in of[names[0]].items()
    ]
    found = record["completeness"][names[0]]
    note = f"share of the concepts of a family with a latent; {found['note']}"
    if caution := found.get("caution"):
        note += f". Safety: {caution}"
    return ResultTable(("family", "concepts", *of), tuple(rows), note)


def _levels_table(record: Study) -> ResultTable:
    kinds = {
        "specificity": "share of firings with one of the label's words",
        "sensitivity": "share of unseen rows with such a word on which it reaches the fifth",
        "rubric": "grade",
        "rubric_of_another_label": "grade of another latent's label",
    }
    rows = []
    for name, levels in record["levels"].items():
        for kind in kinds:
            shown = [_number(value, ".2f") for value in levels[kind]]
            if shown and set(shown) != {"-"}:
                rows.append((name, kind.replace("_", " "), *shown))
    judged = {name: levels["sensitivity_by_judge"] for name, levels in record["levels"].items()}
    known = [f"{name} {value:.2f}" for name, value in judged.items() if value is not None]
    note = "by fifths of a latent's largest activation, the lowest first; "
    note += "; ".join(f"{kind.replace('_', ' ')}: {what}" for kind, what in kinds.items())
    note += f"; grades by {next(iter(record['levels'].values()))['judge']}"
    note += f"; sensitivity on texts that a model wrote: {', '.join(known)}" if known else ""
    columns = ("dictionary", "figure", *(f"fifth {n + 1}" for n in range(N_FIFTHS)))
    return ResultTable(columns, tuple(rows), note)


def _splitting_table(record: Study) -> ResultTable:
    rows = [
        (
            f"{pair['narrow']} -> {pair['wide']}", arm, f"{pair[arm]['split']:.1%}",
            f"{pair[arm]['novel']:.1%}", f"{pair[arm]['most_children']:,}",
            f"{pair[arm]['chance']:.2f}",
        )
        for pair in record["splitting"]
        for arm in ("trained", "twins")
        if arm in pair
    ]  # fmt: skip
    columns = ("widths", "arm", "split", "novel", "most children", "chance cosine")
    note = (
        "split: share of the narrower's latents with two children or more, of a cosine of at least "
        "0.5; novel: share of the wider's without a parent; twins: the same of frozen random "
        "decoders; 95 % of random directions have no latent nearer than the chance cosine"
    )
    return ResultTable(columns, tuple(rows), note)


def _trees_table(record: Study) -> ResultTable:
    rows = [
        (str(tree["latent"]), _label(tree), f"{tree['n_leaves']:,}", _below(tree))
        for tree in record["trees"]
    ]
    note = (
        "latents of the narrowest width by the number of their descendants in the widest, each "
        "generation in brackets; that a direction divides does not say that its parts differ in "
        "meaning"
    )
    return ResultTable(("latent", "label", "leaves", "descendants"), tuple(rows), note)


def _label(tree: Mapping[str, Any]) -> str:
    return tree["label"] or f"latent {tree['latent']}"


def _below(tree: Mapping[str, Any], most: int = 4) -> str:
    shown = [
        _label(child) + (f" [{_below(child)}]" if child["children"] else "")
        for child in tree["children"][:most]
    ]
    n_more = len(tree["children"]) - len(shown)
    return "; ".join([*shown, *([f"{n_more} more"] if n_more else [])])


def _families_table(record: Study) -> ResultTable:
    columns = (
        "family", "dictionary", "latents", "AUC", "AUC, exchanged", "p", "common",
        "common, exchanged",
    )  # fmt: skip
    families = record["search"]
    if "reason" in families:
        return ResultTable(columns, (), families["reason"])
    rows = [
        (
            family + (" (safety)" if entry["safety"] else ""), name,
            " ".join(map(str, found["latents"])), f"{found['auc']:.2f}", f"{found['chance']:.2f}",
            f"{found['p']:.3f}", str(found["n_common"]), f"{found['n_common_chance']:.1f}",
        )
        for family, entry in families.items()
        for name, found in entry["found"].items()
    ]  # fmt: skip
    note = (
        "AUC: texts against their controls, of a latent that other pairs chose; exchanged: the "
        "same where texts and controls are exchanged; common: latents that fire in every text and "
        f"no control. {record['caution']}"
    )
    return ResultTable(columns, tuple(rows), note)


def study_panels(record: Study) -> dict[str, list[LinePanel]]:
    """What is drawn, by the title of the section that it stands above."""
    curves: list[ShownLine] = []
    for width in record["widths"]:
        found = record["completeness"][width["name"]]
        curves.append(_curve(width["name"], found))
        if null := found.get("null"):
            curves.append(_curve(f"random, {width['d_sae']:,}", null)._replace(is_null=True))
    names = [width["name"] for width in record["widths"]]
    kinds = ("specificity", "sensitivity", "rubric")
    levels = [
        LinePanel(kind, "fifth of the largest activation",
                  [_by_level(name, record["levels"][name][kind]) for name in names])
        for kind in kinds
    ]  # fmt: skip
    title = "concepts that have a latent"
    return {
        "completeness": [LinePanel(title, "frequency in the corpus", curves, log=True)],
        "levels": levels,
    }


def _curve(name: str, found: Mapping[str, Any]) -> ShownLine:
    points = [(frequency, share) for frequency, share, _ in found["points"]]
    if "f50" not in found or not points:
        return ShownLine(name, (), points)
    low, high = points[0][0], points[-1][0]
    at = [low * (high / low) ** (i / 48) for i in range(49)]
    slope, f50 = found["slope"], found["f50"]
    curve = [(f, 1 / (1 + math.exp(-max(min(slope * math.log(f / f50), 50), -50)))) for f in at]
    return ShownLine(name, curve, points)


def _by_level(name: str, values: Sequence[float | None]) -> ShownLine:
    return ShownLine(name, [(n + 1, v) for n, v in enumerate(values) if v is not None])
