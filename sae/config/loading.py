"""Read a YAML file into a frozen dataclass, and write it back.

The schema is a tree of stdlib dataclasses that know nothing of this module. pydantic checks it
(strict, unknown keys forbidden, no nan or inf) and builds it; the messages are our own. A `grid:`
in an entry of a mapping, lists of values by dotted key, makes one entry for each choice.
"""

import copy
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from types import GenericAlias
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from monosema.checks import MonosemaError
from sae.config.schema import (
    ConfigError,
    Keys,
    Problem,
    dotted,
    find_problems,
    former,
    hints,
    implied,
    printable,
    rename,
    show,
    walk,
)
from sae.config.yaml12 import DEEPEST, YAMLProblem, parse, render

LARGEST = 256
"""Entries that one grid may give."""


class GridEntry(NamedTuple):
    """Where an entry that a grid gave was written."""

    keys: Keys
    """The entry in the file."""
    varied: tuple[str, ...]
    """The dotted keys of its grid."""

    def of(self, rest: Keys) -> Keys:
        """Where in the file the fault lies of a wrong value at these keys of the entry."""
        for key in self.varied:
            parts = tuple(key.split("."))
            if all(a == b for a, b in zip(parts, rest, strict=False)) and rest:
                return (*self.keys, "grid", key)
        return (*self.keys, *rest)


class BadGrid(MonosemaError):
    """A grid that cannot be expanded."""

    def __init__(self, problem: Problem) -> None:
        """Take what is wrong, and where."""
        super().__init__(problem.text)
        self.problem = problem


def expand(schema: Any, data: object) -> dict[Keys, GridEntry]:
    """Replace each entry that has a grid by one for each choice, in place; where these came from.

    Only the values of mappings whose schema has a key `grid` are entries.

    Raises:
        BadGrid: For the first grid that cannot be expanded.
    """
    results: dict[Keys, GridEntry] = {}
    for keys, node in list(walk(schema, data)):
        if isinstance(node.value, dict) and _has_entries(node.member):
            entries = _expanded(keys, node.value, results)
            node.value.clear()
            node.value.update(entries)
    return results


def _expanded(
    keys: Keys, written: dict[str, Any], results: dict[Keys, GridEntry]
) -> dict[str, Any]:
    """The entries of one mapping; what grids gave is added to `found`."""
    entries: dict[str, Any] = {}
    for name, entry in written.items():
        grid = entry.get("grid") if isinstance(entry, dict) else None
        for each, made in [(name, entry)] if grid is None else _entries(keys, name, entry):
            if each in entries or (each != name and each in written):
                _refuse((*keys, name, "grid"), "make names of its own", each)
            entries[each] = made
            if grid is not None:
                results[*keys, each] = GridEntry((*keys, name), tuple(grid))
    return entries


def moved(problem: Problem, places: Mapping[Keys, GridEntry]) -> Problem:
    """The problem where the file has it."""
    for keys, place in places.items():
        if problem.keys[: len(keys)] == keys:
            return problem._replace(keys=place.of(problem.keys[len(keys) :]))
    return problem


def _has_entries(member: Any) -> bool:
    arguments = get_args(member)
    is_mapping = get_origin(member) is dict and is_dataclass(arguments[1])
    return is_mapping and "grid" in hints(arguments[1])


