"""The data files of one dictionary: its table, its search lines, and its latents in groups.

Tokens and sources of a group stand once, in its table of strings, the most frequent first. A file
is one statement of JavaScript that hands a JSON text over: pages opened from a disk may load
scripts and nothing else. The JSON stands in a string: it is parsed as JSON, in which no key has a
meaning, and faster than a program.
"""

import binascii
import json
import math
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from sae.browser.latent import STATUSES, Example, Latent
from sae.browser.site import Column

# Characters that end a string or a script element, turn the direction of the text around them, or
# cannot be written as UTF-8. In JSON they stand in strings only, so each may be escaped.
_UNSAFE = re.compile(
    "['<>&\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def script(key: str, value: object) -> str:
    """The text of the file `data/KEY.js`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).replace("\\", "\\\\")
    return f"MONOSEMA.put({json.dumps(key)},'{text}')\n"


def short(value: float | None) -> float | None:
    """Five digits: more than the browser shows."""
    return None if value is None else float(f"{value:.5g}")


def f32(values: Iterable[float | int]) -> str:
    """Base64 of 32-bit floats, little-endian."""
    return _base64(array("f", values))


def i32(values: Iterable[int]) -> str:
    """Base64 of 32-bit integers, little-endian."""
    return _base64(array("i", values))


def u8(values: Iterable[int]) -> str:
    """Base64 of bytes."""
    return _base64(array("B", values))


def _base64(numbers: array) -> str:
    if sys.byteorder == "big":
        numbers.byteswap()
    return binascii.b2a_base64(numbers.tobytes(), newline=False).decode("ascii")


LATENTS_PER_FILE = 64
LATENTS_PER_TABLE = 65_536


class Row(NamedTuple):
    """A latent as the table and the search know it."""

    label: str
    status: int
    """0 for a latent that is not browsed, else 1 + its place in STATUSES."""
    figures: tuple[float, ...]
    """Density, largest activation, then those of the columns; nan where there is none."""
    line: str
    """What a search looks through, lower-cased and on one line."""


def row(latent: Latent, columns: Sequence[Column]) -> Row:
    """A latent as the table and the search know it."""
    figures = [latent.density, latent.max_activation]
    figures += [latent.figures.get(column.id) for column in columns]
    known = tuple(math.nan if figure is None else figure for figure in figures)
    return Row(latent.label, 1 + STATUSES.index(latent.status), known, _line(latent))


def _line(latent: Latent) -> str:
    said = [latent.label, *(result.text for result in latent.explanations)]
    said += [text for text, _ in (*latent.words, *latent.promoted)]
    said += {e.tokens[e.peak]: None for e in latent.examples if e.tokens}
    said += {e.image.name: None for e in latent.examples if e.image}
    return " ".join(" ".join(said).lower().split())


def table(first: int, rows: Sequence[Row]) -> dict[str, object]:
    """The table's part that begins with latent `first`."""
    return {
        "first": first,
        "n": len(rows),
        "labels": [row.label for row in rows],
        "status": u8(row.status for row in rows),
        "columns": [f32(column) for column in zip(*(row.figures for row in rows), strict=True)],
    }


def search(first: int, rows: Sequence[Row]) -> dict[str, object]:
    """What a search of the same latents looks through."""
    return {"first": first, "n": len(rows), "text": "".join(f"{row.line}\n" for row in rows)}


def group(first: int, latents: Iterable[Latent]) -> dict:
    """One file of latents; `first` is the number of its first place."""
    known = {latent.number: latent for latent in latents}
    strings = _strings(known.values())
    places = range(first, first + LATENTS_PER_FILE)
    return {
        "first": first,
        "strings": list(strings),
        "latents": [_latent(known[n], strings) if n in known else None for n in places],
    }


def _strings(latents: Iterable[Latent]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for latent in latents:
        counts.update(text for text, _ in (*latent.promoted, *latent.suppressed))
        for example in latent.examples:
            counts.update(example.tokens)
            counts[example.source] += 1
            if example.image is not None:
                counts[example.image.name] += 1
        for attribution in latent.attributions:
            counts.update((*attribution.tokens, attribution.target))
    return {text: index for index, (text, _) in enumerate(counts.most_common())}


def _latent(latent: Latent, strings: dict[str, int]) -> dict[str, object]:
    def tokens(result: Iterable[tuple[str, float | None]]) -> list:
        return [(strings[text], short(logit)) for text, logit in result]

    return {
        "latent": latent.number,
        "status": latent.status,
        "label": latent.label,
        "label_kind": latent.label_kind,
        "explanations": [asdict(result) for result in latent.explanations],
        "scores": [asdict(score) for score in latent.scores],
        "density": short(latent.density),
        "max_activation": short(latent.max_activation),
        "n_fired": latent.n_fired,
        "histogram": latent.histogram,
        "words": [(word, short(weight)) for word, weight in latent.words],
        "promoted": tokens(latent.promoted),
        "suppressed": tokens(latent.suppressed),
        "examples": [_example(example, latent, strings) for example in latent.examples],
        "nearest": [(number, short(cosine)) for number, cosine in latent.nearest],
        "cofiring": [(number, short(share), n) for number, share, n in latent.cofiring],
        "attributions": [
            {
                "tokens": [strings[token] for token in result.tokens],
                "values": [short(value) for value in result.values],
                "target": strings[result.target],
                "effect": short(result.effect),
                "note": result.note,
            }
            for result in latent.attributions
        ],
        "command": latent.command,
    }


def _example(example: Example, latent: Latent, strings: dict[str, int]) -> dict[str, object]:
    fires: list[float | int | None] = []
    for position, value in enumerate(example.activations):
        if value > 0:
            fires += (position, short(value))
    image = None
    if example.image is not None:
        image = {
            "id": example.image.number,
            "name": strings[example.image.name],
            "grid": example.image.grid,
            "width": example.image.width,
            "height": example.image.height,
        }
    return {
        "tokens": [strings[token] for token in example.tokens],
        "fires": fires,
        "peak": example.peak,
        "source": strings[example.source],
        "fifth": latent.fifth(example),
        "image": image,
    }
