"""How results look in a notebook's cell: small tables without scripts, with every text escaped.

What is shown is what the objects hold; nothing is computed that costs a pass over data.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

MOST_ROWS = 25
"""Of a table; a cell is no place for thousands."""

N_STRONGEST = 10
"""Latents of `Latents` that are shown."""

_LEFT = ' style="text-align:left;vertical-align:top"'


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A table, its first column to the left, with a note below; long ones are cut.

    Args:
        title: Above it; may be empty.
        columns: Headings.
        rows: Cells as they are to be read.
        note: Below it; may be empty.
    """
    head = _row("th", columns)
    body = "".join(_row("td", row) for row in rows[:MOST_ROWS])
    more = f"{len(rows) - MOST_ROWS:,} more rows" if len(rows) > MOST_ROWS else ""
    below = "; ".join(filter(None, (more, note)))
    return _framed(title, f"<thead>{head}</thead><tbody>{body}</tbody>", below)


def facts(title: str, rows: Iterable[tuple[str, str]], note: str = "") -> str:
    """Names and what they stand for, one below the other."""
    lines = "".join(
        f"<tr><th{_LEFT}>{escape(name)}</th><td{_LEFT}>{escape(text)}</td></tr>"
        for name, text in rows
    )
    return _framed(title, f"<tbody>{lines}</tbody>", note)


def texts(prompt: str, named: Iterable[tuple[str, str]], note: str = "") -> str:
    """Continuations of one prompt, one below the other, the prompt in grey before each."""
    lines = "".join(
        f'<tr><th{_LEFT}>{escape(name)}</th><td style="text-align:left;white-space:pre-wrap">'
        f'<span style="opacity:.6">{escape(prompt)}</span>{escape(text)}</td></tr>'
        for name, text in named
    )
    return _framed("", f"<tbody>{lines}</tbody>", note)


def picture(png: bytes, what: str) -> str:
    """A PNG, inside the text."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(what)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def frame(url: str, height: int, note: str) -> str:
    """Another page in the cell."""
    return (
        f'<div><iframe src="{escape(url)}" width="100%" height="{height}" '
        f'style="border:1px solid #8888"></iframe>{_line("small", note)}</div>'
    )


def dictionary(shown: Any) -> str:
    """What a SparseAutoencoder is, where it belongs, and what was counted of its latents.

    Its class stands above this module, and so does that of the latents.
    """
    config, stats, made = shown.config, shown.stats, shown.provenance
    reads, predicts = (
        ", ".join(part.hook_point for part in parts) for parts in (config.inputs, config.outputs)
    )
    model = made.get("model", "")
    if isinstance(model, dict):
        model = model.get("path") or model.get("model", "")
    width = f"{config.d_in:,} -> {config.width_out:,}"
    counted = "none; `sae evaluate` counts them"
    if stats is not None:
        n_dead = int((stats.n_fired == 0).sum())
        l0 = float(stats.n_fired.sum()) / max(stats.n_rows, 1)
        counted = f"L0 {l0:.1f} of {config.d_sae:,}, {n_dead:,} silent on {stats.n_rows:,} rows"
    rows = [
        ("activation", str(config.activation)),
        ("latents", f"{config.d_sae:,}"),
        ("width", width + (", with a skip" if config.skip else "")),
        ("reads", reads),
        ("predicts", predicts),
        ("norm of the input", "" if config.input_norm == "none" else config.input_norm),
        ("read-out", "" if shown.read_by == "linear" else shown.read_by),
        ("model", str(model)),
        ("trained on", f"{made['rows']:,} rows" if isinstance(made.get("rows"), int) else ""),
        ("statistics", counted),
    ]
    return facts(type(shown).__name__, [(name, text) for name, text in rows if text])


def latents(shown: Any) -> str:
    """Of Latents how many rows and latents fire, and the latents of the largest activations."""
    values, indices = shown.values.detach().flatten().cpu(), shown.indices.flatten().cpu()
    fires = values != 0
    n_rows = shown.values[..., 0].numel() if shown.values.shape[-1] else 0
    l0 = int(fires.sum()) / max(n_rows, 1)
    rows = []
    for latent in shown.top(N_STRONGEST):
        its = values[fires & (indices == latent)]
        rows.append((str(latent), f"{len(its):,}", f"{its.max():.4g}", f"{its.mean():.4g}"))
    shape = " x ".join(f"{n:,}" for n in shown.values.shape[:-1])
    title = (
        f"Latents of {shape} rows: {l0:.1f} fire in a row, {len(indices[fires].unique()):,} in any"
    )
    columns = ("latent", "rows in which it fires", "largest", "mean where it fires")
    return table(title, columns, rows, "the largest activations first")


def _framed(title: str, body: str, note: str) -> str:
    wide = f'<div style="overflow-x:auto"><table>{body}</table></div>'
    return f"<div>{_line('b', title)}{wide}{_line('small', note)}</div>"


def _row(kind: str, cells: Sequence[str]) -> str:
    first, rest = cells[:1], cells[1:]
    line = "".join(f"<{kind}{_LEFT}>{escape(cell)}</{kind}>" for cell in first)
    return f"<tr>{line}{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in rest)}</tr>"


def _line(kind: str, text: str) -> str:
    return f"<div><{kind}>{escape(text)}</{kind}></div>" if text else ""
