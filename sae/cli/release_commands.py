"""`sae inspect`, `sae convert`, `sae push`, `sae verify-release` and `sae releases`."""

from typing import Annotated

import typer

from sae.cli import console
from sae.cli.request import ForceOption

Dictionary = Annotated[
    str, typer.Argument(metavar="DICT", help="A directory, a file, org/name, or RELEASE:ID.")
]
Format = Annotated[str | None, typer.Option(help="The format, where two fit.")]
AllowPt = Annotated[bool, typer.Option(help="Read a pickle in a closed process.")]


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A directory, org/name, or RELEASE:ID.")
    ],
    format: Format = None,
    allow_pt: AllowPt = False,
) -> None:
    """Print what a dictionary is and how it will be applied."""
    from sae.run.releases import inspect as inspect_dictionary

    console.facts(inspect_dictionary(path, format=format, allow_pt=allow_pt))


def convert(
    source: Dictionary,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The directory to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="monosema, saelens, sparsify, dictionary_learning, saebench, circuit_tracer, "
            "neuronpedia."
        ),
    ] = "monosema",
    format: Format = None,
    allow_pt: AllowPt = False,
    model: Annotated[
        str | None, typer.Option(help="neuronpedia: whose tokens each latent promotes.")
    ] = None,
) -> None:
    """Write a dictionary in another format, exactly, or say why that format cannot hold it."""
    from sae.run.releases import convert as convert_dictionary

    facts = convert_dictionary(source, target, to, format=format, allow_pt=allow_pt, model=model)
    console.facts(facts)


def push(
    source: Annotated[str, typer.Argument(metavar="DICT", help="A directory of our own format.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="org/name of the hub, or org/name/subfolder.")
    ],
    licence: Annotated[str, typer.Option(help="As the hub names it, such as apache-2.0.")],
    model: Annotated[str, typer.Option(help="The model it reads, a name of the hub.")],
    hook_point: Annotated[
        str | None, typer.Option(help="The place in the model, where the dictionary has no name.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="report.json of `sae evaluate`; that of the run if absent.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Put a dictionary and a card on the Hugging Face hub, with the token of its own client."""
    from sae.run.context import FactTable
    from sae.run.releases import push as push_dictionary

    pushed = push_dictionary(
        source, repo, licence=licence, model=model, hook_point=hook_point, metrics=metrics,
        public=public,
    )  # fmt: skip
    files = [("file", name) for name in pushed.files]
    console.facts(FactTable("pushed", [("name", pushed.name), *files]))


def verify_release(  # noqa: PLR0913
    source: Dictionary,
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Rows of the model it is for.")],
    hook_points: Annotated[
        str | None, typer.Option(help="READ, or READ,PREDICTED of a transcoder.")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="l0=50,fvu=0.2 or one of them; else the L0 in its files.")
    ] = None,
    rows: Annotated[int, typer.Option(min=64, help="Rows to measure on.")] = 2048,
    format: Format = None,
    allow_pt: AllowPt = False,
    force: ForceOption = False,
) -> None:
    """Say which reading of a release meets its published figures on real rows."""
    from sae.run.releases import verify_release as verify_readings

    verified = verify_readings(
        source, cache, hook_points=hook_points, figures=published, rows=rows, format=format,
        allow_pt=allow_pt, force=force,
    )  # fmt: skip
    console.table(verified.section.title, verified.section.table)
    meeting = ", ".join(verified.meeting) or "no reading"
    console.say(f"meets the published figures: {meeting}")
    raise typer.Exit(0 if verified.meeting else 1)


def releases(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORDS]...", help="A part of a name, layer_20, 16k; each must fit."
        ),
    ] = None,
) -> None:
    """List public dictionaries by name, e.g. sae releases gemma-2-2b layer_20 16k; no network."""
    from sae.browser import ResultTable
    from sae.pretrained import catalogue

    columns, rows, note = catalogue.table(words or [])
    console.table("public dictionaries", ResultTable(columns, rows, note))
    console.data(lambda: [{"name": e.name} | e._asdict() for e in catalogue.search(words or [])])
