"""Studies of several runs: spread over seeds, stability, description length, scaling laws.

Untrained rivals of dictionaries.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from activations_cache import ActivationCache, io
from activations_cache.checks import Progress, silent
from activations_cache.config import TRAINING_SPLITS
from sae.autoencoder import SparseAutoencoder
from sae.baselines import (
    covariance_of,
    permuted_decoder,
    principal_components,
    random_dictionary,
    raw_neurons,
)
from sae.browser import ResultTable
from sae.evaluate.config import ScalingConfig
from sae.evaluate.config import plan as plan_runs
from sae.evaluate.reconstruction import (
    BATCH,
    DescriptionLength,
    description_length,
    measure_reconstruction,
    meta_score,
)
from sae.evaluate.report import TOLERANCE, EvaluationReport, held_out_rows
from sae.evaluate.scaling.fit import FittedLaw, Laws, draw, fit_laws
from sae.evaluate.scaling.runs import Fitted, read_runs
from sae.evaluate.structure import Stability, stability
from sae.statistics import compare

STABILITY = ("recipe", "pairs", "MCC", "chance", "MMCS", "chance", "> 0.7", "encoder MCC",
             "both > 0.7")  # fmt: skip


ROWS_FOR_L0, ROWS_FOR_PCA = 4096, 65_536


class Figure(NamedTuple):
    """Something that groups are compared by."""

    name: str
    smaller_is_better: bool
    of: Callable[[str], float]
    """From a dictionary's name."""


def figures(report: EvaluationReport) -> list[Figure]:
    """FVU, and what the model loses where that was measured."""
    compared = [Figure("FVU", True, lambda name: report.reconstruction[name].fvu)]
    if intact := report.substitution.get("intact"):
        effects = intact.dictionaries
        compared.append(Figure("Δ CE", True, lambda name: effects[name].ce_increase.value))
    if accuracies := report.downstream:
        compared.append(
            Figure("linear accuracy", False, lambda n: accuracies.spliced[n].linear.value)
        )
    return compared


def with_equal_l0(
    members: Mapping[str, list[str]], report: EvaluationReport
) -> dict[str, list[str]]:
    """The groups of several dictionaries whose L0 is the same to a tenth: seeds and no sweeps."""
    groups = {}
    for group, names in members.items():
        l0 = [report.reconstruction[name].l0 for name in names]
        middle = statistics.median(l0)
        if len(names) > 1 and all(abs(one - middle) <= TOLERANCE * middle for one in l0):
            groups[group] = names
    return groups


