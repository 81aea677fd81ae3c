"""The scalars of YAML 1.2, and that what is written is read back."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.config.yaml12 import YAMLProblem, parse, render


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 0.003),
        ("1e3", 1000.0),
        ("1.5E+3", 1500.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("0", 0),
        ("-17", -17),
        ("+3", 3),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("tRUE", "tRUE"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-11-05", "2026-11-05"),
        ("0b1", "0b1"),
        (".", "."),
        ("-", [None]),
        ("1e", "1e"),
        ("nan", "nan"),
        ("=", "="),
        ("'1'", "1"),
        ('"true"', "true"),
        ("[1, a, [~]]", [1, "a", [None]]),
        ("{a: 1, 2: b, true: c}", {"a": 1, "2": "b", "true": "c"}),
        ("# only a comment", None),
        ("\ufeffa: 1", {"a": 1}),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_parse(text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)


def test_parse_nan():
    assert math.isnan(parse(".nan"))


@pytest.mark.parametrize("text", ["9" * 20, "-9223372036854775809", "9" * 5000, "0x" + "f" * 5000])
def test_an_integer_beyond_64_bits_is_refused(text):
    with pytest.raises(YAMLProblem, match="line 1, column 4: an integer must fit in 64 bits"):
        parse(f"a: {text}" if len(text) > 5 else "")


def test_a_file_that_would_grow_is_refused():
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
    with pytest.raises(YAMLProblem, match="line 2, column 10: an alias must be written out"):
        parse(f"a0: &a0 [lol]\n{laughs}")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=20)
    | st.sampled_from([
        "1e3",
        "3e-3",
        "no",
        "null",
        "~",
        "",
        " ",
        "0x1",
        ".inf",
        "a: b",
        "- a",
        "#",
    ]),
    lambda child: (
        st.lists(child, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), child, max_size=4)
    ),
    max_leaves=12,
)


@given(plain)
def test_render_is_read_back(data):
    again = parse(render(data))
    assert again == data
    assert repr(again) == repr(data)


@given(st.text(max_size=60) | st.text("{}[]:,-?&*!|>'\"%@#\n\t ab01.~\\x", max_size=60))
def test_parse_returns_plain_data_or_raises_one_thing(text):
    try:
        data = parse(text)
    except YAMLProblem as problem:
        data = str(problem)
    assert json.loads(json.dumps(data)) == data or "nan" in repr(data)
