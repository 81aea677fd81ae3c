"""YAML 1.2 for configuration files: plain data in, plain data out, nothing executed.

PyYAML reads YAML 1.1, where `3e-3` is text and `no` is false. Here the scalars are those of YAML
1.2's core schema (https://yaml.org/spec/1.2.2, section 10.3.2). Keys are text, written once per
mapping; tags and aliases are refused, so a file is never larger than it looks.
"""

import re
from typing import Any, ClassVar

import yaml

from monosema.checks import MonosemaError

_NULL, _BOOL, _INT, _FLOAT = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")
)
_SCALARS = (
    (_NULL, r"~|null|Null|NULL|", "~nN"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)
_RESOLVERS = {
    first: [
        (tag, re.compile(rf"(?:{form})\Z")) for tag, form, firsts in _SCALARS if first in firsts
    ]
    for first in "~nNtTfF-+.0123456789"
} | {"": [(_NULL, re.compile(r"\Z"))]}
"""What PyYAML asks for: first character of a plain scalar -> (tag, form) to try in turn."""

DEEPEST = 32
"""Levels of nesting that are read; a recipe has six."""
_INT_LIMIT = 2**63


class YAMLProblem(MonosemaError):
    """A text is not the YAML that we read; the message says where and why, in one line."""


def parse(text: str) -> object:
    """Return the one document of `text` as dict, list, str, int, float, bool and None.

    Raises:
        YAMLProblem: If it is not YAML, or uses what a configuration has no need of.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _plain(node)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        text = problem.problem or "not YAML"
        if text.startswith("but ") and problem.context:
            text = f"{problem.context}, {text}"
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise YAMLProblem(where + text) from None
    except yaml.reader.ReaderError as problem:
        raise YAMLProblem(
            f"character {problem.position + 1}: {chr(problem.character)!a} is not allowed"
        ) from None
    except (ValueError, OverflowError):  # PyYAML's own, of "\UFFFFFFFF" or "%YAML 9999...9.1"
        raise YAMLProblem("an escape or a directive has a number that is too large") from None


def render(data: object) -> str:
    """Return `data` as YAML that `parse` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with the scalars of YAML 1.2, without tags and aliases."""

    yaml_implicit_resolvers: ClassVar = _RESOLVERS
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem(event.start_mark, "an alias must be written out")
        if getattr(event, "tag", None) is not None:
            raise _problem(event.start_mark, "a tag must be left out")
        if self.depth >= DEEPEST:
            raise _problem(event.start_mark, f"at most {DEEPEST} levels of nesting are read")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's emitter; it quotes what `_Loader` would not read as the same text."""

    yaml_implicit_resolvers: ClassVar = _RESOLVERS

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Left to itself, PyYAML writes some line breaks (U+0085) so that they are lost.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _plain(node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return _scalar(node)


def _mapping(node: yaml.MappingNode) -> dict[str, object]:
    data = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem(key.start_mark, "a key must be a single word")
        name = _text(key)
        if name in data:
            raise _problem(key.start_mark, f"the key {name[:80]!r} is there twice")
        data[name] = _plain(value)
    return data


def _scalar(node: yaml.Node) -> object:
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return node.value.lower() == "true"
    if node.tag == _INT:
        return _integer(node)
    if node.tag == _FLOAT:
        return float(re.sub(r"\.(?=[iInN])", "", node.value))  # .inf, .nan
    return _text(node)


def _integer(node: yaml.Node) -> int:
    base = {"0o": 8, "0x": 16}.get(node.value[:2], 10)
    # Python refuses to read thousands of digits, so the length is looked at first.
    value = int(node.value, base) if len(node.value) <= 100 else _INT_LIMIT
    if not -_INT_LIMIT <= value < _INT_LIMIT:
        raise _problem(node.start_mark, "an integer must fit in 64 bits")
    return value


def _text(node: yaml.Node) -> str:
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise _problem(node.start_mark, "text must be Unicode, not half of a surrogate pair")
    return node.value


def _problem(mark: yaml.Mark, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)
