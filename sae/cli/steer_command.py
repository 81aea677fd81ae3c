"""`sae steer` and `sae find`: text and sweeps with latents changed, and latents looked for."""

from pathlib import Path
from typing import Annotated

import typer

from sae.cli import console
from sae.cli.request import ForceOption, Overrides, ReadOutOption, run_to
from sae.config import ConfigError, is_config, load_overrides
from sae.steer.config import FindRequest, SteerRequest


def steer(  # noqa: PLR0913  (options are parameters)
    path: Annotated[
        str, typer.Argument(metavar="CONFIG|DICT", help="A YAML file, a recipe, or a dictionary.")
    ],
    overrides: Overrides = None,
    latent: Annotated[
        list[str] | None, typer.Option(help="NUMBER=CHANGE: 123=10x, =+2x, =*3, =off; repeatable.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What is continued; repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="If the dictionary does not name it.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says: use the chat template.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try many strengths and plot them.")
    ] = False,
    output: Annotated[str | None, typer.Option(help="Directory of a sweep's results.")] = None,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
) -> None:
    """Generate with latents changed: of a run's config after explaining, or of a dictionary.

    A dictionary takes KEY=VALUE too: positions=generated max_new_tokens=60 strengths=[1,2,4]
    unit=norm max_kl=0.3 neutral=news.txt hook_point=model.layers.7:out dtype=float32.
    """
    if is_config(path):
        given = {"--latent": latent, "--prompt": prompt, "--model": model}
        given |= {"--chat": chat, "--sweep": sweep, "--force": force}
        given |= {"--read-out": read_out != "linear"}
        if used := [name for name, value in given.items() if value]:
            raise ConfigError(f"{used[0]} must stand beside a dictionary, got the config {path}")
        run_to("steer", path, overrides)
        return
    named = {"latents": latent or [], "prompts": prompt, "model": model, "output": output}
    options = {key: value for key, value in named.items() if value is not None}
    options |= {key: True for key, is_set in (("chat", chat), ("force", force)) if is_set}
    options |= {"read_out": read_out} if read_out != "linear" else {}
    request = load_overrides(SteerRequest, overrides or [], {**options, "sweep": sweep})
    from sae.run.context import with_differences
    from sae.run.steering import continuations, placed_in_model, sweep_latent

    where = (request.model, request.dtype, request.hook_point)
    dictionary, loaded, differs = placed_in_model(
        path, *where, force=request.force, read_out=request.read_out
    )
    if sweep:
        with console.step("sweep") as progress:
            swept = sweep_latent(path, dictionary, loaded, request, progress)
        name = f"steer-{Path(path).name}-{swept.latent}"
        section = swept._replace(differs=differs).write(Path(request.output or name))
        console.table(section.title, section.table)
        return
    for text in continuations(dictionary, loaded, request):
        note = (
            f"{', '.join(request.latents)} ran on {text.n_chosen} tokens and changed "
            f"{text.n_changed}, by {text.relative_size:.2f} of the stream's norm"
        )
        note = with_differences(note, {path: differs} if differs else {})
        console.side_by_side(text.prompt, ("base", text.base), ("steered", text.steered), note)


def find(  # noqa: PLR0913
    path: Annotated[str, typer.Argument(metavar="DICT", help="A dictionary.")],
    overrides: Overrides = None,
    pos: Annotated[list[str] | None, typer.Option(help="A text in which it fires.")] = None,
    neg: Annotated[list[str] | None, typer.Option(help="A text in which it does not.")] = None,
    near: Annotated[int | None, typer.Option(help="Neighbours of this latent.")] = None,
    prompt: Annotated[str | None, typer.Option(help="With target=: what it depends on.")] = None,
    model: Annotated[str | None, typer.Option(help="If the dictionary does not name it.")] = None,
    force: ForceOption = False,
) -> None:
    """Find latents: by texts (--pos, --neg), near another one (--near), behind a prediction.

    KEY=VALUE: n=20 where=last among=OTHER_DICT target=" Paris" against=" Rome" hook_point=...
    """
    named = {"pos": pos, "neg": neg, "near": near, "prompt": prompt, "model": model}
    options = {key: value for key, value in named.items() if value is not None}
    options |= {"force": True} if force else {}
    request = load_overrides(FindRequest, overrides or [], options)
    from sae.run.finding import find_latents_of

    matches = find_latents_of(path, request, console.step)
    console.table(matches.title, matches.table)
