"""How much of a world whose features are known our TopK finds, beside its baseline and ceilings.

    python -m benchmarks.ground_truth [--tier ci] [--seeds 3] [--rows 1000000] [--d-sae N] [--k K]

For each seed a world is made; on its rows one pass trains three dictionaries: `topk` (a lively
AuxK), `frozen` (the same with a random decoder that never learns: the baseline) and `true decoder`
(the same with the true directions as its decoder: what is then missing is the encoder's part).
`probe` and `oracle` need no training. Shorter runs than the published 200 million rows, and worlds
made here rather than downloaded, are not SynthSAEBench results.
"""

import argparse
import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.rows import append, surroundings
from sae.architecture import TopK
from sae.autoencoder import SparseAutoencoder, initialise
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
from sae.evaluate.ground_truth.table import COLUMNS, figure
from sae.train.config import Adam, AuxK, DictionaryConfig
from sae.train.step import TrainStep

WIDTHS = {"full": 4096}
"""Latents where they are not as many as the features."""

KINDS = ("topk", "frozen", "true decoder")


def main() -> None:
    """Train and score on every seed, print one table."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TIERS[arguments.tier]
    reports: dict[str, list[GroundTruthReport]] = {kind: [] for kind in KINDS}
    ceilings: list[Ceilings] = []
    for seed in range(arguments.seeds):
        world = make_world(config, seed, device=device)
        size = _size(world, arguments)
        recipe = _recipe(size, arguments)
        for kind, dictionary in _trained(world, recipe, arguments).items():
            reports[kind].append(evaluate(dictionary, config, seed))
        ceilings.append(
            measure_ceilings(config, seed, k=size.k, n_features=size.d_sae, device=device)
        )
        print(f"seed {seed} done ({size})", file=sys.stderr)
    print(table_text([*table_rows(reports), *_lines(ceilings)]))
    if arguments.record:
        append("ground_truth", [_record(arguments, reports)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tier", choices=TIERS, default="ci")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--d-sae", type=int, default=None, help="as many as features if absent")
    parser.add_argument("--k", type=int, default=None, help="the world's own mean L0 if absent")
    parser.add_argument(
        "--record", action="store_true", help="append to results/ground_truth.jsonl"
    )
    return parser.parse_args()


class Size(NamedTuple):
    """Of the dictionaries."""

    d_sae: int
    k: int


def _size(world: World, arguments: argparse.Namespace) -> Size:
    d_sae = min(arguments.d_sae or WIDTHS.get(arguments.tier, world.n_features), world.n_features)
    k = arguments.k or max(1, round(float(world.rates[:d_sae].sum())))
    return Size(d_sae, k)


def _recipe(size: Size, arguments: argparse.Namespace) -> DictionaryConfig:
    return DictionaryConfig(
        d_sae=size.d_sae,
        activation=TopK(k=size.k),
        auxk=AuxK(coefficient=0.5),
        dead_after_tokens=15 * arguments.batch,
        optimizer=Adam(lr=arguments.lr, decay=0.5),
    )


def _trained(
    world: World, recipe: DictionaryConfig, arguments: argparse.Namespace
) -> dict[str, SparseAutoencoder]:
    n_batches = arguments.rows // arguments.batch
    steps = {kind: _step(kind, world, recipe, n_batches) for kind in KINDS}
    for made in batches(world, arguments.batch, n_batches):
        for step in steps.values():
            step(made.x)
    return {kind: step.autoencoder for kind, step in steps.items()}


def _step(kind: str, world: World, recipe: DictionaryConfig, n_batches: int) -> TrainStep:
    """Units and bias come from rows of the stream, as `sae train` takes them from a cache."""
    (first,) = batches(world, 4096, 1)
    mean = first.x.mean(dim=0)
    scale = float((world.config.d_model / (first.x - mean).square().sum(dim=1).mean()).sqrt())
    entry = recipe if kind == "topk" else replace(recipe, frozen="decoder")
    dictionary = SparseAutoencoder(entry.architecture(world.config.d_model, scale))
    initialise(dictionary, torch.Generator().manual_seed(world.seed), mean=mean.cpu())
    dictionary.to(mean.device)
    if kind == "true decoder":
        set_true_decoder(dictionary, world)
    return TrainStep(dictionary, entry, n_batches)


def _lines(ceilings: list[Ceilings]) -> list[tuple[str, ...]]:
    """The ceilings in the table's columns: F1 of the probes, FVU of the oracle."""
    f1 = figure([ceiling.probe.f1 for ceiling in ceilings])
    fvu = figure([ceiling.oracle_fvu for ceiling in ceilings])
    n = str(len(ceilings))
    probe = (f1 if name == "F1" else "" for name in COLUMNS)
    oracle = (fvu if name == "FVU" else "" for name in COLUMNS)
    return [("probe (ceiling)", n, *probe), ("oracle top-k (ceiling)", n, *oracle)]


def _record(arguments: argparse.Namespace, reports: dict[str, list[GroundTruthReport]]) -> dict:
    figures = {
        kind: {name: [read(report) for report in of_one] for name, read in COLUMNS.items()}
        for kind, of_one in reports.items()
    }
    return {"request": vars(arguments), "figures": figures, **surroundings()}


if __name__ == "__main__":
    main()
