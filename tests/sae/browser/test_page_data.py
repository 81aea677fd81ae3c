"""What does not fit together is refused with the field, the rule and the value."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from sae.browser import (
    Context,
    Curve,
    DictionaryPage,
    Histogram,
    LatentPage,
    PageData,
    ResultTable,
    SteeringExample,
)

CONTEXT = Context(("a", " b", " c"), (0.0, 2.0, 1.0), 1, "somewhere")
LATENT = LatentPage(
    5,
    "b",
    "word",
    0.75,
    0.5,
    1.0,
    "scored",
    0.25,
    2.0,
    (("b", 1.5),),
    (" b",),
    (),
    (CONTEXT,),
    (3,),
)
HISTOGRAM = Histogram((-2.0, -1.0, 0.0), (7, 4), log10=True)
DICTIONARY = DictionaryPage("topk", "", 13, 1009, 11, 2, HISTOGRAM, (LATENT,))
CURVE = Curve("topk", (7, 11), {"FVU": (0.5, math.nan)})
STEERING = SteeringExample("topk", 5, "b", -2.0, "I", " am", " b")
PAGE = PageData("t", "", (), ResultTable((), (), ""), (), (DICTIONARY,), (), ())


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (CONTEXT, {"activations": (1.0, 2.0)}, r"activations must have one value per token \(3\)"),
        (CONTEXT, {"activations": (0.0, -2.0, 1.0)}, r"at least 0, got -2\.0"),
        (CONTEXT, {"activations": (0.0, math.inf, 1.0)}, r"activations must be finite .* got inf"),
        (CONTEXT, {"peak": 3}, r"peak must be the index of one of the 3 tokens, got 3"),
        (CONTEXT, {"peak": -1}, r"peak must .* got -1"),
        (CONTEXT, {"tokens": (), "activations": (), "peak": 0}, r"one of the 0 tokens, got 0"),
        (LATENT, {"latent": -1}, r"latent must be at least 0, got -1"),
        (LATENT, {"auc": 1.5}, r"auc must lie between 0 and 1, got 1\.5"),
        (LATENT, {"auc": math.nan}, r"auc must lie between 0 and 1, got nan"),
        (LATENT, {"auc": None}, r'auc must be a number where status is "scored", got None'),
        (LATENT, {"auc_low": 0.875, "auc_high": 0.75}, r"auc_low must be at most auc_high=0\.75"),
        (LATENT, {"density": -0.5}, r"density must lie between 0 and 1, got -0\.5"),
        (LATENT, {"max_activation": math.nan}, r"max_activation must be finite .* got nan"),
        (LATENT, {"histogram": (3, -1)}, r"histogram must be finite and at least 0, got -1"),
        (LATENT, {"words": (("b", math.inf),)}, r"weight of word 'b' must be finite, got inf"),
        (HISTOGRAM, {"edges": (-1.0, 0.0)}, r"edges must be one more than counts \(2\), got 2"),
        (HISTOGRAM, {"edges": (-1.0, -1.0, 0.0)}, r"edges must ascend strictly"),
        (HISTOGRAM, {"edges": (-math.inf, -1.0, 0.0)}, r"edges must be finite"),
        (HISTOGRAM, {"counts": (7, -4)}, r"counts must be .* at least 0, got -4"),
        (DICTIONARY, {"name": ""}, r"name must not be empty, got ''"),
        (DICTIONARY, {"n_dead": 3}, r"add up to d_sae=13, got \(11, 3\)"),
        (DICTIONARY, {"latents": (LATENT, LATENT)}, r"latents' numbers must be unique, got 5"),
        (DICTIONARY, {"d_sae": 5, "n_live": 3}, r"latents' numbers must be below d_sae=5, got 5"),
        (CURVE, {"steps": (11, 7)}, r"steps must ascend, got \(11, 7\)"),
        (CURVE, {"values": {"L0": (1.0,)}}, r"values\['L0'\] must have one value per step \(2\)"),
        (STEERING, {"strength": math.inf}, r"strength must be finite, got inf"),
        (PAGE, {"dictionaries": (DICTIONARY, DICTIONARY)}, r"names must be unique, got 'topk'"),
    ],
)
def test_what_does_not_fit_is_refused(good: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_a_result_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match=r"rows must have one cell per column \(2\), got \('a',\)"):
        ResultTable(("dictionary", "FVU"), (("topk", "0.25"), ("a",)), "")


def test_status_is_one_of_two() -> None:
    # The type checker of the tests may be faster than our own check; both refuse.
    with pytest.raises((ValueError, TypeError), match="guessed"):
        replace(LATENT, status="guessed")  # pyright: ignore[reportArgumentType]


def test_an_unscored_latent_needs_no_score() -> None:
    page = replace(LATENT, status="insufficient", auc=None, auc_low=None, auc_high=None)
    assert page.auc is None


def test_the_data_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PAGE.title = "other"  # pyright: ignore[reportAttributeAccessIssue]
