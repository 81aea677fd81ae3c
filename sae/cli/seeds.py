"""Groups of seeds: their spread, and whether they found the same directions."""

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from activations_cache.checks import Progress
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.evaluate.report import TOLERANCE, EvaluationReport
from sae.evaluate.structure.stability import Stability, stability
from sae.statistics import compare

STABILITY = ("recipe", "pairs", "MCC", "chance", "MMCS", "chance", "> 0.7", "encoder MCC",
             "both > 0.7")  # fmt: skip


class Figure(NamedTuple):
    """Something that groups are compared by."""

    name: str
    smaller_is_better: bool
    of: Callable[[str], float]
    """From a dictionary's name."""


def figures(report: EvaluationReport) -> list[Figure]:
    """FVU, and what the model loses where that was measured."""
    found = [Figure("FVU", True, lambda name: report.reconstruction[name].fvu)]
    if intact := report.substitution.get("intact"):
        effects = intact.dictionaries
        found.append(Figure("Δ CE", True, lambda name: effects[name].ce_increase.value))
    if told := report.downstream:
        found.append(Figure("linear accuracy", False, lambda n: told.spliced[n].linear.value))
    return found


def of_one_l0(members: Mapping[str, list[str]], report: EvaluationReport) -> dict[str, list[str]]:
    """The groups of several dictionaries whose L0 is the same to a tenth: seeds and no sweeps."""
    found = {}
    for group, names in members.items():
        l0 = [report.reconstruction[name].l0 for name in names]
        middle = statistics.median(l0)
        if len(names) > 1 and all(abs(one - middle) <= TOLERANCE * middle for one in l0):
            found[group] = names
    return found


def noise_table(members: Mapping[str, list[str]], report: EvaluationReport) -> ResultTable | None:
    """Mean, spread, and what so many seeds tell apart; None where no group has two."""
    groups = of_one_l0(members, report)
    if not groups:
        return None
    shown = figures(report)
    columns = ("recipe", "seeds", "L0", *(f for of in shown for f in (of.name, "detectable")))
    rows = []
    for group, names in groups.items():
        l0 = [report.reconstruction[name].l0 for name in names]
        row = [group, str(len(names)), _spread(l0, 1)]
        for figure in shown:
            values = [figure.of(name) for name in names]
            detectable = compare(group, values, group, values).detectable
            row += [_spread(values, 4), f"{detectable:.4f}"]
        rows.append(tuple(row))
    note = (
        "mean ± standard deviation over seeds; detectable: the smallest difference from another "
        "recipe with as many seeds and as much spread that shows at 5 % with a power of 80 %"
    )
    return ResultTable(columns, tuple(rows), note)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def stability_table(
    members: Mapping[str, list[str]],
    dictionaries: Mapping[str, SparseAutoencoder],
    report: Progress,
) -> ResultTable | None:
    """Every pair of seeds of a group; None where no group has two of one width."""
    pairs = {
        group: [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        for group, names in members.items()
        if len(names) > 1 and len({_widths(dictionaries[name]) for name in names}) == 1
    }
    if not pairs:
        return None
    total, done, rows = sum(map(len, pairs.values())), 0, []
    for group, of_one in pairs.items():
        found = []
        for a, b in of_one:
            generator = torch.Generator().manual_seed(0)
            found.append(stability(dictionaries[a], dictionaries[b], generator))
            done += 1
            report(done, total, "pairs of seeds")
        rows.append((group, str(len(found)), *_means(found)))
    note = (
        "means over pairs of seeds of |cosine|: MCC one to one, MMCS the nearest, both ways; "
        "chance: as many random directions; > 0.7: share of the latents that the other seed has"
    )
    return ResultTable(STABILITY, tuple(rows), note)


def _widths(dictionary: SparseAutoencoder) -> tuple[int, int]:
    return dictionary.config.d_in, dictionary.config.width_out


def _means(found: list[Stability]) -> tuple[str, ...]:
    figures_of_all = [
        (
            one.decoder.mcc,
            one.chance.mcc,
            (one.decoder.mmcs_forward + one.decoder.mmcs_backward) / 2,
            (one.chance.mmcs_forward + one.chance.mmcs_backward) / 2,
            one.decoder.matched,
            one.encoder.mcc,
            one.matched_both,
        )
        for one in found
    ]
    means = [statistics.mean(column) for column in zip(*figures_of_all, strict=True)]
    return tuple(f"{mean:.3f}" for mean in means)
