"""What a tree of stdlib dataclasses says of the values in a file: their types, kinds and words.

A union of dataclasses that all have a field `kind: Literal[...]` is told apart by that field. One
of them may have `IMPLIED: ClassVar[bool] = True`: it is meant where no kind is given.

The line that a person reads: `FILE: dotted.key must RULE, got VALUE`.
"""

import ast
import difflib
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from monosema.checks import MonosemaError

Keys = tuple[str | int, ...]
"""Where a value stands: the keys and list indices from the top."""

_WORDS = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
    Any: "anything",
}


class Node(NamedTuple):
    """A value, what the schema says of it, and the member of a union that it is meant to be.

    `member` is None where the annotation is a union and the value does not tell which is meant.
    """

    annotation: Any
    member: Any
    value: object


class Key(NamedTuple):
    """One key of a schema, for people: dotted path, type, default and meaning."""

    path: str
    type: str
    default: str
    doc: str


def walk(annotation: Any, value: object, keys: Keys = ()) -> Iterator[tuple[Keys, Node]]:
    """Go through the values that the schema knows of, in the order of the file."""
    kind = value.get("kind") if isinstance(value, dict) else None
    options = members(annotation)
    if isinstance(value, dict) and "kind" not in value:
        kind = implied(annotation)
    named = kinds(annotation).get(kind) if isinstance(kind, str) else None
    node = Node(annotation, options[0] if len(options) == 1 else named, value)
    yield keys, node
    for key, child_annotation, child in _children(node):
        yield from walk(child_annotation, child, (*keys, key))


def rename(schema: Any, data: object) -> None:
    """Give keys that have a former name, in place, the one that they have now."""
    for _, node in list(walk(schema, data)):
        if is_dataclass(node.member) and isinstance(node.value, dict):
            now = {former(field): field.name for field in fields(node.member)}
            given = dict(node.value)
            node.value.clear()
            for key, value in given.items():
                new = now.get(key, key)
                node.value[key if new in given else new] = value


def former(field: Field) -> str:
    """Return the name that a key of a configuration had at first."""
    return field.metadata.get("formerly", field.name)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union without None; of anything else, itself."""
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    return tuple(member for member in get_args(annotation) if member is not NoneType)


@functools.cache
def kinds(annotation: Any) -> dict[str, type]:
    """Return the members of a union by their `kind`; nothing if it is not told apart so."""
    options = members(annotation)
    if len(options) < 2 or not all(is_dataclass(m) and "kind" in hints(m) for m in options):
        return {}
    return {kind: member for member in options for kind in get_args(hints(member)["kind"])}


@functools.cache
def implied(annotation: Any) -> str | None:
    """Return the kind that is meant where none is given, if there is one."""
    result = (k for k, member in kinds(annotation).items() if getattr(member, "IMPLIED", False))
    return next(result, None)


@functools.cache
def hints(schema: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields, in their order."""
    resolved = get_type_hints(schema)
    return {field.name: resolved[field.name] for field in fields(schema) if field.init}


def expected(annotation: Any) -> str:
    """Say in words which values a type takes: `an integer or null`."""
    options = members(annotation)
    null = (
        ["null"] if get_origin(annotation) in (Union, UnionType) and _has_none(annotation) else []
    )
    words = dict.fromkeys(_word(option) for option in options)  # once each, in order
    return " or ".join([*words, *null])


def choices(annotation: Any) -> list[str]:
    """Return the texts that a Literal, alone or in a union, allows."""
    literals = [m for m in members(annotation) if get_origin(m) is Literal]
    return [value for m in literals for value in get_args(m) if isinstance(value, str)]


def one_of(values: list[Any]) -> str:
    """Return `'a'` or `one of 'a', 'b'`."""
    quoted = ", ".join(map(repr, values))
    return quoted if len(values) == 1 else f"one of {quoted}"


def describe(schema: Any, prefix: str = "") -> list[Key]:
    """Return every key of a schema with its type, default and the text under its field.

    NAME stands for a key that the user chooses, N for an index, `(kind)` for a union's member.
    """
    docs = _field_docs(schema)
    keys = []
    for field in fields(schema):
        annotation, path = hints(schema)[field.name], prefix + field.name
        keys.append(Key(path, expected(annotation), _default(field), docs.get(field.name, "")))
        for suffix, nested in _nested(annotation):
            keys += describe(nested, f"{path}{suffix}.")
    return keys


def _children(node: Node) -> Iterator[tuple[str | int, Any, object]]:
    arguments = get_args(node.member)
    if isinstance(node.value, dict):
        known = hints(node.member) if is_dataclass(node.member) else {}
        for key, value in node.value.items():
            if key in known:
                yield key, known[key], value
            elif get_origin(node.member) is dict:
                yield key, arguments[1], value
    elif isinstance(node.value, list) and get_origin(node.member) in (tuple, list):
        is_fixed = get_origin(node.member) is tuple and ... not in arguments
        each = arguments if is_fixed else arguments[:1] * len(node.value)
        for index, (child, value) in enumerate(zip(each, node.value, strict=False)):
            yield index, child, value


def _has_none(annotation: Any) -> bool:
    return NoneType in get_args(annotation)


def _word(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return one_of(list(arguments))
    if origin is tuple and ... not in arguments:
        return f"a list of {len(arguments)}"
    if origin in (tuple, list):
        return "a list"
    if origin is dict or is_dataclass(annotation):
        return "a mapping"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _nested(annotation: Any) -> Iterator[tuple[str, Any]]:
    for member in members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if is_dataclass(member):
            kind = next((k for k, m in kinds(annotation).items() if m is member), None)
            yield f"({kind})" if kind else "", member
        elif origin in (tuple, list):
            yield from ((".N" + suffix, nested) for suffix, nested in _nested(arguments[0]))
        elif origin is dict:
            yield from ((".NAME" + suffix, nested) for suffix, nested in _nested(arguments[1]))


def _default(field: Field) -> str:
    if field.default_factory is not MISSING:
        return "its own defaults"
    if field.default is MISSING:
        return "required"
    return "its own defaults" if is_dataclass(field.default) else repr(field.default)


def _field_docs(schema: type) -> dict[str, str]:
    """Return the string literals that stand under the fields of a class and of those it extends."""
    docs = {}
    for part in reversed(schema.__mro__):
        if not is_dataclass(part):
            continue
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        for above, below in itertools.pairwise(ast.iter_child_nodes(definition)):
            match above, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=text)),
                ):
                    docs[name] = inspect.cleandoc(str(text))
    return docs


_WIDTH = 80
"""Characters of a value that are echoed."""


class ConfigError(MonosemaError):
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
    results = {keys: problem for keys, node in nodes.items() for problem in _of_kind(keys, node)}
    for detail in [] if error is None else error.errors(include_url=False):
        keys = _locate(detail["loc"][1:], nodes)
        if keys is not None:
            problem = _translate(keys, detail, nodes)
            results.setdefault(problem.keys, problem)
    meant = {problem.meant for problem in results.values()}
    problems_left = [problem for problem in results.values() if problem.keys not in meant]
    return sorted(problems_left, key=lambda problem: _position(nodes[()].value, problem.keys))


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