def noise_table(members: Mapping[str, list[str]], report: EvaluationReport) -> ResultTable | None:
    """Mean, spread, and what so many seeds tell apart; None where no group has two."""
    groups = with_equal_l0(members, report)
    if not groups:
        return None
    shown = figures(report)
    columns = ("recipe", "seeds", "L0", *(f for of in shown for f in (of.name, "detectable")))
    rows = []
    for group, names in groups.items():
        l0 = [report.reconstruction[name].l0 for name in names]
        row = [group, str(len(names)), _spread(l0, 1)]
        for figure in shown:
            values = [figure.of(name) for name in names]
            detectable = compare(group, values, group, values).detectable
            row += [_spread(values, 4), f"{detectable:.4f}"]
        rows.append(tuple(row))
    note = (
        "mean ± standard deviation over seeds; detectable: the smallest difference from another "
        "recipe with as many seeds and as much spread that shows at 5 % with a power of 80 %"
    )
    return ResultTable(columns, tuple(rows), note)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def stability_table(
    members: Mapping[str, list[str]],
    dictionaries: Mapping[str, SparseAutoencoder],
    report: Progress,
) -> ResultTable | None:
    """Every pair of seeds of a group; None where no group has two of one width."""
    pairs = {
        group: [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        for group, names in members.items()
        if len(names) > 1 and len({_widths(dictionaries[name]) for name in names}) == 1
    }
    if not pairs:
        return None
    total, done, rows = sum(map(len, pairs.values())), 0, []
    for group, of_group in pairs.items():
        stabilities = []
        for a, b in of_group:
            generator = torch.Generator().manual_seed(0)
            stabilities.append(stability(dictionaries[a], dictionaries[b], generator))
            done += 1
            report(done, total, "pairs of seeds")
        rows.append((group, str(len(stabilities)), *_means(stabilities)))
    note = (
        "means over pairs of seeds of |cosine|: MCC one to one, MMCS the nearest, both ways; "
        "chance: as many random directions; > 0.7: share of the latents that the other seed has"
    )
    return ResultTable(STABILITY, tuple(rows), note)


def _widths(dictionary: SparseAutoencoder) -> tuple[int, int]:
    return dictionary.config.d_in, dictionary.config.width_out


def _means(stabilities: list[Stability]) -> tuple[str, ...]:
    figures_of_all = [
        (
            one.decoder.mcc,
            one.chance.mcc,
            (one.decoder.mmcs_forward + one.decoder.mmcs_backward) / 2,
            (one.chance.mmcs_forward + one.chance.mmcs_backward) / 2,
            one.decoder.matched,
            one.encoder.mcc,
            one.matched_both,
        )
        for one in stabilities
    ]
    means = [statistics.mean(column) for column in zip(*figures_of_all, strict=True)]
    return tuple(f"{mean:.3f}" for mean in means)


STRUCTURE = ("dictionary", "bits", "FVU", "meta explained", "chance")

MOST_ROWS = 4096
MOST_ACTIVATIONS = 2**25
"""Entries of a dense matrix of activations, which the description length takes."""

LOSS = 0.01
"""FVU that the rounding of activations may cost."""

N_STEPS = 24
"""Octaves below the largest activation that are tried at most."""

K_META = 4


def structure_table(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    report: Progress,
) -> ResultTable | None:
    """A row for each dictionary of this hook point alone; None without one."""
    of_place = {
        n: d
        for n, d in dictionaries.items()
        if d.config.hook_points_or(hook_point) == _at(hook_point)
    }
    if not of_place:
        return None
    rows = []
    for done, (name, dictionary) in enumerate(of_place.items(), start=1):
        n_rows = min(MOST_ROWS, max(2, MOST_ACTIVATIONS // dictionary.config.d_sae))
        held = held_out_rows(cache)
        x = cache[hook_point][held[:: max(1, len(held) // n_rows)][:n_rows]]
        length = shortest(dictionary, x)
        rows.append((name, f"{length.bits:.1f}", f"{length.fvu:.4f}", *_meta(dictionary)))
        report(done, len(of_place), "dictionaries")
    note = (
        f"bits: entropy per row of the activations, rounded so that FVU rises by at most {LOSS}; "
        "compare at equal FVU; meta explained: variance of the decoder's directions that a "
        f"dictionary of a quarter as many, {K_META} at a time, explains; chance: of random ones"
    )
    return ResultTable(STRUCTURE, tuple(rows), note)


def _at(hook_point: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (hook_point,), (hook_point,)


@torch.no_grad()
def shortest(dictionary: SparseAutoencoder, x: torch.Tensor) -> DescriptionLength:
    """The description with the coarsest step, by octaves, that costs at most LOSS of FVU."""
    step = float(dictionary.encode_dense(x).max())
    if step <= 0:
        return description_length(dictionary, x, 1.0)
    finest = description_length(dictionary, x, step * 2.0**-N_STEPS)
    for octave in range(1, N_STEPS):
        length = description_length(dictionary, x, step * 2.0**-octave)
        if length.fvu <= finest.fvu + LOSS:
            return length
    return finest


def _meta(dictionary: SparseAutoencoder) -> tuple[str, str]:
    if dictionary.config.d_sae < BATCH:
        return "-", "-"  # too few directions to learn from
    score = meta_score(dictionary.W_dec, k=K_META)
    return f"{score.explained:.3f}", f"{score.chance:.3f}"


PLAN, FIT, PICTURE = "plan.json", "fit.json", "scaling.png"


class ScalingFit(NamedTuple):
    """The laws that finished runs allow."""

    laws: Laws
    table: ResultTable
    """Every figure with its interval."""
    warnings: list[str]


def plan_scaling(config: ScalingConfig) -> ResultTable:
    """List the runs of a grid that fits a compute budget, and write them into its output."""
    runs = plan_runs(config)
    path = Path(config.output) / PLAN
    record = {"config": asdict(config), "runs": [asdict(run) for run in runs]}
    io.write_files({path: json.dumps(record, indent=1).encode()})
    rate = config.flops_per_second
    rows = tuple(
        (
            f"{run.d_sae:,}",
            str(run.k),
            f"{run.rows:,}",
            f"{run.steps:,}",
            f"{run.flops:.3g}",
            f"{run.flops / rate / 3600:.3g}" if rate else "-",
        )
        for run in runs
    )
    total = sum(run.flops for run in runs)
    passes = len({run.rows for run in runs})
    note = (
        f"{len(runs)} runs in {passes} passes, {total:.3g} FLOP of {config.budget_flops:.3g}: "
        f"runs of as many rows are entries of one `saes:`. Written to {path}"
    )
    return ResultTable(("latents", "k", "rows", "steps", "FLOP", "hours"), rows, note)


def fit_scaling(
    paths: Sequence[str],
    output: str | Path = "runs/scaling",
    *,
    resamples: int = 200,
    seed: int = 0,
    progress: Progress = silent,
) -> ScalingFit:
    """Fit the laws that finished runs allow; write figures and a picture."""
    runs = read_runs(paths)
    laws = fit_laws(runs, n_resamples=resamples, seed=seed, progress=progress)
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    io.write_files({directory / FIT: json.dumps(_record(laws), indent=1).encode()})
    drawn = draw(laws, directory / PICTURE)
    note = f"{len(laws.best)} runs, 95 % intervals. Written to {directory / FIT}"
    note += f" and {drawn}" if drawn else ""
    table = ResultTable(("figure", "value", "low", "high"), tuple(_rows(laws)), note)
    return ScalingFit(laws, table, _warnings(laws))


def _laws(laws: Laws) -> list[FittedLaw]:
    return [law for law in (laws.compute, laws.width) if law is not None]


def _warnings(laws: Laws) -> list[str]:
    warnings = [warning for law in _laws(laws) for warning in law.warnings]
    return warnings + list(laws.rate.warnings if laws.rate else ())


def _figures(laws: Laws) -> dict[str, Fitted]:
    """Every figure with its interval, by name."""
    figures = {name: figure for law in _laws(laws) for name, figure in law.figures.items()}
    if laws.optimum is not None:
        at = f"at C = {laws.optimum.compute:.3g}"
        figures |= {f"F* {at}": laws.optimum.d_sae, f"S* {at}": laws.optimum.rows}
    if laws.rate is not None:
        figures["exponent of lr*"] = laws.rate.exponent
    return figures


def _rows(laws: Laws) -> list[tuple[str, ...]]:
    rows = [(name, *(f"{x:.4g}" for x in figure)) for name, figure in _figures(laws).items()]
    if laws.optimum is not None:
        rows.append((f"L* at C = {laws.optimum.compute:.3g}", f"{laws.optimum.loss:.4g}", "", ""))
    residuals = [(f"{law.residual:.2g}", "", "") for law in _laws(laws)]
    return rows + [("residual of log L", *cells) for cells in residuals]


def _record(laws: Laws) -> dict:
    return {
        "figures": {name: figure._asdict() for name, figure in _figures(laws).items()},
        "residual": [law.residual for law in _laws(laws)],
        "warnings": _warnings(laws),
        "runs": [asdict(run) for run in laws.best],
    }


def baselines(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    progress: Progress = silent,
) -> dict[str, SparseAutoencoder]:
    """Untrained rivals at the median L0; those with a frozen part come from training."""
    rows = held_out_rows(cache)
    sample = rows[:: max(1, len(rows) // ROWS_FOR_L0)]
    measured = measure_reconstruction(dictionaries, cache, hook_point, sample, progress=progress)
    l0 = sorted(one.reconstruction.l0 for one in measured.values())[len(measured) // 2]
    mean = cache[hook_point].mean
    k = min(max(1, round(l0)), len(mean))
    training = cache.rows(TRAINING_SPLITS)
    covariance = covariance_of(
        cache, hook_point, training[:: max(1, len(training) // ROWS_FOR_PCA)], progress=progress
    )
    first = next(iter(dictionaries.values()))
    generator = torch.Generator().manual_seed(0)
    return {
        f"PCA, k={k}": principal_components(mean, covariance, k),
        f"raw neurons, k={k}": raw_neurons(mean, k),
        f"random, k={k}": random_dictionary(first, l0, generator),
        "permuted decoder": permuted_decoder(first, generator),
    }
