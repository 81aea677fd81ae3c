"""How much of a world whose features are known our recipes find, beside baselines and ceilings.

    python -m benchmarks.ground_truth [--tier ci] [--seeds 3] [--rows 1000000] [--recipes]

For each seed a world is made; on its rows one pass trains, side by side: `default`
(configs/default.yaml), three random baselines of it (`frozen decoder`, `soft-frozen decoder`,
`frozen encoder`), `topk` (a lively AuxK, no prefixes) and `true decoder` (default with the true
directions as a decoder that never learns: what is then missing is the encoder's part). --recipes
adds every other recipe of configs/ at the same L0: k, or the coefficient of the penalty that gives
it. --read-outs adds each arm by its refined read-out, which is set on rows of the world without its
truth, and with a linear encoder fitted to that. `probe` and `oracle` need no training. Shorter runs
than the published 200 million rows, and worlds made here rather than downloaded, are not
SynthSAEBench results. The published length, for a GPU; after a kill the same command goes on:

    python -m benchmarks.ground_truth --tier full --seeds 1 --arms default --checkpoints DIR

A hundredth of it, for a CPU, by --rows 2000000 --score-rows 20000 beside these.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ground_truth_recipes import at_l0, new_step, others, recipe
from benchmarks.peer_recipes import train_peers
from benchmarks.resumable import Saved, train
from benchmarks.rows import append, surroundings
from sae.architecture import TopK
from sae.autoencoder import SparseAutoencoder
from sae.cli import console
from sae.evaluate.ground_truth import (
    TIERS,
    Ceilings,
    GroundTruthReport,
    World,
    batches,
    evaluate,
    make_world,
    measure_ceilings,
    set_true_decoder,
    table_rows,
    table_text,
)
from sae.evaluate.ground_truth.run import CHANCE, COLUMNS, figure
from sae.evaluate.ground_truth.world import rows as rows_of
from sae.run.read_outs import ROWS, distilled, fit_read_out
from sae.run.refining import ROWS_TO_DISTIL
from sae.train.config import Adam, AuxK, DictionaryConfig
from sae.train.optim_config import Tied
from sae.train.step import TrainStep

AT_ONCE = 2048
"""Rows of a world that are made at once."""

PEERS = ("sae-lens", "dictionary-learning", "eai-sparsify")
WIDTHS = {"full": 4096}
"""Latents where they are not as many as the features."""
ROWS_OF = {"full": 200_000_000}
"""Rows where they are not a million."""

BASELINES = {
    "frozen decoder": "decoder",
    "soft-frozen decoder": "soft_decoder",
    "frozen encoder": "encoder",
}


def main() -> None:
    """Train and score on every seed, print one table."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(TIERS[arguments.tier], n_rows=arguments.score_rows)
    reports: dict[str, list[GroundTruthReport]] = {}
    ceilings: list[Ceilings] = []
    for seed in range(arguments.seeds):
        with console.step(f"seed {seed}: world"):
            world = make_world(config, seed, device=device)
        size = _size(world, arguments)
        for name, dictionary in _dictionaries(world, size, arguments):
            with console.step(f"seed {seed}: score {name}") as report:
                reports.setdefault(name, []).append(evaluate(dictionary, world, progress=report))
        with console.step(f"seed {seed}: ceilings") as report:
            found = measure_ceilings(world, k=size.k, n_features=size.d_sae, progress=report)
            ceilings.append(found)
        print(f"seed {seed} done ({size})", file=sys.stderr)
    print(table_text([*table_rows(reports), *_lines(ceilings)]))
    if arguments.record:
        append("ground_truth", [_record(arguments, reports, ceilings)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", choices=TIERS, default="ci")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=None, help="a million; of full 200 million")
    parser.add_argument("--score-rows", type=int, help="that score; the tier's if absent")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=None, help="of default and topk; else auto")
    parser.add_argument("--recipes", action="store_true", help="all recipes of configs/ as well")
    parser.add_argument("--peers", action="store_true", help="recipes of other projects as well")
    parser.add_argument("--read-outs", action="store_true", help="refined and distilled as well")
    parser.add_argument("--d-sae", type=int, default=None, help="as many as features if absent")
    parser.add_argument("--k", type=int, default=None, help="the world's own mean L0 if absent")
    parser.add_argument("--arms", nargs="+", default=None, help="default and these alone")
    parser.add_argument(
        "--record", action="store_true", help="append to results/ground_truth.jsonl"
    )
    parser.add_argument("--checkpoints", type=Path, help="keep them here, and go on from them")
    parser.add_argument("--checkpoint-seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or ROWS_OF.get(arguments.tier, 1_000_000)
    arguments.score_rows = arguments.score_rows or TIERS[arguments.tier].n_rows
    return arguments


class Size(NamedTuple):
    """Of the dictionaries."""

    d_sae: int
    k: int


def _size(world: World, arguments: argparse.Namespace) -> Size:
    d_sae = min(arguments.d_sae or WIDTHS.get(arguments.tier, world.n_features), world.n_features)
    k = arguments.k or max(1, round(float(world.rates[:d_sae].sum())))
    return Size(d_sae, k)


def _entries(
    world: World, size: Size, arguments: argparse.Namespace
) -> dict[str, DictionaryConfig]:
    batch = arguments.batch
    ours = recipe("default", "default", size.d_sae, size.k, batch)
    ours = replace(ours, optimizer=replace(ours.optimizer, lr=arguments.lr or "auto"))
    plain = DictionaryConfig(
        d_sae=size.d_sae,
        activation=TopK(k=size.k),
        auxk=AuxK(coefficient=0.5),
        dead_after_tokens=15 * batch,
        optimizer=Adam(lr=arguments.lr or 3e-3, decay=0.5),
    )
    if arguments.peers:
        return {"default": ours}
    random = replace(ours, init=Tied())
    known = replace(random, frozen="decoder", refine=None)  # refining serves a decoder that learns
    results = {"default": ours, "topk": plain, "true decoder": known}
    results |= {name: replace(random, frozen=kind) for name, kind in BASELINES.items()}
    results["frozen decoder"] = known
    if arguments.recipes:
        for file, name in others():
            entry = recipe(file, name, size.d_sae, size.k, batch)
            results[f"{file}:{name}"] = at_l0(world, entry, size.k, batch)
    wanted = arguments.arms or results
    return {name: entry for name, entry in results.items() if name == "default" or name in wanted}


def _dictionaries(
    world: World, size: Size, arguments: argparse.Namespace
) -> Iterator[tuple[str, SparseAutoencoder]]:
    """All that is scored, by the names of the table."""
    for name, dictionary in _trained(world, _entries(world, size, arguments), arguments).items():
        yield name, dictionary
        if arguments.read_outs:
            for how, other in _read_otherwise(world, dictionary).items():
                yield f"{name}, {how}", other
    if arguments.peers:
        yield from _peers(world, size, arguments).items()


def _trained(
    world: World, entries: dict[str, DictionaryConfig], arguments: argparse.Namespace
) -> dict[str, SparseAutoencoder]:
    n_batches = arguments.rows // arguments.batch
    steps = {name: _step(name, world, entry, n_batches) for name, entry in entries.items()}

    def rows(start: int) -> Iterator[Tensor]:
        left = n_batches - start
        return (made.x for made in batches(world, arguments.batch, left, start=start))

    with console.step(f"seed {world.seed}: train") as report:
        saved = _checkpoints(world, entries, arguments)
        train(steps, rows, saved, lambda done: report(done, n_batches, "steps"))
    return {name: step.autoencoder for name, step in steps.items()}


def _checkpoints(
    world: World, entries: dict[str, DictionaryConfig], arguments: argparse.Namespace
) -> Saved | None:
    if arguments.checkpoints is None:
        return None
    config = replace(world.config, n_rows=TIERS[arguments.tier].n_rows)  # these only score
    identity = repr((config, world.seed, arguments.rows, arguments.batch, entries))
    root = arguments.checkpoints / f"seed-{world.seed}"
    return Saved(root, identity, arguments.checkpoint_seconds)


def _read_otherwise(world: World, dictionary: SparseAutoencoder) -> dict[str, SparseAutoencoder]:
    """A dictionary by its refined read-out, and with a linear encoder that learned from it."""
    starts = range(0, ROWS_TO_DISTIL, AT_ONCE)
    x = torch.cat([rows_of(world, start, start + AT_ONCE).x for start in starts])
    dictionary.requires_grad_(False).read_out = fit_read_out(dictionary, x[:ROWS])
    return {"refined": dictionary.reading("refined"), "distilled": distilled(dictionary, x)}


def _peers(world: World, size: Size, arguments: argparse.Namespace) -> dict[str, SparseAutoencoder]:
    n_batches = arguments.rows // arguments.batch

    def rows() -> Iterator[Tensor]:
        return (made.x for made in batches(world, arguments.batch, n_batches))

    return train_peers(rows, n_batches, size.d_sae, size.k, world.seed)


def _step(name: str, world: World, entry: DictionaryConfig, n_batches: int) -> TrainStep:
    step = new_step(world, entry, n_batches)
    if name == "true decoder":
        set_true_decoder(step.autoencoder, world)
    return step


def _lines(ceilings: list[Ceilings]) -> list[tuple[str, ...]]:
    """The ceilings in the table's columns: F1 of the probes, FVU of the oracle."""
    f1 = figure([ceiling.probe.f1 for ceiling in ceilings])
    fvu = figure([ceiling.oracle_fvu for ceiling in ceilings])
    n = str(len(ceilings))
    probe = (f1 if name == "F1" else "" for name in COLUMNS)
    oracle = (fvu if name == "FVU" else "" for name in COLUMNS)
    return [("probe (ceiling)", n, *probe), ("oracle top-k (ceiling)", n, *oracle)]


def _record(
    arguments: argparse.Namespace,
    reports: dict[str, list[GroundTruthReport]],
    ceilings: list[Ceilings],
) -> dict:
    figures = {
        kind: {name: [read(report) for report in of_one] for name, read in COLUMNS.items()}
        for kind, of_one in reports.items()
    }
    chance = {name: [read(r) for r in reports["default"]] for name, read in CHANCE.items()}
    ceiling = {
        "probe F1": [of_one.probe.f1 for of_one in ceilings],
        "oracle FVU": [of_one.oracle_fvu for of_one in ceilings],
    }
    return {
        "request": {k: v for k, v in vars(arguments).items() if "checkpoint" not in k},
        "figures": figures,
        "chance": chance,
        "ceilings": ceiling,
        **surroundings(PEERS if arguments.peers else ()),
    }


if __name__ == "__main__":
    main()
