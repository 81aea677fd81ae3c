"""`sae steer`: of a config, the step of a run; of a dictionary, text and sweeps."""

from typing import Annotated

import typer

from sae.cli.request import Overrides, run_to
from sae.config import ConfigError, is_config, load_overrides
from sae.steer.config import SteerRequest


def steer(
    path: Annotated[
        str, typer.Argument(metavar="CONFIG|DICT", help="A YAML file, a recipe, or a dictionary.")
    ],
    overrides: Overrides = None,
    latent: Annotated[
        list[str] | None, typer.Option(help="NUMBER=CHANGE: 123=10x, =+2x, =*3, =off; repeatable.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What is continued; repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="If the dictionary does not name it.")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try many strengths and plot them.")
    ] = False,
    output: Annotated[str | None, typer.Option(help="Directory of a sweep's results.")] = None,
) -> None:
    """Generate with latents changed: of a run's config after explaining, or of a dictionary.

    A dictionary takes KEY=VALUE too: positions=generated max_new_tokens=60 strengths=[1,2,4]
    unit=norm max_kl=0.3 neutral=news.txt hook_point=model.layers.7:out dtype=float32.
    """
    if is_config(path):
        given = {"--latent": latent, "--prompt": prompt, "--model": model, "--sweep": sweep}
        if used := [name for name, value in given.items() if value]:
            raise ConfigError(f"{used[0]} must stand beside a dictionary, got the config {path}")
        run_to("steer", path, overrides)
        return
    named = {"latents": latent or [], "prompts": prompt, "model": model, "output": output}
    options = {key: value for key, value in named.items() if value is not None}
    request = load_overrides(SteerRequest, overrides or [], {**options, "sweep": sweep})
    from sae.cli.steer_dictionary import steer_dictionary

    steer_dictionary(path, request)
