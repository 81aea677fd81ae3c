"""Whatever is done to a valid file, the answer is a configuration or one line."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.config import ConfigError, dump, load, to_dict
from sae.config.yaml12 import parse, render

words = st.text(st.characters(codec="utf-8"), max_size=12)
values = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | words
    | st.sampled_from(["topk", "relu", "decoder", "float32", {}, [], {"kind": "topk"}, [[1]]])
    | st.lists(st.integers() | words, max_size=2).map(lambda items: [str(i) for i in items])
).map(copy.deepcopy)  # sampled_from gives the same object again, and mutated() writes into it


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.yaml"


def places(data: object, keys: tuple = ()) -> list[tuple]:
    """Every place of a tree, the top excepted."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    results = []
    for key, child in pairs:
        results.append((*keys, key))
        if isinstance(child, dict | list):
            results += places(child, (*keys, key))
    return results


def parent_of(data: object, keys: tuple) -> dict | list:
    for key in keys[:-1]:
        data = data[key]
    return data


@st.composite
def mutated(draw: st.DrawFn, valid: dict) -> dict:
    """A valid tree with one to three values replaced, removed, renamed or added."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        if not (result := places(data)):
            break
        keys = draw(st.sampled_from(result))
        parent = parent_of(data, keys)
        action = draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        if action == "replace":
            parent[keys[-1]] = draw(values)
        elif action == "remove":
            del parent[keys[-1]]
        elif isinstance(parent, dict):
            name = draw(words) if action == "add" else f"{keys[-1]}{draw(words)}"
            parent[name] = draw(values) if action == "add" else parent.pop(keys[-1])
    return data


def check_line(problem: ConfigError, labels: tuple[str, ...]) -> None:
    line = str(problem)
    assert line.isprintable()
    assert line.startswith(labels)
    assert len(line) < 800


def check_mutated(schema: SimpleNamespace, scratch: Path, data: st.DataObject) -> None:
    scratch.write_text(render(data.draw(mutated(parse(schema.VALID)))))
    try:
        run = load(schema.Run, scratch)
    except ConfigError as problem:
        check_line(problem, (f"{scratch}: ",))
    else:
        assert isinstance(run, schema.Run)
        scratch.write_text(dump(run))
        assert load(schema.Run, scratch) == run


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_in_one_line(schema, scratch, data):
    check_mutated(schema, scratch, data)


@settings(max_examples=3000)
@given(data=st.data())
def many_mutated_files(schema, scratch, data):
    check_mutated(schema, scratch, data)


@pytest.mark.long
def test_many_mutated_files_are_read_or_refused_in_one_line(schema, scratch, figure):
    many_mutated_files(schema, scratch)
    figure("C1", "3,000 mutated configs: read, or refused in one line with the key")


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(schema, scratch, data):
    content = bytearray(schema.VALID.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    scratch.write_bytes(content)
    try:
        load(schema.Run, scratch)
    except ConfigError as problem:
        check_line(problem, (f"{scratch}: ",))


@given(data=st.data())
def test_any_override_is_read_or_refused_in_one_line(schema, scratch, data):
    scratch.write_text(schema.VALID)
    known = [".".join(map(str, keys)) for keys in places(parse(schema.VALID))]
    key = data.draw(st.sampled_from(known) | st.text(".ab0-[]{}=", max_size=8) | words)
    text = f"{key}{data.draw(st.sampled_from(['=', '.x=', '.0=', '']))}{data.draw(words)}"
    try:
        load(schema.Run, scratch, [text])
    except ConfigError as problem:
        check_line(problem, (f"{scratch}: ", "override "))


@st.composite
def runs(draw: st.DrawFn, schema: SimpleNamespace) -> object:
    """A configuration that Python made: any text, any number."""
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    whole = st.integers(1, 2**63 - 1)
    relu = st.builds(schema.ReLU, limits=st.dictionaries(words, numbers, max_size=2))
    topk = st.builds(schema.TopK, k=st.integers(1, 5))
    dictionary = st.builds(
        schema.Dictionary,
        d_sae=st.integers(5, 2**40),
        activation=relu | topk,
        frozen=st.sampled_from(["decoder", None]),
        schedule=st.none() | relu | topk,
    )
    source = st.builds(schema.Source, path=words.filter(lambda t: t[:1] != "/"), share=numbers)
    sources = st.lists(source, max_size=3, unique_by=lambda source: source.path).map(tuple)
    return draw(
        st.builds(
            schema.Run,
            title=words,
            n_rows=whole,
            text=st.builds(schema.Text, sources=sources, context=st.integers(2, 2**62)),
            saes=st.dictionaries(words, dictionary, max_size=2),
            share=numbers,
            quick=st.booleans(),
            dtype=st.sampled_from(["bfloat16", "float32"]),
            hook_points=st.lists(words, max_size=2).map(tuple),
            betas=st.tuples(numbers, numbers),
            revision=st.none() | words,
            device=whole | words,
            cache=st.none() | st.just(Path("runs/cache")),
        )
    )


@given(data=st.data())
def test_dump_and_load_are_inverse(schema, scratch, data):
    run = data.draw(runs(schema))
    scratch.write_text(dump(run), encoding="utf-8")
    assert load(schema.Run, scratch) == run
    assert to_dict(load(schema.Run, scratch)) == to_dict(run)