def _entries(keys: Keys, name: str, entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names and values of all choices, the last key varying fastest."""
    grid, at = entry["grid"], (*keys, name, "grid")
    if not isinstance(grid, dict) or not grid:
        _refuse(at, "be a mapping of dotted keys to lists", grid)
    n = 1
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            _refuse((*at, key), "be a list of at least one value", values)
        if any(value in values[:i] for i, value in enumerate(values)):
            _refuse((*at, key), "have no value twice", values)
        n *= len(values)
    if n > LARGEST:
        _refuse(at, f"give at most {LARGEST} dictionaries", n)
    labels = _labels(list(grid))
    for choice in itertools.product(*(enumerate(values, 1) for values in grid.values())):
        made = copy.deepcopy({key: value for key, value in entry.items() if key != "grid"})
        parts = [name]
        for (key, label), (number, value) in zip(labels.items(), choice, strict=True):
            _set(made, key, copy.deepcopy(value), (*at, key))
            parts.append(label + _word(value, number))
        yield "-".join(parts), made


def _labels(keys: list[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if last.count(name) == 1 else key.replace(".", "_")
        for key, name in zip(keys, last, strict=True)
    }


def _word(value: object, number: int) -> str:
    """A value in letters, digits, - and _: 16, 1e-3, true; the number of any other."""
    if isinstance(value, bool):
        return f"_{str(value).lower()}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        whole = "-" * (value < 0) + "".join(map(str, digits))
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{whole}e{exponent}"
    is_word = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]+", value)
    return f"_{value}" if is_word else f"_{number}"


def _set(entry: dict[str, Any], key: str, value: object, at: Keys) -> None:
    """Set a value by its dotted key; mappings that are absent on the way are made."""
    *parents, last = key.split(".")
    here: Any = entry
    for part in parents:
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
        if not isinstance(here, dict):
            _refuse(at, f"name a key inside mappings, and {part} is none", here)
    here[last] = value


def _refuse(keys: Keys, rule: str, got: object) -> None:
    raise BadGrid(Problem(keys, f" must {rule}, got {show(got)}"))


T = TypeVar("T")

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_LARGEST_FILE = 2**20


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Return the configuration that the YAML file `path` and the overrides describe.

    Args:
        schema: A frozen dataclass; nested ones, unions, tuples, dicts, Literal and None may occur.
        path: A UTF-8 file of at most 1 MiB.
        overrides: `dotted.key=value`; the value is YAML, an item of a list is named by its index.
            A later override wins. A mapping that is absent on the way is made.

    Raises:
        ConfigError: For the first problem in the order of the file, with the number of others.
    """
    data = read(path)
    origins = {override(data, text): f"override {show(text)}" for text in overrides}
    return _build(schema, data, printable(str(path)), origins)


def load_overrides(
    schema: type[T], overrides: Sequence[str], options: Mapping[str, object] | None = None
) -> T:
    """Return the configuration that overrides alone describe; what they leave out has its default.

    Args:
        schema: As for `load`.
        overrides: As for `load`.
        options: What a command's own options say, as plain data; overrides come after them.

    Raises:
        ConfigError: As `load`.
    """
    data: dict[str, object] = to_dict(options or {})
    origins = {override(data, text): f"override {show(text)}" for text in overrides}
    return _build(schema, data, "command line", origins)


def from_dict(schema: type[T], data: Mapping[str, object], label: str) -> T:
    """Return the configuration that plain data describe, as `to_dict` made them.

    Raises:
        ConfigError: As `load`; `label` stands where the file's name would.
    """
    return _build(schema, to_dict(data), printable(label), {})


def to_dict(config: object, *, all_keys: bool = True) -> Any:
    """Return a configuration as plain data: dict, list, str, int, float, bool and None.

    Args:
        config: The configuration.
        all_keys: False leaves out keys that came later and have their default, and gives renamed
            keys their former names, so that what was made before is recognised.

    Raises:
        TypeError: If it holds anything else.
    """
    if is_dataclass(config):
        given = ((field, getattr(config, field.name)) for field in fields(config))
        return {
            field.name if all_keys else former(field): to_dict(value, all_keys=all_keys)
            for field, value in given
            if all_keys or not field.metadata.get("later") or value != field.default
        }
    if isinstance(config, Mapping):
        return {str(key): to_dict(value, all_keys=all_keys) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(item, all_keys=all_keys) for item in config]
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, str | int | float):
        return config
    raise TypeError(f"a configuration must hold plain data, got {type(config).__name__}")


def dump(config: object) -> str:
    """Return a configuration as YAML; `load` reads it back as an equal configuration."""
    return render(to_dict(config))


