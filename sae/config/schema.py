"""What a tree of stdlib dataclasses says of the values in a file: their types, kinds and words.

A union of dataclasses that all have a field `kind: Literal[...]` is told apart by that field. One
of them may have `IMPLIED: ClassVar[bool] = True`: it is meant where no kind is given.
"""

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

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
    found = (k for k, member in kinds(annotation).items() if getattr(member, "IMPLIED", False))
    return next(found, None)


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
