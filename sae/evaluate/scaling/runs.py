"""Finished runs as a law needs them: read from JSON, JSON lines, or directories of `sae run`."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from activations_cache.checks import positive


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one trained dictionary was, and how well it did."""

    d_sae: int
    """Number of latents."""
    rows: int
    """Rows that it was trained on."""
    loss: float
    """Above 0: FVU over held-out rows, say; of one kind for all runs."""
    k: int | None = None
    """Latents that fire in a row, if that is fixed."""
    lr: float | None = None
    """Its learning rate, if that was varied."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("d_sae", "rows", "loss", "k", "lr"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)

    @property
    def compute(self) -> float:
        """Compute in units of d_sae * rows, to which the cost of a step is proportional."""
        return float(self.d_sae) * self.rows


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Runs of all paths together.

    Args:
        paths: `.json` (a list of objects) or `.jsonl` files with Run's fields (others are passed
            over), or output directories of `sae run`, of which FVU over the held-out rows is the
            loss; frozen baselines are passed over.

    Raises:
        FileNotFoundError: If a path is missing.
        ValueError: If it holds something else.
    """
    found: list[Run] = []
    for path in map(Path, paths):
        try:
            records = _of_directory(path) if path.is_dir() else _of_file(path)
            found += [_run(record) for record in records]
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(
                f"{path} must hold runs (d_sae, rows, loss), got a problem: {problem}"
            ) from problem
    return found


def _of_file(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _of_directory(path: Path) -> Iterable[dict[str, Any]]:
    report = json.loads((path / "evaluate" / "report.json").read_text())
    for name, measured in report["reconstruction"].items():
        place = path / "train" / name
        if not place.is_dir():
            continue
        provenance = json.loads((place / "provenance.json").read_text())
        recipe = provenance["recipe"]
        if recipe["frozen"] == "none":
            yield {
                "d_sae": recipe["d_sae"],
                "k": recipe["activation"].get("k"),
                "rows": provenance["rows"],
                "loss": measured["fvu"],
                "lr": _rate(recipe),
            }


def _rate(recipe: dict[str, Any]) -> float | None:
    """The learning rate, where it is a number of the recipe and not found by a rule."""
    lr = recipe["optimizer"].get("lr")
    return lr if isinstance(lr, float) else None


def _run(record: dict[str, Any]) -> Run:
    known = {field.name: field for field in fields(Run)}
    missing = [n for n, field in known.items() if field.default is MISSING and n not in record]
    if missing:
        raise ValueError(f"{missing[0]} must be given, got none")
    given = {name: record[name] for name in known if record.get(name) is not None}
    for name, value in given.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{name} must be a number, got {value!r}")
    return Run(**given)
