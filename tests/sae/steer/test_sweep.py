"""Which strength a sweep calls the largest that may be taken."""

from dataclasses import fields

import pytest

from sae.steer.sweep import Point, Sweep


def point(strength: float, kl: float, arm: str = "latent") -> Point:
    given = {"arm": arm, "strength": strength, "kl_neutral": kl, "text": ""}
    return Point(**{f.name: given.get(f.name, f.type(0)) for f in fields(Point)})


def found(*points: Point) -> Sweep:
    return Sweep(points=points, max_kl=0.5, perplexity_base=3.0, base="")


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(-2.0, 0.3), (1.0, 0.2), (2.0, 0.4)], 2.0),  # of two as large, the positive
        ([(-2.0, 0.3), (1.0, 0.2), (2.0, 0.6)], -2.0),
        ([(0.0, 0.0), (1.0, 0.5), (2.0, 0.51)], 1.0),  # the bound itself is within
    ],
)
def test_the_largest_strength_within_the_bound(points, best):
    assert found(*(point(*p) for p in points), point(8.0, 0.0, "random direction")).best == point(
        best, dict(points)[best]
    )


def test_no_strength_within_the_bound():
    assert found(point(1.0, 0.6)).best is None
