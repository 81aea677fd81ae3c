"""Whether every kind of dictionary finds planted features and has its L0, over a grid of worlds.

    python -m benchmarks.ground_truth_grid [--d 64] [--active 4 8 32] [--steps 2000] [--record]

A cell is a world (width of the rows, features that fire in a row, law by which they fire), a number
of steps, a seed and an entry of configs/kinds.yaml at the world's size. Each is trained, scored on
unseen rows and, with --record, appended to results/ground_truth_grid.jsonl at once; cells there
are skipped, so a grid that was stopped goes on. At the end one table of all cells of the
request is printed; those beyond --most-seconds (at 10 GFLOP/s) are `not run` on a CPU.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.ground_truth_recipes import new_step, recipe
from benchmarks.rows import RESULTS, append, surroundings
from sae.cli import console
from sae.evaluate.ground_truth import (
    GroundTruthConfig,
    GroundTruthReport,
    World,
    batches,
    evaluate,
    make_world,
    table_text,
)
from sae.evaluate.ground_truth.config import Normal, Orthogonalised, Zipf
from sae.evaluate.ground_truth.run import figure
from sae.train.config import DictionaryConfig
from sae.train.step import TrainStep

NAME = "ground_truth_grid"
RECIPES = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "l1")
LAWS = ("uniform", "zipf")
BATCH, SETTLED = 256, 100
"""Rows of a step; steps, the last ones, over which the L0 of training is averaged."""
PER_DIMENSION, MOST = 6, 4096
"""Features of a world: so many a dimension, so many at most."""
RATIO = 16
"""The most frequent feature over the rarest, under Zipf's law with the exponent 1/2."""
SEPARATED = 1024
"""Width of the rows up to which directions are moved apart; wider ones hardly overlap."""
FLOPS, PRODUCTS = 1e10, 12
"""What a core does in a second; passes over rows, latents and width in a step, times 2."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    d: int
    active: int
    steps: int
    law: str
    seed: int
    recipe: str

    @property
    def world(self) -> tuple[int, int, int, str, int]:
        """What cells that see the same rows share."""
        return (self.d, self.active, self.steps, self.law, self.seed)

    @property
    def n_features(self) -> int:
        """Features, and latents."""
        return min(PER_DIMENSION * self.d, MOST)

    @property
    def seconds(self) -> float:
        """How long a core would take."""
        return PRODUCTS * self.steps * BATCH * self.d * self.n_features / FLOPS


def world_of(cell: Cell) -> GroundTruthConfig:
    """Flat features of magnitude 1 +- .25, all alike or by Zipf's law, and noise of norm .4."""
    n = cell.n_features
    share = torch.arange(1, n + 1, dtype=torch.float64) ** -0.5
    share = (share - share[-1]) / (share[0] - share[-1])
    ratio = RATIO if cell.law == "zipf" else 1
    lowest = cell.active / (n * (1 + (ratio - 1) * float(share.mean())))
    return GroundTruthConfig(
        n_features=n,
        d_model=cell.d,
        geometry=Orthogonalised(steps=100 if cell.d <= SEPARATED else 0),
        firing=Zipf(exponent=0.5, highest=ratio * lowest, lowest=lowest)
        if cell.law == "zipf"
        else Zipf(exponent=0.0, highest=lowest, lowest=lowest),
        magnitude=Normal(first=1.0, last=1.0, std_mean=0.25, std_std=0.0),
        noise=0.4 / cell.d**0.5,
        n_rows=8192,
    )


