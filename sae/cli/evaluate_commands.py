"""`sae evaluate`, `compare`, `similar`, `study`, `scaling`; torch loads after the request."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae.cli import console
from sae.cli.request import (
    ForceOption,
    ReadOutOption,
    checked_config,
    do_steps,
    of_run,
    refuse_without_cache,
    run_to,
)

if TYPE_CHECKING:
    from sae.run.measuring import MeasureRequest


from sae.cli.request import ConfigArgument, Overrides, with_json
from sae.config import config_file, load
from sae.evaluate.config import ScalingConfig
from sae.run.config import RunConfig

SPLICED_CONTEXTS, SPLICED_IMAGES = 24, 2000

CacheOption = Annotated[
    str | None, typer.Option("--cache", metavar="CACHE", help="The cache they are measured on.")
]
HookOption = Annotated[
    str | None, typer.Option("--hook-point", help="Where the dictionaries name none.")
]
ModelOption = Annotated[
    bool, typer.Option("--model/--no-model", help="Also splice them into the cache's model.")
]
ContextsOption = Annotated[
    int, typer.Option("--contexts", min=1, help="Held-out contexts that each is spliced into.")
]
ImagesOption = Annotated[
    int,
    typer.Option("--images", min=1, help="The same of images: to fit on, and as many to score."),
]
ProbeOption = Annotated[
    int, typer.Option("--probe", min=0, help="Probe so many labels, those of the most rows.")
]
StructureOption = Annotated[
    bool,
    typer.Option(
        "--structure", help="Also stability over seeds, description length and meta-score."
    ),
]


def evaluate(  # noqa: PLR0913  (options are parameters)
    targets: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG [KEY=VALUE]... | [GROUP=]DICT...", show_default=False),
    ],
    cache: CacheOption = None,
    hook_point: HookOption = None,
    model: ModelOption = True,
    contexts: ContextsOption = SPLICED_CONTEXTS,
    images: ImagesOption = SPLICED_IMAGES,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Write all figures here, as JSON.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="Write them here as HTML.")] = None,
    probe: ProbeOption = 0,
    labels: Annotated[
        Path | None, typer.Option(help="JSON lines of example and label, instead of the cache's.")
    ] = None,
    structure: StructureOption = False,
    baselines: Annotated[bool, typer.Option(help="Measure baselines beside them.")] = True,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
) -> None:
    """Measure dictionaries on held-out rows: those of a config, or any with --cache."""
    if cache is None:
        refuse_without_cache(targets[0].rpartition("=")[2])
        run_to("evaluate", targets[0], [*targets[1:], *of_run(read_out)])
        return
    from sae.evaluate.report import plain, write_record
    from sae.run.measuring import measure
    from sae.run.page import write_evaluation

    request = _request(targets, cache, hook_point, (model, contexts, images), probe, structure)
    request = request._replace(baselines=baselines, force=force, read_out=read_out, labels=labels)
    measured = measure(request, console.step)
    console.parts(measured.sections)
    console.data(lambda: plain(measured.record))
    if figures is not None:
        write_record(figures, measured.record)
        console.say(f"figures: {figures}")
    if page is not None:
        write_evaluation(page, measured)
        console.say(f"page: {page}")


def compare(  # noqa: PLR0913
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="[GROUP=]DICT...", help="Those of a GROUP are its seeds and its sweep over L0."
        ),
    ],
    cache: Annotated[
        str, typer.Option("--cache", metavar="CACHE", help="What they are measured on.")
    ],
    hook_point: HookOption = None,
    model: ModelOption = True,
    contexts: ContextsOption = SPLICED_CONTEXTS,
    images: ImagesOption = SPLICED_IMAGES,
    out: Annotated[Path, typer.Option("--out", help="For plots and figures.")] = Path("compare"),
    probe: ProbeOption = 0,
    structure: StructureOption = False,
    l0: Annotated[
        float | None, typer.Option("--l0", min=0.5, help="Compare at this L0; else at the median.")
    ] = None,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
) -> None:
    """Hold groups of dictionaries against each other at equal L0, with ties and Pareto plots."""
    from sae.evaluate.report import plain
    from sae.run.comparing import compare_groups, write_comparison

    request = _request(targets, cache, hook_point, (model, contexts, images), probe, structure)
    comparison = compare_groups(request._replace(force=force, read_out=read_out), l0, console.step)
    console.parts(comparison.sections)
    console.data(lambda: plain(comparison.record))
    for kind, path in write_comparison(comparison, out).items():
        console.say(f"{kind}: {path}")


def similar(  # noqa: PLR0913
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE|CACHE::HOOK_POINT|DICT|CAPTIONS::TOWER...",
            help="Of a CACHE all its hook points.",
        ),
    ],
    cache: Annotated[
        str | None, typer.Option("--cache", metavar="CACHE", help="What DICTs are read on.")
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="One of the measures; repeatable; all when absent.")
    ] = None,
    rows: Annotated[int, typer.Option(min=4, help="Rows at most.")] = 2000,
    permutations: Annotated[int, typer.Option(min=1, help="Of the null.")] = 200,
    draws: Annotated[int, typer.Option(min=1, help="Of the intervals.")] = 200,
    neighbours: Annotated[int, typer.Option(min=1, help="Of cknna and the searches.")] = 10,
    pool: Annotated[
        Literal["row", "example"], typer.Option(help="Compare rows, or means of examples.")
    ] = "row",
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Whether each measure sees components and layers.")
    ] = False,
    model: Annotated[
        bool, typer.Option("--model", help="Stitch each set into the next one's place, in nats.")
    ] = False,
    contexts: ContextsOption = SPLICED_CONTEXTS,
    labels: Annotated[
        str | None,
        typer.Option(metavar="cache|FILE", help="Also how concepts lie, by labels of rows."),
    ] = None,
    out: Annotated[Path, typer.Option(help="For figures, heat maps, page.")] = Path("similar"),
) -> None:
    """Compare sets of rows: layers, caches, dictionaries' latents, captions, by twelve measures.

    Measures: cka, cknna, rsa, "distance correlation", svcca, pwcca, procrustes, matching,
    stitching, relative, "relative search", asif. Each stands beside an interval and what it is
    when rows are exchanged.
    """
    from sae.evaluate.report import plain
    from sae.run.spaces import SimilarRequest, similar_spaces

    if contexts != SPLICED_CONTEXTS and not model:
        raise typer.BadParameter("--contexts must come with --model, got none")
    request = SimilarRequest(
        tuple(targets), cache, rows, permutations=permutations, draws=draws,
        neighbours=neighbours, pool=pool, seed=seed, check=check, model=model, contexts=contexts,
        labels=labels,
    )  # fmt: skip
    if measure:
        request = request._replace(measures=tuple(measure))  # pyright: ignore[reportArgumentType]
    similarity = similar_spaces(request, console.step)
    console.parts(similarity.sections)
    console.data(lambda: plain(similarity.record))
    for kind, path in similarity.write(out).items():
        console.say(f"{kind}: {path}")


def study(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Study dictionaries of several widths after Scaling Monosemanticity; one report page.

    Do every step whose result is not there yet: cache, train, evaluate, explain, then scaling law,
    map (splitting, completeness, levels, neurons, families of texts) and report. Settings of the
    last three are study.passes, study.families, study.exchanges, study.trees.
    """
    checked = checked_config(RunConfig, config, overrides)
    from sae.run.context import Run
    from sae.run.widths import STUDY, result_of, studied

    run = Run(studied(checked))
    do_steps(run, "study", STUDY)
    result = result_of(run)
    console.table(*result.sections[0])
    console.data(lambda: result.record)
    console.say(f"page: {result.page}")


