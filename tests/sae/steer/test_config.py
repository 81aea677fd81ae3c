import re

import pytest

from sae.run.config import ConceptsRequest
from sae.steer.config import (
    Ablate,
    Add,
    Cap,
    Clamp,
    FindRequest,
    Floor,
    Scale,
    SteerConfig,
    SteerRequest,
    SteerWordsRequest,
    strength,
)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (Clamp, {"latent": -1, "value": 1.0}, r"^latent must be at least 0, got -1$"),
        (Clamp, {"latent": 1, "value": float("nan")}, r"^value must be a finite number, got nan$"),
        (Add, {"latent": 1, "value": float("inf")}, r"^value must be a finite number, got inf$"),
        (Cap, {"latent": 1, "value": float("inf")}, r"^value must be a finite number, got inf$"),
        (Floor, {"latent": -1, "value": 1.0}, r"^latent must be at least 0, got -1$"),
        (Scale, {"latent": 1, "factor": float("nan")}, r"^factor must be a finite number"),
        (Ablate, {"latent": -3}, r"^latent must be at least 0, got -3$"),
        (SteerConfig, {"latent": -3}, r"^latent must be at least 0, got -3$"),
        (SteerConfig, {"prompt": ""}, r"^prompt must not be empty, got ''$"),
        (SteerConfig, {"max_new_tokens": 0}, r"^max_new_tokens must be at least 1, got 0$"),
        (SteerConfig, {"n_candidates": 0}, r"^n_candidates must be at least 1, got 0$"),
        (SteerConfig, {"strength": float("inf")}, r"^strength must be a finite number, got inf$"),
        (
            ConceptsRequest,
            {"concepts": "x", "target": "a"},
            r"^prompts must hold at least two",
        ),
        (SteerWordsRequest, {"words": ("a",)}, r"^amplify must be given, or calibrate: one of"),
        (
            SteerWordsRequest,
            {"words": ("a",), "amplify": "1x", "calibrate": "1x"},
            r"one of them, got \['amplify', 'calibrate'\]",
        ),
        (SteerWordsRequest, {"words": (" ",), "amplify": "1x"}, r"^words must name at least one"),
        (
            SteerWordsRequest,
            {"words": ("a",), "calibrate": "-1x"},
            r"^calibrate must be above 0, got -1",
        ),
        (
            SteerWordsRequest,
            {"words": ("a",), "amplify": "1x norm"},
            r"^amplify must be a number, or one in units of max",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("make", "given", "unread", "reader"),
    [
        (SteerRequest, {"latents": ("7=2x",)}, {"strengths": (1.0,)}, "--sweep"),
        (SteerRequest, {"latents": ("7=2x",)}, {"unit": "norm"}, "--sweep"),
        (SteerRequest, {"latents": ("7=2x",)}, {"output": "out"}, "--sweep"),
        (FindRequest, {"near": 3}, {"where": "last"}, "pos"),
        (FindRequest, {"near": 3}, {"model": "m"}, "pos"),
        (FindRequest, {"near": 3}, {"n_ablated": 5}, "prompt"),
        (FindRequest, {"pos": ("a",)}, {"among": "other"}, "near"),
        (FindRequest, {"pos": ("a",)}, {"target": " b"}, "prompt"),
        (FindRequest, {"pos": ("a",)}, {"baselines": ("zero",)}, "prompt"),
        (FindRequest, {"prompt": "a", "target": " b"}, {"where": "last"}, "pos"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(make, given, unread, reader):
    make(**given)
    [(name, value)] = unread.items()
    rule = re.escape(f"{name} must stand beside {reader}, which reads it, got {value!r}")
    with pytest.raises(ValueError, match=rule):
        make(**given, **unread)


@pytest.mark.parametrize(
    ("given", "value", "unit"),
    [
        (4.5, 4.5, "absolute"),
        (-2, -2.0, "absolute"),
        ("3.25", 3.25, "absolute"),
        ("10x max", 10.0, "max"),
        ("10x", 10.0, "max"),
        ("-2.5xmax", -2.5, "max"),
        ("+1e-1x norm", 0.1, "norm"),
        (" 0.5 x norm ", 0.5, "norm"),
    ],
)
def test_strengths(given, value, unit):
    assert strength("clamp", given) == (value, unit)


@pytest.mark.parametrize("given", ["10x mean", "10 max", "ten", "", "1.2.3", "x", "nan"])
def test_a_strength_in_an_unknown_unit_is_refused(given):
    with pytest.raises(
        ValueError, match=r"^clamp must be a number, or one in units of max or norm"
    ):
        strength("clamp", given)


def test_a_strength_must_be_finite():
    with pytest.raises(ValueError, match=r"^add must be a finite number, got inf$"):
        strength("add", float("inf"))
    with pytest.raises(ValueError, match=r"^add must be a number, .* got '1e999'"):
        strength("add", "1e999")
