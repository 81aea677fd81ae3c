"""A browser of made-up data with every part that it can have, of any size.

`python -m benchmarks.browser_example OUT [--latents N] [--payload TEXT]` writes the folder. What is
measured of the browser is measured on it, and its tests put their texts in every place of it.
"""

import argparse
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image as Pictures

from sae.browser import (
    Column,
    Completeness,
    Curve,
    Dictionary,
    Example,
    Histogram,
    Image,
    Latent,
    Map,
    PlaneMap,
    ResultTable,
    ShownAttribution,
    ShownComparison,
    ShownExplanation,
    ShownScore,
    Site,
    SteeringExample,
    write_site,
)

WORDS = """river music winter letter garden copper engine silver market window doctor summer forest
number Paris ocean theorem violin railway harvest comet parliament sugar bridge mountain"""
FILLER = "the of and a to in is that it was for on as with by at from his an were"
GRID = (4, 5)
DEAD, RARE = 11, 7


def example_site(n_latents: int = 251, payload: str | None = None, seed: int = 0) -> Site:
    """Three dictionaries, one of them of pictures; the payload stands wherever a text can stand."""
    generator = random.Random(seed)
    text = payload if payload is not None else "topk"
    n_small = max(7, n_latents // 4)
    names = (text, f"{text} (small)", "pictures")
    facts = ((text, text), ("hook point", "model.layers.15:out"))
    return Site(
        title=payload if payload is not None else "An example",
        subtitle=payload if payload is not None else "Made-up figures in every place.",
        facts=facts,
        dictionaries=(
            _dictionary(names[0], n_latents, payload, generator),
            _dictionary(names[1], n_small, payload, generator),
            _dictionary(names[2], 29, payload, generator, kind="image"),
        ),
        results=ResultTable(
            ("dictionary", "FVU", "L0", text),
            ((names[0], "0.210", "32.0", "1.0%"), (f"random {text}", "0.771", "32.0", "0.0%")),
            f"10,007 held-out rows; {text}",
        ),
        curves=tuple(
            Curve(
                name,
                tuple(range(1000, 30_000, 1000)),
                {
                    "FVU": tuple(0.2 + 0.7 * math.exp(-i / 6) for i in range(29)),
                    text: tuple(32 + generator.gauss(0, 1) for _ in range(29)),
                },
            )
            for name in names[:2]
        ),
        steering=(SteeringExample(names[0], 2, text, 8.0, text, text, f"{text} on", text),),
        comparisons=(_comparison(names[0], names[1], n_latents, n_small, generator),),
        cautions=(
            payload or "A label says with which words of these texts a latent goes together.",
        ),
        pictures=tuple((number, _picture(number)) for number in range(13)),
    )


def _dictionary(
    name: str, n: int, payload: str | None, generator: random.Random, kind: str = "text"
) -> Dictionary:
    n_dead = len(range(5, n, DEAD))
    said = payload or "words"
    return Dictionary(
        name=name,
        summary=payload or f"TopK, {n:,} latents",
        d_sae=n,
        n_rows=100_003,
        n_live=n - n_dead,
        n_dead=n_dead,
        n_dense=3,
        kind="image" if kind == "image" else "text",
        facts=(("recipe", said),),
        columns=(
            Column("auc", "AUC", "score", 0.5, f"how well the label tells {said} apart"),
            Column("detection", payload or "detection", "score", 0.5),
            Column("n_fired", "firings", "count"),
        ),
        density_histogram=Histogram(
            tuple(-5 + i / 2 for i in range(11)), (1, 2, 7, 20, 44, 70, 60, 30, 9, 2), log10=True
        ),
        latents=_Latents(n, payload, kind, generator.randrange(1 << 30)),
        map=Map(
            tuple(
                PlaneMap(
                    method,
                    tuple(generator.gauss(i % 3, 0.4) for i in range(n)),
                    tuple(generator.gauss(i % 2, 0.4) for i in range(n)),
                    f"distances mean little; {said}",
                )
                for method in ("t-SNE", "PCA")
            ),
            (said, "places", "numbers"),
            tuple(i % 4 - 1 for i in range(n)),
        ),
        completeness=Completeness(
            tuple((10**-e, 1 / (1 + 10 ** (e - 4)), 20) for e in (2.0, 3.0, 4.0, 5.0)),
            1e-4, 8e-5, 1.3e-4, 1.0, 1.1, 80, f"a concept is {said}",
        ),
    )  # fmt: skip


class _Latents:
    """Made when they are asked for, so that hundreds of thousands need no memory."""

    def __init__(self, n: int, payload: str | None, kind: str, seed: int) -> None:
        self.arguments = (n, payload, kind, seed)

    def __iter__(self) -> Iterator[Latent]:
        n, payload, kind, seed = self.arguments
        generator = random.Random(seed)
        for number in range(n):
            yield _latent(number, n, payload, kind, generator)


def _word(number: int) -> str:
    known = WORDS.split()
    return known[number % len(known)]


def _latent(number: int, n: int, payload: str | None, kind: str, r: random.Random) -> Latent:
    if number % DEAD == 5:
        return Latent(number, "dead", 0.0, 0.0, 0)
    first, second = _word(number), _word(number * 7)
    label = payload if payload is not None else f"{first}, {second}"
    n_fired = r.randrange(5, 20_000)
    largest, auc = r.uniform(2, 20), r.uniform(0.55, 0.99)
    is_scored = number % RARE != 3
    said = payload if payload is not None else first
    made = [_example(kind, said, largest * (1 - i / 12), r) for i in range(11)]
    return Latent(
        number=number,
        status="scored" if is_scored else "insufficient",
        density=n_fired / 100_003,
        max_activation=largest,
        n_fired=n_fired,
        label=label,
        label_kind=payload or "word",
        figures={"auc": auc, "detection": auc - 0.05, "n_fired": float(n_fired)}
        if is_scored
        else {},
        explanations=(
            ShownExplanation(said if payload else f"Mentions of {first}.", payload or "LM"),
        ),
        scores=_scores(auc, payload) if is_scored else (),
        histogram=tuple(int(1000 * math.exp(-i / 3)) for i in range(20)),
        words=((said, 4.5), (second, 1.25)),
        promoted=((f" {said}", 2.5), ("s", None)),
        suppressed=(("ing", -1.5), (f" {said}", -1.0)),
        examples=tuple(made),
        nearest=tuple((r.randrange(n), 0.9 - i / 10) for i in range(5)),
        cofiring=tuple((r.randrange(n), 0.4 - i / 20, 100 - i) for i in range(5)),
        attributions=_attributions(said) if kind == "text" else (),
        command=f"sae steer runs/demo/train/topk --latent {number} # {said}",
    )


def _figures(auc: float, n_fired: int) -> dict[str, float | None]:
    return {"auc": auc, "detection": auc - 0.05, "n_fired": float(n_fired)}


def _scores(auc: float, payload: str | None) -> tuple[ShownScore, ...]:
    control = payload or "another latent's label"
    return (
        ShownScore("AUC", auc, auc - 0.04, min(1.0, auc + 0.03), 0.5, 40),
        ShownScore("AUC", 0.51, 0.44, 0.58, 0.5, 40, control),
        ShownScore(payload or "detection", auc - 0.05, auc - 0.12, auc, 0.5, 20),
        ShownScore("intruder", None, floor=0.2, note=payload or "too few examples"),
    )


def _example(kind: str, said: str, peak: float, r: random.Random) -> Example:
    if kind == "image":
        number, n = r.randrange(13), GRID[0] * GRID[1]
        values = [max(0.0, r.gauss(-0.5, 0.5)) * peak / 4 for _ in range(n)]
        top = r.randrange(n)
        values[top] = peak
        image = Image(number, f"{said} {number}.png", GRID, 80, 64)
        return Example((), tuple(values), top, "drawings", image)
    tokens = [
        f" {word}" if i % 3 else word for i, word in enumerate(r.choices(FILLER.split(), k=32))
    ]
    top = r.randrange(4, 28)
    tokens[top] = f" {said}"
    tokens[top + 2] = "\n"
    values = [0.0] * 32
    values[top], values[top + 1] = peak, peak * 0.3
    return Example(tuple(tokens), tuple(values), top, f"book of {said}")


def _attributions(said: str) -> tuple[ShownAttribution, ...]:
    tokens = ("It", " is", f" {said}", ".")
    return (ShownAttribution(tokens, (0.0, -0.1, 0.75, 0.01), f" {said}", 0.7, said),)


def _comparison(a: str, b: str, n_a: int, n_b: int, r: random.Random) -> ShownComparison:
    in_b = tuple((i % n_b, r.uniform(0.2, 0.99)) for i in range(n_a))
    in_a = tuple((i, r.uniform(0.4, 0.99)) for i in range(n_b))
    return ShownComparison(a, b, in_b, in_a, 0.5, 0.21, "Cosines of decoder rows.")


def _picture(number: int) -> bytes:
    target = io.BytesIO()
    colour = (40 + 15 * number, 200 - 12 * number, 120)
    Pictures.new("RGB", (80, 64), colour).save(target, "JPEG")
    return target.getvalue()


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--latents", type=int, default=251)
    parser.add_argument("--payload")
    asked = parser.parse_args()
    write_site(example_site(asked.latents, asked.payload), asked.out)


if __name__ == "__main__":
    main()
