"""`sae scaling`: plan the runs of a scaling study, and fit laws to finished ones."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.cli import console
from sae.cli.request import ConfigArgument, Overrides
from sae.config import config_file, load
from sae.evaluate.scaling.config import ScalingConfig

if TYPE_CHECKING:
    from sae.evaluate.scaling.fit import FittedLaw, Laws
    from sae.evaluate.scaling.runs import Fitted

app = typer.Typer(no_args_is_help=True, help="How the loss falls with width, rows, k and compute.")

PLAN, FIT, PICTURE = "plan.json", "fit.json", "scaling.png"


@app.command()
def plan(config: ConfigArgument, overrides: Overrides = None) -> None:
    """List the runs of a grid that fits a compute budget, with what each costs."""
    checked = load(ScalingConfig, config_file(config), overrides or [])
    from activations_cache import io
    from sae.evaluate.scaling.config import plan as planned

    runs = planned(checked)
    path = Path(checked.output) / PLAN
    record = {"config": asdict(checked), "runs": [asdict(run) for run in runs]}
    io.write_files({path: json.dumps(record, indent=1).encode()})
    rate = checked.flops_per_second
    rows = [
        (
            f"{run.d_sae:,}",
            str(run.k),
            f"{run.rows:,}",
            f"{run.steps:,}",
            f"{run.flops:.3g}",
            f"{run.flops / rate / 3600:.3g}" if rate else "-",
        )
        for run in runs
    ]
    total = sum(run.flops for run in runs)
    passes = len({run.rows for run in runs})
    note = (
        f"{len(runs)} runs in {passes} passes, {total:.3g} FLOP of {checked.budget_flops:.3g}: "
        f"runs of as many rows are entries of one `saes:`. Written to {path}"
    )
    console.table("Runs", ("latents", "k", "rows", "steps", "FLOP", "hours"), rows, note)


@app.command()
def fit(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="RUNS...", help=".json, .jsonl, or outputs of `sae run`."),
    ],
    output: Annotated[str, typer.Option(help="Directory of the result.")] = "runs/scaling",
    resamples: Annotated[int, typer.Option(min=20, help="Of the intervals.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
) -> None:
    """Fit the laws that finished runs allow; write figures and a picture."""
    from activations_cache import io
    from sae.evaluate.scaling.fit import fit_laws
    from sae.evaluate.scaling.plot import draw
    from sae.evaluate.scaling.runs import read_runs

    runs = read_runs(paths)
    with console.step("fit") as report:
        laws = fit_laws(runs, n_resamples=resamples, seed=seed, progress=report)
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    io.write_files({directory / FIT: json.dumps(_record(laws), indent=1).encode()})
    drawn = draw(laws, directory / PICTURE)
    note = f"{len(laws.best)} runs, 95 % intervals. Written to {directory / FIT}"
    note += f" and {drawn}" if drawn else ""
    console.table("Scaling", ("figure", "value", "low", "high"), _rows(laws), note)
    for warning in _warnings(laws):
        console.OUT.print(f"[yellow]![/] {warning}", soft_wrap=True)


def _laws(laws: "Laws") -> "list[FittedLaw]":
    return [law for law in (laws.compute, laws.width) if law is not None]


def _warnings(laws: "Laws") -> list[str]:
    found = [warning for law in _laws(laws) for warning in law.warnings]
    return found + list(laws.rate.warnings if laws.rate else ())


def _figures(laws: "Laws") -> "dict[str, Fitted]":
    """Every figure with its interval, by name."""
    found = {name: figure for law in _laws(laws) for name, figure in law.figures.items()}
    if laws.optimum is not None:
        at = f"at C = {laws.optimum.compute:.3g}"
        found |= {f"F* {at}": laws.optimum.d_sae, f"S* {at}": laws.optimum.rows}
    if laws.rate is not None:
        found["exponent of lr*"] = laws.rate.exponent
    return found


def _rows(laws: "Laws") -> list[tuple[str, ...]]:
    rows = [(name, *(f"{x:.4g}" for x in figure)) for name, figure in _figures(laws).items()]
    if laws.optimum is not None:
        rows.append((f"L* at C = {laws.optimum.compute:.3g}", f"{laws.optimum.loss:.4g}", "", ""))
    residuals = [(f"{law.residual:.2g}", "", "") for law in _laws(laws)]
    return rows + [("residual of log L", *cells) for cells in residuals]


def _record(laws: "Laws") -> dict:
    return {
        "figures": {name: figure._asdict() for name, figure in _figures(laws).items()},
        "residual": [law.residual for law in _laws(laws)],
        "warnings": _warnings(laws),
        "runs": [asdict(run) for run in laws.best],
    }
