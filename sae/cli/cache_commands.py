"""`sae cache`: build one, look at one, import an array, list a model's sites."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from activations_cache.config import Dtype
from sae.cli.request import ConfigArgument, Overrides, checked_config
from sae.cli.run_config import CacheRunConfig

_BUILD = "build"
_ALIASES = {"--list-sites": "sites"}


class _Group(TyperGroup):
    """A group whose first word may also be a config file: then it is `build`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the command that is left out."""
        if args and args[0] in _ALIASES:
            args = [_ALIASES[args[0]], *args[1:]]
        elif args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [_BUILD, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Store a model's activations, or look at a cache: sae cache CONFIG [KEY=VALUE]...",
)


@app.command(name=_BUILD)
def build(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Run the model over the data and store its hook points; the word `build` may be left out."""
    checked = checked_config(CacheRunConfig, config, overrides)
    from sae.cli.caches import build_cache

    build_cache(checked)


@app.command()
def info(
    path: Annotated[str, typer.Argument(metavar="CACHE", help="A cache directory.")],
) -> None:
    """Print what a cache was made from and what its rows look like."""
    import activations_cache
    from sae.cli.caches import show_cache

    show_cache(activations_cache.open(path))


@app.command()
def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path or a hub id.")],
) -> None:
    """List the hook points of a model (`sae cache --list-sites MODEL` is the same)."""
    from sae.cli.caches import list_sites

    list_sites(model)


@app.command(name="import")
def import_(
    array: Annotated[
        str, typer.Argument(metavar="ARRAY", help=".npy, .safetensors[::NAME] or a Zarr array.")
    ],
    path: Annotated[str, typer.Argument(metavar="CACHE", help="The new cache's directory.")],
    hook_point: Annotated[str, typer.Option(help="How the rows are called.")] = "embedding:out",
    dtype: Annotated[Dtype, typer.Option(help="Number format of the rows.")] = "float32",
) -> None:
    """Turn an array of rows (embeddings, say) into a cache."""
    from sae.cli.caches import import_cache

    import_cache(array, path, hook_point, dtype)
