"""How well dictionaries' latents can be labelled without a language model, beside untrained ones.

`sae bench labels --cache CACHE DICT...`; a dictionary NAME-frozen beside NAME is its baseline: it
was trained the same way with a random decoder. Random directions and raw neurons stand beside the
first dictionary. Two minutes for 4,608 latents on 400,000 rows.

A difference is counted where its interval (bootstrap over latents for means, Newcombe's for shares)
leaves 0 out. Scores depend on how often a latent fires, so means are also compared at equal
density: within half octaves of it, weighted by the trained dictionary's latents.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

import activations_cache
from activations_cache.models import load_model
from activations_cache.tokens import Pieces
from benchmarks.rows import append, surroundings
from sae import pretrained
from sae.explain.config import ExplainConfig
from sae.explain.results import Summary
from sae.explain.run import ExplainedTexts, TextUnits, explain
from sae.explain.scores import Mean, flat
from sae.read_out import READ_OUTS
from sae.run.caches import model_of
from sae.statistics import Interval, weighted_sum

FROZEN = "-frozen"
RESAMPLES = 1000


def measured(arguments: argparse.Namespace) -> dict[str, ExplainedTexts]:
    """Label every dictionary; untrained latents beside the first one."""
    cache = activations_cache.open(arguments.cache)
    default = arguments.hook_point or cache.hook_points[0]
    loaded = load_model(model_of(cache, None))
    embeddings = loaded.model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    strings = Pieces(loaded.tokenizer, embeddings.shape[0])
    results = {}
    for number, path in enumerate(arguments.dictionaries):
        config = ExplainConfig(
            seed=arguments.seed,
            null_permutations=arguments.permutations,
            n_baseline=0 if number else arguments.baseline,
        )
        dictionary = pretrained.load(path).reading(arguments.read_out)
        inputs, _ = dictionary.config.hook_points_or(default)
        texts = TextUnits(cache.concatenated(inputs), inputs[0], config, strings)
        results[Path(path).name] = explain(dictionary, texts, Path(arguments.out) / Path(path).name)
        print(f"{path} done", flush=True)
    return results


def share_difference(a: Mean, b: Mean) -> Interval:
    """Difference of two independent shares by Newcombe's interval (1998)."""
    minus = Interval(-b.mean, -b.high, -b.low)
    return weighted_sum([(1.0, Interval(*a)), (1.0, minus)])


def matched_difference(
    a: np.ndarray, a_density: np.ndarray, b: np.ndarray, b_density: np.ndarray, seed: int = 0
) -> Interval:
    """Mean of a - mean of b at equal density; the interval is a bootstrap over latents.

    Half octaves of density in which either side has fewer than 5 latents are left out.
    """
    made = np.random.default_rng(seed)
    bins = [np.floor(2 * np.log2(density)).astype(int) for density in (a_density, b_density)]
    both = [
        (a[bins[0] == one], b[bins[1] == one])
        for one in np.unique(bins[0])
        if min((bins[0] == one).sum(), (bins[1] == one).sum()) >= 5
    ]
    weights = np.array([len(of_a) for of_a, _ in both]) / sum(len(of_a) for of_a, _ in both)

    def once(resample: bool) -> float:
        means = [[made.choice(x, len(x)).mean() if resample else x.mean() for x in p] for p in both]
        return float(sum(w * (of_a - of_b) for w, (of_a, of_b) in zip(weights, means, strict=True)))

    low, high = np.quantile([once(True) for _ in range(RESAMPLES)], [0.025, 0.975])
    return Interval(once(False), float(low), float(high))


def compared(trained: ExplainedTexts, frozen: ExplainedTexts) -> dict[str, dict[str, float | str]]:
    """All differences of a dictionary and its baseline, with a verdict in words."""
    results = {
        "share that beats its null": share_difference(
            trained.summary.beats_null, frozen.summary.beats_null
        ),
        "share that beats its null, strongest tenth": share_difference(
            trained.summary.beats_null_strong, frozen.summary.beats_null_strong
        ),
    }
    for name, of in (
        ("AUC at equal density", lambda e: e.scores.auc),
        ("AUC of the strongest tenth at equal density", lambda e: e.held_out.auc_strong),
    ):
        sides = []
        for explained in (trained, frozen):
            known = np.isfinite(of(explained))
            sides += [of(explained)[known], explained.activity.density[known]]
        results[name] = matched_difference(*sides)
    return {name: {**i._asdict(), "verdict": verdict(i)} for name, i in results.items()}


def verdict(difference: Interval) -> str:
    """In one word."""
    if difference.low > 0:
        return "trained wins"
    return "baseline wins" if difference.high < 0 else "tie"


def row_of(arm: str, summary: Summary) -> dict[str, object]:
    """A row of the results."""
    return {"case": "labels without a language model", "arm": arm, **flat(summary)}


def table(arms: dict[str, Summary]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| latents | live | insufficient | beat their null | AUC | AUC, strongest tenth |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in arms.items():
        n_live = s.n_latents - s.n_dead
        figures = " | ".join(_half(m) for m in (s.beats_null, s.auc, s.auc_strong))
        lines.append(f"| {name} | {n_live:,} | {s.n_insufficient:,} | {figures} |")
    return "\n".join(lines)


def _half(result: Mean) -> str:
    return (
        "-"
        if math.isnan(result.low)
        else f"{result.mean:.3f} ±{(result.high - result.low) / 2:.3f}"
    )


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dictionaries", nargs="+", metavar="DICT")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--hook-point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--permutations", type=int, default=199)
    parser.add_argument("--baseline", type=int, default=576, help="random directions, and neurons")
    parser.add_argument("--read-out", choices=READ_OUTS, default="linear", help="of all of them")
    parser.add_argument("--out", default="runs/labels", help="where the labels themselves go")
    parser.add_argument("--record", action="store_true", help="append to results/labels.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measured(arguments)
    first = next(iter(result.values()))
    arms = {name: explained.summary for name, explained in result.items()} | dict(first.baselines)
    rows = [row_of(name, summary) for name, summary in arms.items()]
    print(table(arms))
    for name in result:
        if name + FROZEN in result:
            differences = compared(result[name], result[name + FROZEN])
            rows.append({"case": "labels: trained against its frozen baseline", "arm": name,
                         "differences": differences})  # fmt: skip
            for what, d in differences.items():
                ends = f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
                print(f"{name}: {what}: {ends}: {d['verdict']}")
    about = {"seed": arguments.seed, "permutations": arguments.permutations}
    about["read_out"] = arguments.read_out
    if arguments.record:
        print(append("labels", [{**surroundings(), **about, **row} for row in rows]))


if __name__ == "__main__":
    main()
