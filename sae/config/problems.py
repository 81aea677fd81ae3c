"""The line that a person reads: `FILE: dotted.key must RULE, got VALUE`."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from sae.config.schema import Keys, Node, choices, expected, hints, kinds, members, one_of

_WIDTH = 80
"""Characters of a value that are echoed."""


class ConfigError(ValueError):
    """A configuration cannot be used; the message is one line that says where and why."""


class Problem(NamedTuple):
    """What is wrong at one place; `text` follows the dotted key."""

    keys: Keys
    text: str
    meant: Keys | None = None
    """Where the value probably belongs, if its key is misspelt."""


def find_problems(nodes: Mapping[Keys, Node], error: ValidationError | None) -> list[Problem]:
    """Return what is wrong, one problem a place, in the order of the file.

    Args:
        nodes: The values that the schema knows of, by their keys.
        error: What pydantic found; None if it found nothing.
    """
    found = {keys: problem for keys, node in nodes.items() for problem in _of_kind(keys, node)}
    for detail in [] if error is None else error.errors(include_url=False):
        keys = _locate(detail["loc"][1:], nodes)
        if keys is not None:
            problem = _translate(keys, detail, nodes)
            found.setdefault(problem.keys, problem)
    meant = {problem.meant for problem in found.values()}
    kept = [problem for problem in found.values() if problem.keys not in meant]
    return sorted(kept, key=lambda problem: _position(nodes[()].value, problem.keys))


def dotted(keys: Keys) -> str:
    """Return keys as they are written in an override."""
    return ".".join(shorten(printable(str(key))) for key in keys) or "the top level"


def show(value: object) -> str:
    """Return a value of a file in few characters of one line."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return shorten(repr(value))


def printable(text: str) -> str:
    """Return text with every character that is not printable written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shorten(text: str, width: int = _WIDTH) -> str:
    """Return at most `width` characters of a text."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _of_kind(keys: Keys, node: Node) -> Iterator[Problem]:
    """Check what pydantic does not: that a union's value says which member it is."""
    known = list(kinds(node.annotation))
    if not known or node.member is not None:
        return
    if not isinstance(node.value, dict):
        if node.value is not None or not _takes_none(node.annotation):
            yield _wrong(keys, node)
    elif "kind" not in node.value:
        yield Problem((*keys, "kind"), f" is missing; it must be {one_of(known)}")
    else:
        kind = node.value["kind"]
        hint = _did_you_mean(kind, known)
        yield Problem((*keys, "kind"), f" must be {one_of(known)}, got {show(kind)}{hint}")


def _takes_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _locate(location: Iterable[str | int], nodes: Mapping[Keys, Node]) -> Keys | None:
    """Return the place of an error without the names of unions' members that pydantic puts in.

    None means an error that says nothing: of a member of a union that is not meant.
    """
    keys = ()
    parts = iter(location)
    for part in parts:
        node = nodes.get(keys)
        if node is not None and len(members(node.annotation)) > 1:
            if not kinds(node.annotation):
                return keys
            if node.member is None or part != node.member.__name__:
                return None
            part = next(parts, None)
            if part is None:
                return keys
        keys = (*keys, part)
    return keys


def _translate(keys: Keys, detail: Any, nodes: Mapping[Keys, Node]) -> Problem:
    match detail["type"]:
        case "unexpected_keyword_argument":
            return _unknown(keys, nodes[keys[:-1]])
        case "missing" if is_dataclass(nodes[keys[:-1]].member):
            annotation = hints(nodes[keys[:-1]].member)[str(keys[-1])]
            return Problem(keys, f" is missing; it must be {expected(annotation)}")
        case "value_error":
            return _checked(keys, str(detail["ctx"]["error"]), nodes[keys])
        case "finite_number":
            return Problem(keys, f" must be a finite number, got {show(nodes[keys].value)}")
    while keys not in nodes:
        keys = keys[:-1]
    return _wrong(keys, nodes[keys])


def _wrong(keys: Keys, node: Node) -> Problem:
    hint = _did_you_mean(node.value, choices(node.annotation))
    return Problem(keys, f" must be {expected(node.annotation)}, got {show(node.value)}{hint}")


def _unknown(keys: Keys, parent: Node) -> Problem:
    name, known = keys[-1], list(hints(parent.member))
    kind = next((k for k, m in kinds(parent.annotation).items() if m is parent.member), None)
    owner = f"a key of {kind or dotted(keys[:-1])}" if keys[1:] else "a top-level key"
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there {_are(known)}"
    return Problem(keys, f" is not {owner}; {hint}", (*keys[:-1], near[0]) if near else None)


def _are(known: list[str]) -> str:
    return f"{'is' if len(known) == 1 else 'are'} {', '.join(map(repr, known)) or 'none'}"


def _did_you_mean(value: object, known: list[str]) -> str:
    if len(known) < 2 or not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _checked(keys: Keys, message: str, node: Node) -> Problem:
    """Put the place before the message of a dataclass's own check: "FIELD must ..., got ..."."""
    field, _, rest = printable(message).partition(" ")
    head, got, value = rest.partition(", got ")
    value, semicolon, advice = value.partition("; ")
    text = (
        shorten(head, 2 * _WIDTH) + got + shorten(value) + semicolon + shorten(advice, 2 * _WIDTH)
    )
    path = field.split(".")
    if path[0] not in hints(node.member):
        return Problem(keys, f": {field} {text}")
    return Problem((*keys, *(int(part) if part.isdecimal() else part for part in path)), f" {text}")


def _position(value: object, keys: Keys) -> tuple[int, ...]:
    """Where a place comes in the file; what is missing comes after what is there."""
    order = []
    for key in keys:
        if isinstance(value, list) and isinstance(key, int):
            order.append(key)
            value = value[key] if key < len(value) else None
        elif isinstance(value, dict):
            order.append(list(value).index(key) if key in value else len(value))
            value = value.get(key)
    return tuple(order)
