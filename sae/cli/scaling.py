"""`sae scaling`: plan the runs of a scaling study, and fit laws to finished ones."""

from typing import Annotated

import typer

from sae.cli import console
from sae.cli.request import ConfigArgument, Overrides, with_json
from sae.config import config_file, load
from sae.evaluate.scaling.config import ScalingConfig

app = typer.Typer(no_args_is_help=True, help="How the loss falls with width, rows, k and compute.")


@app.command()
@with_json
def plan(config: ConfigArgument, overrides: Overrides = None) -> None:
    """List the runs of a grid that fits a compute budget, with what each costs."""
    checked = load(ScalingConfig, config_file(config), overrides or [])
    from sae.run.scaling import plan_scaling

    console.table("Runs", plan_scaling(checked))


@app.command()
@with_json
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
    from sae.run.scaling import fit_scaling

    with console.step("fit") as progress:
        fitted = fit_scaling(paths, output, resamples=resamples, seed=seed, progress=progress)
    console.table("Scaling", fitted.table)
    for warning in fitted.warnings:
        console.say(f"[yellow]![/] {warning}")
