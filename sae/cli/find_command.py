"""`sae find`: latents by texts, by neighbours, or by what a prediction depends on."""

from typing import Annotated

import typer

from sae.cli.request import Overrides
from sae.config import load_overrides
from sae.steer.config import FindRequest


def find(
    path: Annotated[str, typer.Argument(metavar="DICT", help="A dictionary.")],
    overrides: Overrides = None,
    pos: Annotated[list[str] | None, typer.Option(help="A text in which it fires.")] = None,
    neg: Annotated[list[str] | None, typer.Option(help="A text in which it does not.")] = None,
    near: Annotated[int | None, typer.Option(help="Neighbours of this latent.")] = None,
    prompt: Annotated[str | None, typer.Option(help="With target=: what it depends on.")] = None,
    model: Annotated[str | None, typer.Option(help="If the dictionary does not name it.")] = None,
) -> None:
    """Find latents: by texts (--pos, --neg), near another one (--near), behind a prediction.

    KEY=VALUE: n=20 where=last among=OTHER_DICT target=" Paris" against=" Rome" hook_point=...
    """
    named = {"pos": pos, "neg": neg, "near": near, "prompt": prompt, "model": model}
    options = {key: value for key, value in named.items() if value is not None}
    request = load_overrides(FindRequest, overrides or [], options)
    from sae.cli.find_latents import find_latents_of

    find_latents_of(path, request)