def _request(
    targets: list[str],
    cache: str,
    hook_point: str | None,
    spliced: tuple[bool, int, int],
    probe: int,
    structure: bool,
) -> "MeasureRequest":
    from sae.run.measuring import MeasureRequest, MeasureTarget, SplicedInto

    named = (target.rpartition("=") for target in targets)
    with_model, contexts, images = spliced
    if not with_model and (contexts, images) != (SPLICED_CONTEXTS, SPLICED_IMAGES):
        raise typer.BadParameter("--contexts and --images must come with --model, got --no-model")
    return MeasureRequest(
        tuple(MeasureTarget(path, group=group) for group, _, path in named),
        cache,
        hook_point,
        SplicedInto(contexts, images) if with_model else None,
        probe,
        structure=structure,
    )


app = typer.Typer(no_args_is_help=True, help="How the loss falls with width, rows, k and compute.")


@app.command()
@with_json
def plan(config: ConfigArgument, overrides: Overrides = None) -> None:
    """List the runs of a grid that fits a compute budget, with what each costs."""
    checked = load(ScalingConfig, config_file(config), overrides or [])
    from sae.run.studies import plan_scaling

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
    from sae.run.studies import fit_scaling

    with console.step("fit") as progress:
        fitted = fit_scaling(paths, output, resamples=resamples, seed=seed, progress=progress)
    console.table("Scaling", fitted.table)
    for warning in fitted.warnings:
        console.say(f"[yellow]![/] {warning}")
