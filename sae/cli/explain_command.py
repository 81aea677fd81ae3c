"""`sae explain`: labels of a run's latents, or of any dictionary on any cache that fits it."""

from typing import Annotated

import typer

from sae.cli import console
from sae.cli.request import (
    ForceOption,
    Overrides,
    ReadOutOption,
    of_run,
    refuse_without_cache,
    run_to,
)
from sae.config import ConfigError, load_overrides
from sae.explain.config import ExplainConfig


def explain(  # noqa: PLR0913
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|DICT", help="A YAML file, a recipe; with --cache a dictionary."
        ),
    ],
    overrides: Overrides = None,
    cache: Annotated[str | None, typer.Option(help="Explain DICT on this cache.")] = None,
    hook_point: Annotated[
        str | None, typer.Option(help="Of the cache, where DICT names none.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Result directory; DICT/explain.")] = None,
    across: Annotated[
        str | None, typer.Option(help="A narrower dictionary: which latents did it split?")
    ] = None,
    max_usd: Annotated[float | None, typer.Option(help="A model's answers cost no more.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The same in tokens.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate a model's answers, ask nothing.")
    ] = False,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
) -> None:
    """Label latents and score the labels: those of a run, or with --cache of any dictionary.

    With --cache the overrides are those of `explain:`, such as min_firings=50, of images
    images.group_separator=-. Latents of images are labelled by the folders of the images.

    Labels by a language model: autointerp.llm.model=NAME, with autointerp.llm.kind=openai,
    openrouter, mistral, vllm, llama.cpp, ollama or local, autointerp.llm.base_url=URL for another
    address, autointerp.llm.batch_dir=DIR for batch files. Exit code 1 while questions are open: the
    same command asks just those. Limits count all runs with the same llm.sqlite.
    """
    limits = {"max_usd": max_usd, "max_tokens": max_tokens}
    given = [f"autointerp.llm.{key}={value}" for key, value in limits.items() if value is not None]
    if cache is None:
        alone = {"--out": out, "--hook-point": hook_point, "--across": across}
        alone |= {"--dry-run": dry_run, "--force": force}
        wrong = next((name for name, value in alone.items() if value), "")
        if wrong:
            raise ConfigError(f"{wrong} must come with --cache CACHE, got none")
        refuse_without_cache(config)
        given = [f"explain.{key}" for key in given]
        run_to("explain", config, [*(overrides or []), *given, *of_run(read_out)])
        return
    checked = load_overrides(ExplainConfig, [*(overrides or []), *given])
    if dry_run and checked.autointerp is None:
        raise ConfigError("--dry-run must come with autointerp.llm.model=NAME, got none")
    from sae.run.explaining import ExplainRequest, estimate, explain_dictionary
    from sae.run.label_tables import estimate_facts, explanation_parts

    request = ExplainRequest(config, cache, hook_point, out, across, force, read_out)
    if dry_run and checked.autointerp is not None:
        with console.step("estimate") as progress:
            cost = estimate(request, checked, progress)
        console.facts(estimate_facts(config, cost, checked.autointerp))
        return
    console.parts(explanation_parts(config, explain_dictionary(request, checked, console.step)))
