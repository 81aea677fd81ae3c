"""The results of a run as a table and as the page's data."""

import json
import math
from typing import TYPE_CHECKING, Any

from sae.browser import (
    Context,
    Curve,
    DictionaryPage,
    Histogram,
    LatentPage,
    PageData,
    ResultTable,
    SteeringExample,
)
from sae.cli.unembedding import unembedding
from sae.evaluate.report import EvaluationReport, read_json
from sae.explain.logit_lens import PromotedTokens, promoted_tokens
from sae.explain.tables import EXAMPLES, LATENTS, SUMMARY, LatentRecord, read_examples, read_latents
from sae.train.curves import read_curves

if TYPE_CHECKING:
    from sae.cli.chain import Run

CAUTIONS = (
    "A label says with which words of these texts a latent's firing goes together.",
    "That a latent exists does not show how the model uses it.",
    "Labels were made on one set of documents and scored on another; 0.5 is chance.",
    "A latent may stand for something that these texts do not show.",
)
N_PROMOTED = 8


def result_table(run: "Run", measured: EvaluationReport, *, with_labels: bool) -> ResultTable:
    """One row per dictionary, the frozen baselines among them."""
    columns = ["dictionary", "FVU", "L0", "dead", "CE rec. (zero)", "CE rec. (mean)", "Δ CE"]
    if with_labels:
        columns.append("label AUC")
    intact = measured.substitution["intact"]
    rows = []
    for name, found in measured.reconstruction.items():
        spliced = measured.spliced(name)
        effect = spliced.dictionaries[name]
        row = [
            name,
            f"{found.fvu:.3f}",
            f"{found.l0:.1f}",
            f"{measured.firing[name].dead_fraction:.1%}",
            f"{effect.ce_recovered_zero.value:.3f}",
            f"{effect.ce_recovered_mean.value:.3f}",
            f"{effect.ce.value - spliced.ce_base.value:+.3f}",
        ]
        if with_labels:
            row.append(_mean(_labels(run, name)["auc"]))
        rows.append(tuple(row))
    n_rows = next(iter(measured.reconstruction.values())).n_rows
    note = (
        f"{n_rows:,} held-out rows; CE {intact.ce_base.value:.3f} nats on {intact.n_tokens:,} "
        f"held-out tokens, positions below {measured.skip_positions} left intact"
    )
    if with_labels:
        controls = ", ".join(_mean(_labels(run, n)["control_auc"]) for n in run.dictionaries)
        note += f"; AUC of exchanged labels: {controls}"
    return ResultTable(columns=tuple(columns), rows=tuple(rows), note=note)


def _labels(run: "Run", name: str) -> dict[str, Any]:
    return json.loads((run.path("explain") / name / SUMMARY).read_text())


def _mean(found: dict[str, float | None]) -> str:
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "-"
    return f"{mean:.3f} ±{(high - low) / 2:.3f}"


def page_data(run: "Run") -> PageData:
    """Everything that the page shows."""
    measured = read_json(run.path("evaluate") / "report.json")
    steering = json.loads((run.path("steer") / "steering.json").read_text())
    cache = run.cache
    shown = [name for name in run.dictionaries if not run.is_frozen(name)]
    return PageData(
        title=run.config.title,
        subtitle="Dictionaries of one stream: measured on held-out text, labelled without an LLM.",
        facts=(
            ("model", run.config.cache.model.path.rpartition("/")[2]),
            ("hook point", run.hook_point),
            ("rows trained on", f"{len(cache.rows(('explain', 'score'))):,}"),
            ("rows held out", f"{len(cache.rows(('hold',))):,}"),
            ("seed", str(run.config.train.seed)),
        ),
        results=result_table(run, measured, with_labels=True),
        curves=_curves(run),
        dictionaries=tuple(_dictionary_page(run, name, measured) for name in shown),
        steering=(SteeringExample(**steering["shown"]),),
        cautions=CAUTIONS,
    )


def _curves(run: "Run") -> tuple[Curve, ...]:
    found = read_curves(run.path("train"))
    return tuple(
        Curve(
            name=name,
            steps=tuple(int(n) for n in found[name]["rows"]),
            values={"FVU": found[name]["fvu"], "L0": found[name]["l0"]},
        )
        for name in run.dictionaries
        if name in found
    )


def _dictionary_page(run: "Run", name: str, measured: EvaluationReport) -> DictionaryPage:
    firing = measured.firing[name]
    path = run.path("explain") / name
    lens = _logit_lens(run, name)
    contexts: dict[int, list[Context]] = {}
    for found in read_examples(path / EXAMPLES):
        shown = Context(found.tokens, found.activations, found.peak, found.source)
        contexts.setdefault(found.latent, []).append(shown)
    records = [r for r in read_latents(path / LATENTS) if r.status != "dead"]
    return DictionaryPage(
        name=name,
        summary=f"{run.dictionaries[name].config.activation}, {len(records):,} live latents",
        d_sae=firing.d_sae,
        n_rows=firing.n_rows,
        n_live=firing.d_sae - firing.n_dead,
        n_dead=firing.n_dead,
        density_histogram=Histogram(
            edges=tuple(math.log10(edge) for edge in firing.density_edges),
            counts=tuple(firing.density_histogram),
            log10=True,
        ),
        latents=tuple(
            _latent_page(record, tuple(contexts.get(record.latent, ())), lens, run.token_strings)
            for record in records
        ),
    )


def _latent_page(
    record: LatentRecord, contexts: tuple[Context, ...], lens: PromotedTokens, strings: list[str]
) -> LatentPage:
    return LatentPage(
        latent=record.latent,
        label=record.label,
        kind=record.kind,
        auc=record.auc,
        auc_low=record.low,
        auc_high=record.high,
        status="scored" if record.status == "scored" else "insufficient",
        density=record.density,
        max_activation=record.max_activation,
        words=tuple(zip(record.words, record.weights, strict=True)),
        promoted=tuple(strings[i] for i in lens.promoted[record.latent].tolist()),
        suppressed=tuple(strings[i] for i in lens.suppressed[record.latent].tolist()),
        contexts=contexts,
        histogram=record.histogram,
    )


def _logit_lens(run: "Run", name: str) -> PromotedTokens:
    return promoted_tokens(run.dictionaries[name], *unembedding(run.loaded.model), N_PROMOTED)
