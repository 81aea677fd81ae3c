"""Scaling studies: plan the runs of a grid, and fit laws to finished ones."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from activations_cache import io
from activations_cache.checks import Progress, silent
from sae.browser import ResultTable
from sae.evaluate.scaling.config import ScalingConfig
from sae.evaluate.scaling.config import plan as plan_runs
from sae.evaluate.scaling.fit import FittedLaw, Laws, fit_laws
from sae.evaluate.scaling.plot import draw
from sae.evaluate.scaling.runs import Fitted, read_runs

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