def digest(config: object) -> str:
    """Return the SHA-256 of a configuration or of plain data, in hexadecimal.

    It depends neither on the order of keys nor on whether 1 or 1.0 was written.
    """
    canonical = json.dumps(_whole(to_dict(config, all_keys=False)), sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _whole(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _whole(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_whole(item) for item in data]
    return int(data) if isinstance(data, float) and data.is_integer() else data


def read(path: str | Path) -> dict[str, object]:
    """Return the mapping that a YAML file holds, as yet unchecked.

    Raises:
        ConfigError: If it cannot be read, is longer than 1 MiB, is not YAML, or is no mapping.
    """
    file = printable(str(path))
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
        too_long = len(content) > _LARGEST_FILE
        data = None if too_long else parse(content.decode())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except OSError as problem:
        raise ConfigError(f"{file}: cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{file}: must be UTF-8, byte {problem.start + 1} is not") from None
    except ValueError as problem:  # not YAML, or a path that no file can have
        raise ConfigError(f"{file}: {printable(str(problem))}") from None
    if too_long:
        raise ConfigError(f"{file}: must be at most {_LARGEST_FILE} bytes, got more")
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: the top level must be a mapping, got {show(data)}")
    return data


def override(data: dict[str, object], text: str) -> Keys:
    """Set one value in `data` by `dotted.key=value`.

    Returns:
        The keys of the topmost value that is new by it.

    Raises:
        ConfigError: If the text has another form, or its keys lead through what is no mapping.
    """
    label = f"override {show(text)}"
    path, equals, value = text.partition("=")
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"{label}: must have the form dotted.key=value")
    if len(parents) >= DEEPEST:
        raise ConfigError(f"{label}: must have at most {DEEPEST} keys, got more")
    here: Any = data
    keys: Keys = ()
    made: Keys = ()
    for part in parents:
        key = _key(here, part, keys, label)
        keys = (*keys, key)
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
            made = made or keys
        here = here[key]
        if not isinstance(here, dict | list):
            raise ConfigError(f"{label}: {dotted(keys)} must be a mapping, got {show(here)}")
    key = _key(here, last, keys, label)
    try:
        here[key] = parse(value)
    except YAMLProblem as problem:
        raise ConfigError(f"{label}: {printable(str(problem))}") from None
    return made or (*keys, key)


def _key(container: Any, part: str, keys: Keys, label: str) -> Any:
    if isinstance(container, dict):
        return part
    if part not in map(str, range(len(container))):
        rule = f"must be an index below {len(container)}"
        raise ConfigError(f"{label}: {dotted((*keys, part))} {rule}")
    return int(part)


@functools.cache
def _adapter(schema: type) -> TypeAdapter:
    # Around a tuple, because only then do the settings reach stdlib dataclasses, at every depth.
    around: Any = GenericAlias(tuple, (schema,))
    return TypeAdapter(around, config=_STRICT)


def _build(schema: type[T], data: object, file: str, origins: Mapping[Keys, str]) -> T:
    rename(schema, data)
    try:
        places = expand(schema, data)
    except BadGrid as bad:
        raise ConfigError(_line([bad.problem], file, origins)) from None
    nodes = dict(walk(schema, data))
    for node in nodes.values():
        if isinstance(node.value, dict) and "kind" not in node.value and implied(node.annotation):
            node.value["kind"] = implied(node.annotation)
    built, error = None, None
    try:
        built = _adapter(schema).validate_json(json.dumps([data]))
    except ValidationError as invalid:
        error = invalid
    problems = find_problems(nodes, error)
    if built is not None and not problems:
        return built[0]
    raise ConfigError(_line([moved(problem, places) for problem in problems], file, origins))


def _line(problems: list[Problem], file: str, origins: Mapping[Keys, str]) -> str:
    """The first problem, with the number of others."""
    first, *others = problems
    blamed = [text for keys, text in origins.items() if _touch(keys, first.keys)]
    label = blamed[-1] if blamed else file
    more = f" (and {len(others)} more)" if others else ""
    return f"{label}: {dotted(first.keys)}{first.text}{more}"


def _touch(changed: Keys, wrong: Keys) -> bool:
    """Whether a value that an override set is the wrong one, or one is inside the other."""
    return bool(wrong) and all(a == b for a, b in zip(changed, wrong, strict=False))
