"""Recipes: the YAML files that come with the package, by name, and their use on another model."""

import copy
import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.config.loading import override, read
from sae.config.schema import ConfigError, printable

RECIPES = Path(__file__).parents[1] / "recipes"
"""In a source tree a link to `configs/`, in an installed package the files themselves."""

_SUFFIXES = (".yaml", ".yml")
_PACKAGE = "package://"

_log = logging.getLogger(__name__)


def recipes() -> dict[str, str]:
    """Return each recipe's name and what it is: the first line of its file, a comment."""
    lines = {}
    for path in sorted(RECIPES.rglob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            name = path.relative_to(RECIPES).with_suffix("").as_posix()
            lines[name] = file.readline().strip("# \n")
    return lines


def is_config(text: str) -> bool:
    """Whether a word means a config: by the end of a file's name, or as a recipe.

    What lies on disk under the very word wins. What has a slash and is no recipe may be a name on
    the hub, and what has a colon a dictionary of a release; other words can only be recipes.
    """
    if text.endswith(_SUFFIXES):
        return True
    return not Path(text).exists() and (not set("/:") & set(text) or text in recipes())


def config_file(text: str) -> Path:
    """Return the file that a word names: the local file if there is one, else the recipe.

    Raises:
        ConfigError: If it is neither; the message has the nearest names.
    """
    path, known = Path(text), recipes()
    if text in known and not path.is_file():
        return RECIPES / f"{text}.yaml"
    if path.exists():
        return path
    # Who writes configs/demo.yaml where no such folder is means demo.
    meant = text.removesuffix(".yaml").removesuffix(".yml").removeprefix("configs/")
    nearest = difflib.get_close_matches(meant, known, n=3, cutoff=0.0)
    raise ConfigError(
        f"{printable(text)}: there is no such file and no such recipe; the nearest recipes are "
        f"{', '.join(nearest)} (`sae recipes` lists all)"
    )


def for_another_model(path: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides, after those that free a config from a package's model.

    The model of a package is one certain model. The hash, the title and the path of the cache that
    stand beside it are its own, and no other model's, unless an override names them.

    Args:
        path: The config.
        overrides: What the user asks for.
    """
    before = read(path)
    after: dict[str, Any] = copy.deepcopy(before)
    for text in overrides:
        override(after, text)
    old, new = _model_of(before), _model_of(after)
    if new == old or not isinstance(new, str) or not str(old).startswith(_PACKAGE):
        return [*overrides]
    hook_points = after["cache"].get("hook_points")
    places = ", ".join(map(str, hook_points)) if isinstance(hook_points, list) else hook_points
    title = f"{path.stem} on {Path(new).name}, {places}"
    freed = {"cache.model.sha256": "null", "title": json.dumps(title)}
    if "cache_path" in before:
        freed["cache_path"] = "null"
    given = {text.partition("=")[0] for text in overrides}
    _log.warning(
        "%s is written for %s; left out for another model: %s",
        path.name, old, ", ".join(key for key in freed if key not in given),
    )  # fmt: skip
    return [*(f"{key}={value}" for key, value in freed.items()), *overrides]


def _model_of(data: dict[str, Any]) -> object:
    model: object = data.get("cache")
    for key in ("model", "path"):
        model = model.get(key) if isinstance(model, dict) else None
    return model