def main() -> None:
    """Train what is missing, the cheapest worlds first; print the table."""
    arguments = _arguments()
    cells = sorted(_cells(arguments), key=lambda cell: (cell.seconds, cell.seed, cell.world))
    known = recorded()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _, alike in itertools.groupby(cells, key=lambda cell: cell.world):
        missing = [cell for cell in alike if cell not in known and _fits(cell, arguments, device)]
        if missing:
            known |= _trained(missing, device, arguments)
    print(table_text(_lines(cells, known)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, nargs="+", default=[64], help="widths of the rows")
    parser.add_argument("--active", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[2000])
    parser.add_argument("--laws", choices=LAWS, nargs="+", default=LAWS)
    parser.add_argument("--recipes", choices=RECIPES, nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=900.0, help="of a cell on a CPU")
    parser.add_argument(
        "--record", action="store_true", help="append to results/ground_truth_grid.jsonl"
    )
    return parser.parse_args()


def _cells(of: argparse.Namespace) -> Iterator[Cell]:
    worlds = itertools.product(of.d, of.active, of.steps, of.laws, range(of.seeds), of.recipes)
    for d, active, steps, law, seed, name in worlds:
        yield Cell(d=d, active=active, steps=steps, law=law, seed=seed, recipe=name)


def recorded() -> dict[Cell, dict[str, float]]:
    """The figures of the cells that were run, the last row of each."""
    path = RESULTS / f"{NAME}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    return {Cell(**row["cell"]): row["figures"] for row in rows}


def _fits(cell: Cell, arguments: argparse.Namespace, device: torch.device) -> bool:
    return device.type != "cpu" or cell.seconds <= arguments.most_seconds


def entry_of(cell: Cell) -> DictionaryConfig:
    """The entry of configs/kinds.yaml at the cell's size and L0."""
    return recipe("kinds", cell.recipe, cell.n_features, cell.active, BATCH)


def _trained(
    cells: list[Cell], device: torch.device, arguments: argparse.Namespace
) -> dict[Cell, dict[str, float]]:
    """Train these cells on the rows of their one world, score them and, if so, record them."""
    first, n_steps = cells[0], cells[0].steps
    world = make_world(world_of(first), first.seed, device=device)
    steps = {cell: new_step(world, entry_of(cell), n_steps) for cell in cells}
    began = time.perf_counter()
    with console.step(f"{first.d} wide, {first.active} {first.law}, seed {first.seed}") as report:
        l0 = _run(steps, world, n_steps, lambda done: report(done, n_steps, "steps"))
    seconds = time.perf_counter() - began
    found = {}
    for cell, step in steps.items():
        figures = {**_figures(evaluate(step.autoencoder, world)), "L0 in training": l0[cell]}
        found[cell] = figures
        if arguments.record:
            together = {"seconds": seconds, "dictionaries": len(cells)}
            row = {"cell": vars(cell), "figures": figures, "together": together}
            append(NAME, [{**row, **surroundings()}])
        print(cell, figures, file=sys.stderr, flush=True)
    return found


def _run(
    steps: dict[Cell, TrainStep], world: World, n_steps: int, told: Callable[[int], None]
) -> dict[Cell, float]:
    """Take all steps; return the mean L0 of the last ones."""
    sums = dict.fromkeys(steps, 0.0)
    last = min(SETTLED, n_steps)
    for number, made in enumerate(batches(world, BATCH, n_steps)):
        for cell, step in steps.items():
            metrics = step(made.x)
            if number >= n_steps - last:
                sums[cell] += float(metrics.l0) / last
        told(number + 1)
    return sums


def _figures(report: GroundTruthReport) -> dict[str, float]:
    return {
        "MMCS": report.directions.mmcs,
        "recovered": report.directions.recovered,
        "F1": report.firing.f1,
        "FVU": report.fvu,
        "L0": report.l0,
        "true L0": report.l0_true,
        "dead": report.dead,
    }


def _lines(cells: list[Cell], known: dict[Cell, dict[str, float]]) -> list[tuple[str, ...]]:
    """One row for the seeds of each cell; L0 over what was asked."""
    names = ("recovered", "MMCS", "F1", "FVU", "dead")
    lines: list[tuple[str, ...]] = [
        ("d", "active", "steps", "law", "recipe", "seeds", *names, "L0 / asked")
    ]
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((*cell.world[:4], cell.recipe), []).append(cell)
    for key, of_one in sorted(groups.items()):
        runs = [(cell, known[cell]) for cell in of_one if cell in known]
        shown = ["not run"]
        if runs:
            shown = [figure([figures[name] for _, figures in runs]) for name in names]
            shown.append(figure([figures["L0"] / cell.active for cell, figures in runs]))
        cells_of_row = (*map(str, key), str(len(runs)), *shown)
        lines.append((*cells_of_row, *[""] * (len(lines[0]) - len(cells_of_row))))
    return lines


if __name__ == "__main__":
    main()
