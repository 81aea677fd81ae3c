"""`sae refine`: set a dictionary's refined read-out, and fit a linear encoder to it."""

from typing import Annotated

import typer

from sae.cli import console
from sae.cli.request import ForceOption


def refine(
    path: Annotated[str, typer.Argument(metavar="DICT", help="A dictionary.")],
    cache: Annotated[str, typer.Option("--cache", metavar="CACHE", help="What it was trained on.")],
    hook_point: Annotated[
        str | None, typer.Option(help="Of the cache, where DICT names none.")
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Training rows that are read.")] = 16_384,
    distil: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also fit a linear encoder to it, and write it here."),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Set the refined read-out of a dictionary: which latents stay after a second encoding.

    It lies beside the dictionary, or for one of another library in the user's cache, and is used
    where --read-out refined is given. The dictionary itself is not changed.
    """
    from sae.run.refining import distil as distil_to
    from sae.run.refining import refine as refine_on

    with console.step("refine") as progress:
        refined = refine_on(
            path, cache, hook_point=hook_point, rows=rows, force=force, progress=progress
        )
    console.table(refined.section.title, refined.section.table)
    if distil is None:
        return
    with console.step("distil") as progress:
        made = distil_to(path, cache, distil, hook_point=hook_point, force=force, progress=progress)
    console.table("distilled", made.section.table)
