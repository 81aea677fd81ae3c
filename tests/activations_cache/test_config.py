"""Configurations refuse what cannot work, field name first, before anything is loaded."""

import subprocess
import sys

import pytest

from activations_cache.config import (
    CacheConfig,
    ModelConfig,
    TextConfig,
    TextSource,
    parse_hook_point,
)

SOURCE = TextSource(path="a.txt")
TEXT = TextConfig(sources=(SOURCE,), context=31)
MODEL = ModelConfig(path="org/name")


def cache_config(**changes: object) -> CacheConfig:
    fields = {"model": MODEL, "text": TEXT, "hook_points": ("model.layers.2:out",), "n_rows": 7}
    return CacheConfig(**{**fields, **changes})


def test_config_imports_neither_torch_nor_numpy():
    code = (
        "import sys, activations_cache.config, activations_cache.checks;"
        "assert not {'torch', 'numpy', 'transformers', 'zarr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dtype_is_checked_without_a_type_checker():
    # In a process of its own, as the import hook of the tests refuses the literal earlier.
    code = "from activations_cache.config import *; ModelConfig(path='org/name', dtype='float16')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last_line = done.stderr.splitlines()[-1]
    rule = "dtype must be one of bfloat16, float32, got 'float16'"
    assert last_line == f"monosema.checks.MonosemaError: {rule}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path must not be empty, got ''"),
        ({"path": "package://"}, "path must have the form package://PACKAGE/inner/path"),
        ({"path": "package://only"}, "path must have the form package://PACKAGE/inner/path"),
        ({"sha256": "ABC"}, "sha256 must be 64 lower-case hexadecimal digits, got 'ABC'"),
        ({"path": "a.gguf", "revision": "main"}, "revision must be absent where path is a file"),
    ],
)
def test_model_config_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        ModelConfig(**{"path": "org/name", **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "a.csv"}, "path must end in .txt, .jsonl, .parquet or .arrow (or these + .gz)"),
        ({"path": "a.gz"}, "path must end in .txt, .jsonl, .parquet or .arrow (or these + .gz)"),
        ({"share": 0.0}, "share must be a positive number, got 0.0"),
        ({"share": float("nan")}, "share must be a positive number, got nan"),
        ({"share": float("inf")}, "share must be a positive number, got inf"),
        ({"path": "a.jsonl", "field": ""}, "field must not be empty"),
        ({"label": "kind"}, "label must be absent for plain text, got 'kind'"),
        ({"path": "a.jsonl", "document_pattern": "X"}, "document_pattern must be absent for"),
        ({"document_pattern": "("}, "document_pattern must be a regular expression, got '('"),
    ],
)
def test_text_source_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        TextSource(**{"path": "a.txt", **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources must name at least one source, got ()"),
        ({"sources": (SOURCE, SOURCE)}, "sources must differ from each other"),
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"score": -0.1}, "score must be at least 0, got -0.1"),
        ({"explain": 0.7}, "explain must sum to 1 together with score and hold, got 1.1"),
        ({"explain": float("nan")}, "explain must be at least 0, got nan"),
        ({"explain": 0.0, "score": 0.0, "hold": 1.0}, "hold must leave documents to explain"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_text_config_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        TextConfig(**{"sources": (SOURCE,), **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_points": ()}, "hook_points must name at least one, got ()"),
        ({"hook_points": ("a:in", "a:in")}, "hook_points must differ from each other"),
        ({"hook_points": ("model.layers.2",)}, "hook_points must have the form '<module path>:"),
        ({"n_rows": 0}, "n_rows must be at least 1, got 0"),
        ({"skip_positions": -1}, "skip_positions must be at least 0, got -1"),
        ({"skip_positions": 31}, "skip_positions must be less than text.context=31, got 31"),
        ({"rows_per_shard": 30}, "rows_per_shard must be at least 31, got 30"),
        ({"contexts_per_forward": 0}, "contexts_per_forward must be at least 1, got 0"),
    ],
)
def test_cache_config_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=r".+ must .+") as error:
        cache_config(**changes)
    assert str(error.value).startswith(message)


def test_bounds_themselves_are_accepted():
    config = cache_config(skip_positions=30, rows_per_shard=31, n_rows=1)
    assert (config.skip_positions, config.rows_per_shard) == (30, 31)
    thirds = TextConfig(sources=(SOURCE,), explain=1 / 3, score=1 / 3, hold=1 / 3)
    assert thirds.context == 256
    assert TextSource(path="package://sae/demo_data/austen.txt.gz").share == 1.0


@pytest.mark.parametrize(
    "bad", ["a", "a:", ":in", "a:out ", "a..b:in", "a:input", "a b:in", ".a:in"]
)
def test_hook_point_form_is_strict(bad: str):
    with pytest.raises(ValueError, match="hook_points must have the form"):
        parse_hook_point(bad)


def test_hook_point_is_split():
    assert parse_hook_point("model.layers.15:out") == ("model.layers.15", "out")
    assert parse_hook_point("lm_head:in") == ("lm_head", "in")
