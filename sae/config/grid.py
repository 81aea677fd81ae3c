"""`grid:` in an entry of a mapping: lists of values by dotted key give one entry a choice."""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from decimal import Decimal
from typing import Any, NamedTuple, get_args, get_origin

from monosema.checks import MonosemaError
from sae.config.schema import Keys, Problem, hints, show, walk

LARGEST = 256
"""Entries that one grid may give."""


class Place(NamedTuple):
    """Where an entry that a grid gave was written."""

    keys: Keys
    """The entry in the file."""
    varied: tuple[str, ...]
    """The dotted keys of its grid."""

    def of(self, rest: Keys) -> Keys:
        """Where in the file the fault lies of a wrong value at these keys of the entry."""
        for dotted in self.varied:
            parts = tuple(dotted.split("."))
            if all(a == b for a, b in zip(parts, rest, strict=False)) and rest:
                return (*self.keys, "grid", dotted)
        return (*self.keys, *rest)


class BadGrid(MonosemaError):
    """A grid that cannot be expanded."""

    def __init__(self, problem: Problem) -> None:
        """Take what is wrong, and where."""
        super().__init__(problem.text)
        self.problem = problem


def expand(schema: Any, data: object) -> dict[Keys, Place]:
    """Replace each entry that has a grid by one for each choice, in place; where these came from.

    Only the values of mappings whose schema has a key `grid` are entries.

    Raises:
        BadGrid: For the first grid that cannot be expanded.
    """
    found: dict[Keys, Place] = {}
    for keys, node in list(walk(schema, data)):
        if isinstance(node.value, dict) and _has_entries(node.member):
            entries = _expanded(keys, node.value, found)
            node.value.clear()
            node.value.update(entries)
    return found


def _expanded(keys: Keys, written: dict[str, Any], found: dict[Keys, Place]) -> dict[str, Any]:
    """The entries of one mapping; what grids gave is added to `found`."""
    entries: dict[str, Any] = {}
    for name, entry in written.items():
        grid = entry.get("grid") if isinstance(entry, dict) else None
        for each, made in [(name, entry)] if grid is None else _entries(keys, name, entry):
            if each in entries or (each != name and each in written):
                _refuse((*keys, name, "grid"), "make names of its own", each)
            entries[each] = made
            if grid is not None:
                found[*keys, each] = Place((*keys, name), tuple(grid))
    return entries


def moved(problem: Problem, places: Mapping[Keys, Place]) -> Problem:
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
    for dotted, values in grid.items():
        if not isinstance(values, list) or not values:
            _refuse((*at, dotted), "be a list of at least one value", values)
        if any(value in values[:i] for i, value in enumerate(values)):
            _refuse((*at, dotted), "have no value twice", values)
        n *= len(values)
    if n > LARGEST:
        _refuse(at, f"give at most {LARGEST} dictionaries", n)
    labels = _labels(list(grid))
    for choice in itertools.product(*(enumerate(values, 1) for values in grid.values())):
        made = copy.deepcopy({key: value for key, value in entry.items() if key != "grid"})
        parts = [name]
        for (dotted, label), (number, value) in zip(labels.items(), choice, strict=True):
            _set(made, dotted, copy.deepcopy(value), (*at, dotted))
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


def _set(entry: dict[str, Any], dotted: str, value: object, at: Keys) -> None:
    """Set a value by its dotted key; mappings that are absent on the way are made."""
    *parents, last = dotted.split(".")
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
