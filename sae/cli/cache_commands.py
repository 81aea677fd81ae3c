"""`sae cache` and `sae verify`: build one, look at one, import an array, list hook points.

`sae inspect`, `convert`, `push`, `verify-release` and `releases`: dictionaries of any format.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from activations_cache.config import Dtype
from sae.cli import console
from sae.cli.request import ConfigArgument, ForceOption, Overrides, checked_config, with_json
from sae.run.config import CacheRunConfig

_BUILD = "build"
_FORMER = ("sites", "--list-sites")
"""What `hook-points` was called."""


class _Group(TyperGroup):
    """A group whose first word may also be a config file: then it is `build`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the command that is left out."""
        if args and args[0] in _FORMER:
            raise typer.BadParameter(
                f"the command must be `sae cache hook-points`, got {args[0]!r}, its former name"
            )
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [_BUILD, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Store a model's activations, or look at a cache: sae cache CONFIG [KEY=VALUE]...",
)


@app.command(name=_BUILD)
@with_json
def build(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Run the model over the data and store its hook points; the word `build` may be left out."""
    checked = checked_config(CacheRunConfig, config, overrides)
    import activations_cache

    path = checked.cache_path or Path(checked.output) / "cache"
    with console.step("cache") as progress:
        activations_cache.build(checked.cache, path, progress=progress)
    info(str(path))


@app.command()
@with_json
def info(
    path: Annotated[str, typer.Argument(metavar="CACHE", help="A cache directory.")],
) -> None:
    """Print what a cache was made from and what its rows look like."""
    import activations_cache
    from sae.run.caches import look_at

    cache = activations_cache.open(path)
    with console.step("look") as progress:
        facts = look_at(cache, progress)
    console.parts(facts)


@app.command(name="hook-points")
@with_json
def hook_points(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path or a hub id.")],
) -> None:
    """List the hook points of a model, and what is true of it."""
    from sae.run.caches import list_hook_points

    with console.step("load") as progress:
        listing = list_hook_points(model, progress)
    console.data(lambda: {"points": dict(listing.points), "record": dict(listing.record)})
    for name, note in listing.points:
        console.say(f"{name}  # {note}" if note else name)
    for subject, said in listing.record:
        console.say(f"# {subject}: {said}")


@app.command(name="import")
@with_json
def import_(
    array: Annotated[
        str,
        typer.Argument(metavar="ARRAY", help=".npy, .safetensors[::NAME], Zarr, or vLLM's files."),
    ],
    path: Annotated[str, typer.Argument(metavar="CACHE", help="The new cache's directory.")],
    hook_point: Annotated[str, typer.Option(help="How the rows are called.")] = "embedding:out",
    dtype: Annotated[Dtype, typer.Option(help="Number format of the rows.")] = "float32",
) -> None:
    """Turn an array of rows (embeddings, say) into a cache."""
    from sae.run.caches import import_rows

    with console.step("import") as progress:
        import_rows(array, path, hook_point=hook_point, dtype=dtype, progress=progress)
    info(path)


def verify(
    path: Annotated[str, typer.Argument(metavar="CACHE", help="A cache directory.")],
    model: Annotated[
        bool, typer.Option("--model", help="Also compute 64 random rows again.")
    ] = False,
    model_path: Annotated[
        str | None, typer.Option(help="Where the model is now, if it has moved.")
    ] = None,
    mend: Annotated[
        bool, typer.Option("--mend", help="Have damaged parts written anew by `sae cache`.")
    ] = False,
) -> None:
    """Check every committed file of a cache by its checksum, and its rows by the model."""
    from sae.run.caches import damage_of, reopen

    if mend:
        damage = damage_of(path, console.step)
        for line in damage:
            console.error(line)
        if damage:
            reopen(path)
            console.say(f"{path}: run the command that built it again: it mends what is damaged")
            return
    import activations_cache
    from sae.run.caches import verify_cache

    cache, with_model = activations_cache.open(path), model or bool(model_path)
    problems = verify_cache(cache, with_model=with_model, moved=model_path, steps=console.step)
    for problem in problems:
        console.error(problem)
    if problems:
        raise typer.Exit(1)
    also = ", 64 of them computed again" if with_model else ""
    console.say(
        f"{path}: {cache.n_rows:,} rows in {len(cache.hook_points)} hook points, whole{also}"
    )


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
