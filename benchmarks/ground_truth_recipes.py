"""The recipes of configs/ brought to the size of a world whose features are known."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from sae.autoencoder import SparseAutoencoder, initialise
from sae.config import load
from sae.evaluate.ground_truth import World, batches
from sae.run.config import RunConfig
from sae.train.config import DictionaryConfig
from sae.train.initialise import refine_
from sae.train.loss_config import FixedPrefixes, NestedK
from sae.train.step import TrainStep

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PENALTIES = ("l1", "p_anneal", "l0", "tanh")
TRIALS, TRIAL_STEPS = 6, 400
"""Trainings that look for the penalty's coefficient at a given L0, and how long they are."""


def recipe(file: str, name: str, d_sae: int, k: int, batch: int) -> DictionaryConfig:
    """An entry of a file of configs/, with prefixes as large a share, and dead after as many steps.

    Its learning rate stays: `auto`, or the number that the file chose for its own 700 steps.
    """
    config = load(RunConfig, CONFIGS / f"{file}.yaml").train
    entry = config.saes[name]
    return _resized(entry, d_sae, k, entry.dead_after_tokens * batch // config.batch)


def _resized(entry: DictionaryConfig, d_sae: int, k: int, dead: int) -> DictionaryConfig:
    activation, prefixes = entry.activation, entry.matryoshka
    if hasattr(activation, "k"):
        activation = replace(activation, k=k)
    aims = {}
    for name in ("control", "l0"):
        if getattr(term := getattr(entry, name), "target", None) is not None:
            aims[name] = replace(term, target=float(k))
    if isinstance(prefixes, FixedPrefixes):
        ends = sorted({max(1, end * d_sae // entry.d_sae) for end in prefixes.ends})
        prefixes = replace(prefixes, ends=tuple(ends))
    if isinstance(prefixes, NestedK):
        ks = sorted({max(1, one * k // entry.activation.k) for one in prefixes.ks} - {k})
        prefixes = replace(prefixes, ks=tuple(ks))
    return replace(
        entry,
        d_sae=d_sae,
        activation=activation,
        matryoshka=prefixes,
        dead_after_tokens=max(1, dead),
        **aims,
    )


def others() -> Iterable[tuple[str, str]]:
    """File and name of every entry of configs/ that reads and predicts the rows of a single stream.

    Entries that name hook points are those of transcoders and crosscoders and what stands beside
    them: a world has one stream. What ends by a model's predictions has no model here.
    """
    for path in sorted(CONFIGS.glob("*.yaml")):
        if path.stem in ("default", "end_to_end") or path.stem.startswith("demo"):
            continue
        for name, entry in load(RunConfig, path).train.saes.items():
            if entry.frozen == "none" and not entry.inputs and not entry.outputs:
                yield path.stem, name


def new_step(world: World, entry: DictionaryConfig, n_steps: int) -> TrainStep:
    """Units and bias come from rows of the stream, as `sae train` takes them from a cache."""
    (first, _), *_ = batches(world, max(4096, entry.d_sae), 1)
    mean = first.mean(dim=0)
    scale = float((world.config.d_model / (first - mean).square().sum(dim=1).mean()).sqrt())
    is_plain = entry.input_norm == "none"
    made = SparseAutoencoder(entry.architecture(world.config.d_model, scale if is_plain else 1.0))
    initialise(
        made,
        torch.Generator().manual_seed(world.seed),
        mean=mean.cpu() if is_plain else None,
        decoder_norm=entry.decoder_norm,
    )
    refine_(made, entry, lambda n: (first[:n].cpu(), first[:n].cpu()))
    return TrainStep(made.to(mean.device), entry, n_steps)


def at_l0(world: World, entry: DictionaryConfig, l0: float, batch: int) -> DictionaryConfig:
    """The entry with the coefficient that gives an L0, found by bisection where nothing aims."""
    name = next((p for p in PENALTIES if getattr(entry, p) is not None), None)
    if name is None or entry.control is not None:
        return entry
    penalty = getattr(entry, name)
    if getattr(penalty, "target", None) is not None:
        return entry
    low, high = 1e-3 * penalty.coefficient, 1e2 * penalty.coefficient
    rows = [made.x for made in batches(world, batch, TRIAL_STEPS)]
    for _ in range(TRIALS):
        middle = (low * high) ** 0.5
        tried = replace(entry, **{name: replace(penalty, coefficient=middle)})
        step = new_step(world, tried, len(rows))
        result = [float(step(x).l0) for x in rows][-20:]
        low, high = (middle, high) if sum(result) / len(result) > l0 else (low, middle)
    return replace(entry, **{name: replace(penalty, coefficient=(low * high) ** 0.5)})
