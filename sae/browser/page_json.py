"""The result page's data as one JSON text that is safe inside a script element.

Tokens stand once in a table of strings, the most frequent first. A context is `[tokens, levels,
peak, source]`: tokens are base64 of indices into the table, each 7 bits a byte, lowest first, with
the high bit set on all bytes but its last (LEB128); levels are base64 of one byte per token, 255
standing for the latent's `scale`, and what fires has at least 1. The latents of a dictionary are
stored by column, one list per field, since that is how they are sorted.
"""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from sae.browser.page_data import Context, Curve, DictionaryPage, LatentPage, PageData

FORMAT = 1
# Characters that end the script element or a line of it, turn the direction of the text around
# them, or cannot be written as UTF-8. In JSON they stand in strings only, so each may be escaped.
_UNSAFE = re.compile(
    "[<>&\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def page_json(data: PageData) -> str:
    """The page's data as JSON in which no character can end a script element."""
    table = _table(data)
    document = {
        "format": FORMAT,
        "title": data.title,
        "subtitle": data.subtitle,
        "facts": data.facts,
        "cautions": data.cautions,
        "results": asdict(data.results),
        "curves": [_curve(curve) for curve in data.curves],
        "steering": [asdict(example) for example in data.steering],
        "strings": list(table),
        "dictionaries": [_dictionary(page, table) for page in data.dictionaries],
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _table(data: PageData) -> dict[str, int]:
    """The index of every string that stands in a table, the most frequent first."""
    counts: Counter[str] = Counter()
    for latent in (latent for page in data.dictionaries for latent in page.latents):
        counts.update(latent.promoted)
        counts.update(latent.suppressed)
        for context in latent.contexts:
            counts.update(context.tokens)
            counts[context.source] += 1
    return {text: index for index, (text, _) in enumerate(counts.most_common())}


def _curve(curve: Curve) -> dict[str, object]:
    values = {
        metric: [_short(value) if math.isfinite(value) else None for value in series]
        for metric, series in curve.values.items()
    }
    return {"name": curve.name, "steps": curve.steps, "values": values}


def _dictionary(page: DictionaryPage, table: dict[str, int]) -> dict[str, object]:
    rows = [_latent(latent, table) for latent in page.latents]
    fields = rows[0] if rows else {}
    return {
        "name": page.name,
        "summary": page.summary,
        "d_sae": page.d_sae,
        "n_rows": page.n_rows,
        "n_live": page.n_live,
        "n_dead": page.n_dead,
        "density_histogram": asdict(page.density_histogram),
        "latents": {field: [row[field] for row in rows] for field in fields},
    }


def _latent(page: LatentPage, table: dict[str, int]) -> dict[str, object]:
    # The contexts may come from other rows than max_activation: shading needs the larger one.
    peaks = (max(context.activations) for context in page.contexts)
    scale = max(page.max_activation, *peaks, 0.0)
    return {
        "latent": page.latent,
        "label": page.label,
        "kind": page.kind,
        "auc": _short(page.auc),
        "auc_low": _short(page.auc_low),
        "auc_high": _short(page.auc_high),
        "status": page.status,
        "density": _short(page.density),
        "max_activation": _short(page.max_activation),
        "scale": _short(scale),
        "words": [(word, _short(weight)) for word, weight in page.words],
        "promoted": [table[token] for token in page.promoted],
        "suppressed": [table[token] for token in page.suppressed],
        "contexts": [_context(context, scale, table) for context in page.contexts],
        "histogram": page.histogram,
    }


def _context(context: Context, scale: float, table: dict[str, int]) -> list[object]:
    tokens = _leb128(table[token] for token in context.tokens)
    levels = bytes(_level(value, scale) for value in context.activations)
    return [_base64(tokens), _base64(levels), context.peak, table[context.source]]


def _leb128(numbers: Iterable[int]) -> bytes:
    raw = bytearray()
    for number in numbers:
        while number > 127:
            raw.append(number & 127 | 128)
            number >>= 7
        raw.append(number)
    return bytes(raw)


def _level(value: float, scale: float) -> int:
    """`value` in 255ths of `scale`; what fires stays visible."""
    return max(1, round(255 * value / scale)) if value > 0 else 0


def _short(value: float | None) -> float | None:
    """Five digits: more than the page shows."""
    return None if value is None else float(f"{value:.5g}")


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
