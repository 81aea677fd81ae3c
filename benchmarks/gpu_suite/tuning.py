"""Block sizes beside those that `blocks.py` chooses: proposals, for a person to take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.gpu_suite import report
from benchmarks.gpu_suite.case import Case, Shape
from sae_kernels import blocks

OURS, GATED = "triton", "triton, gated product"
RULES: dict[str, tuple[str, str]] = {
    "encode": ("product", GATED),
    "decode": ("weighted_rows", OURS),
    "values_grad": ("row_products", OURS),
    "decode_mse": ("decode_mse", OURS),
    "weight_grads": ("segments", OURS),
    "adam": ("whole_row", OURS),
}
"""By op the function of `blocks.py` that decides its time, and the candidate that goes by it."""
FACTORS = {"warps": (0.5, 2), "width": (0.5, 2), "entries": (0.5, 2), "latents": (0.5,)}
GAIN = 0.97
"""A proposal takes at most so much of the time of what is there."""


class Change(NamedTuple):
    """One number of one rule, multiplied."""

    rule: str
    field: str
    factor: float

    @property
    def name(self) -> str:
        """How the row calls it."""
        return f"{self.rule}: {self.factor:g} x {self.field}"

    @contextmanager
    def made(self) -> Iterator[None]:
        """Let the rule say so inside."""
        rule: Callable[..., Any] = getattr(blocks, self.rule)

        def changed(*args: Any) -> Any:
            block = rule(*args)
            number = max(1, int(getattr(block, self.field) * self.factor))
            return block._replace(**{self.field: number})

        setattr(blocks, self.rule, changed)
        try:
            yield
        finally:
            setattr(blocks, self.rule, rule)


def changes(case: Case) -> Iterator[Change]:
    """What is tried of an op: one number at a time."""
    rule, candidate = RULES.get(case.op, ("", ""))
    if case.pattern != "uniform" or candidate not in case.candidates:
        return
    fields = getattr(blocks, rule).__annotations__["return"]._fields
    for field in fields:
        # the tensor cores' tile is 64 entries, and a whole row is as wide as it is
        if (rule, field) not in (("segments", "entries"), ("whole_row", "width")):
            yield from (Change(rule, field, factor) for factor in FACTORS.get(field, ()))


def proposals(rows: list[report.Row]) -> list[str]:
    """A line for each change, or other way of ours, that is faster by more than it differs."""
    key = ("shape", "dtype")
    before = {
        (row["op"], row["candidate"], *(str(row[name]) for name in key)): row
        for row in rows
        if row.get("candidate") in (OURS, GATED) and row["status"] == "ok"
    }
    lines = []
    for row in rows:
        op = row.get("op", "").removeprefix("tuning: ")
        beside = OURS if row.get("candidate") == GATED else RULES.get(op, ("", ""))[1]
        old = before.get((op, beside, *(str(row.get(name)) for name in key)))
        is_change = op != row.get("op") or row.get("candidate") == GATED
        if not is_change or row["status"] != "ok" or old is None:
            continue
        if row["p80_ms"] < old["p20_ms"] and row["median_ms"] < GAIN * old["median_ms"]:
            gain = 1 - row["median_ms"] / old["median_ms"]
            lines.append(f"{op}, {Shape(**row['shape'])}: {row['candidate']} saves {gain:.0%}")
    return lines
