"""Train the dictionaries of a TrainConfig from a cache, with Lightning; resumable at any moment."""

import contextlib
import itertools
import logging
import warnings
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import Logger

from activations_cache import io
from activations_cache.config import TRAINING_SPLITS, CacheConfig
from activations_cache.summary import looked_at
from monosema.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.config import digest, to_dict
from sae.pretrained.monosema_format import save
from sae.train import checkpoint, curves
from sae.train.checkpoint import Saver
from sae.train.column_layout import reads
from sae.train.config import TrainConfig
from sae.train.end_to_end import fine_tuned, require_contexts
from sae.train.hook_points import Sites, sites
from sae.train.initialise import new_autoencoder
from sae.train.launch import joined, local_rank, requeue
from sae.train.live import live_rows, record_of
from sae.train.loggers import loggers, require_wandb
from sae.train.memory import estimate, free_on_cpu, require_memory
from sae.train.module import SAEModule
from sae.train.ranks import Ranks
from sae.train.signals import Stopped
from sae.train.step import TrainStep
from sae.train.throughput import Meter

if TYPE_CHECKING:
    from activations_cache import ActivationCache, ActivationStream
    from activations_cache.batches import Batch

CHECKPOINTS = "checkpoints"
NOT_OURS = (
    ".*configure_optimizers.*",
    ".*does not have many workers.*",
    ".*Experiment logs directory.*",
    ".*logging interval.*",
    ".*LeafSpec.*",
)
"""Lightning's warnings that do not apply: the TrainSteps hold the optimisers, the cache feeds ready
tensors, a killed run left logs behind; the last one is about Lightning's own code."""


class CacheRows:
    """The rows of `batches` of a cache or a stream, from a given step on."""

    def __init__(
        self,
        cache: "ActivationCache | ActivationStream",
        hook_points: tuple[str, ...],
        config: TrainConfig,
    ) -> None:
        """Take what decides the order of the rows; `start` and `part` are set before the loop."""
        self.cache, self.hook_points, self.config = cache, hook_points, config
        self.start, self.part = 0, slice(None)
        self.meter: Meter | None = None

    def __iter__(self) -> Generator[torch.Tensor]:
        """Yield tensors (batch, width), each row once per epoch, in the order of the seed."""
        with contextlib.closing(self._batches()) as batches:
            while True:
                with contextlib.nullcontext() if self.meter is None else self.meter.timed():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch.x

    def _batches(self) -> "Generator[Batch]":
        config = self.config
        return self.cache.batches(
            self.hook_points,
            batch=config.batch,
            seed=config.seed,
            start=self.start,
            epochs=config.epochs,
            part=self.part,
        )


def train(
    cache: "ActivationCache",
    config: TrainConfig,
    path: str | Path,
    *,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Train every entry of `config.saes` side by side; returns each dictionary's directory.

    A run that was stopped goes on from its newest checkpoint, bit-equal on the CPU to one that
    was not. A directory has one training at a time. The curves lie in `path/logs`, as CSV and for
    TensorBoard; `curves.draw(path)` makes a picture of them. Under torchrun or srun the processes
    train together (docs/cluster.md).

    Raises:
        ValueError: If the cache gives less than one batch, or has not the hook points, or W&B is
            asked for and not installed.
        FloatingPointError: If the loss is not finite in three steps in a row.
        CacheBusyError: If another process trains in this directory.
        RankError: If another process of the run died or does not answer.
        Stopped: After SIGTERM or SIGUSR1, once a checkpoint is written.
    """
    path = Path(path)
    with (
        joined(config.latent_shards, config.rank_timeout_seconds) as ranks,
        io.only_one(path / ".train.lock", f"the training in {path}")
        if ranks.is_first
        else contextlib.nullcontext(),
    ):
        try:
            return _train(cache, config, path, ranks, progress)
        except Stopped as stop:
            if stop.wants_requeue and ranks.is_first:
                requeue()
            raise


def _train(
    cache: "ActivationCache", config: TrainConfig, path: Path, ranks: Ranks, progress: Progress
) -> dict[str, Path]:
    require_wandb(config.wandb)
    where = sites(config.saes, cache.hook_points)
    points = dict.fromkeys(p for s in where.values() for p in (*s.inputs, *s.outputs))
    cache = looked_at(cache, tuple(points), config.max_norm)
    precision = resolve_precision(config.precision)
    ends = any(entry.end_to_end for entry in config.saes.values())
    made_by = require_contexts(cache, ranks.world.size) if ends else None
    _require_memory(cache, config, where, precision, ranks)
    source, live = cache, {}
    if config.source == "live":
        place = path / CHECKPOINTS
        source = live_rows(cache, config, tuple(points), place, ranks, progress)
        live = {"live": record_of(source, config, ranks)}
    total_steps = source.n_batches(batch=config.batch, epochs=config.epochs)
    _require_batch(source, config, total_steps, ranks)
    identity = _identity(cache, config, precision, live)
    steps = {
        name: TrainStep(
            new_autoencoder(cache, where[name], entry, config.seed).to(device()),
            entry,
            total_steps,
            precision=precision,
            ranks=ranks,
        )
        for name, entry in config.saes.items()
    }
    read = reads(where, {point: cache.d_model(point) for point in cache.hook_points})
    rows = CacheRows(source, read.hook_points, config)
    rows.part = ranks.rows.share(config.batch)
    saver = Saver(path / CHECKPOINTS, identity, config, ranks, progress)
    rows.meter = meter = Meter(steps, config.batch, config.log_every, ranks)
    module = SAEModule(steps, total_steps, saver, read.columns, meter)
    found = checkpoint.load_newest(path / CHECKPOINTS, identity)
    ranks.require_same(0 if found is None else found[0], "the newest checkpoint's step")
    if found is not None:
        module.load_full_state(*found)
        rows.start = found[0]
    if module.n_steps < total_steps:
        made = []
        if ranks.is_first:
            made = loggers(path / curves.LOGS, rows.start, config.wandb, identity)
        _fit(module, rows, made)
        if module.n_steps < total_steps:
            raise OSError(
                f"{cache.path} must give {total_steps} batches of {config.batch} rows, got "
                f"{module.n_steps}; run `sae verify`"
            )
        saver.save(module.n_steps, module.full_state())
    provenance = {**_made_from(cache), **live, "rows": total_steps * config.batch}
    provenance |= {"seed": config.seed, "precision": precision, **_surroundings()}
    finished = _finished(steps, cache, made_by, config.seed, progress)
    if n_left_out := getattr(source, "n_left_out", 0):
        provenance["rows_left_out"] = {"max_norm": config.max_norm, "n": n_left_out}
    _save(steps, finished, where, path, provenance)
    ranks.require_same(total_steps, "the number of steps")  # and all is there when one returns
    return {name: path / name for name in steps}


def _require_batch(
    cache: "ActivationCache | ActivationStream", config: TrainConfig, total_steps: int, ranks: Ranks
) -> None:
    """Refuse a batch that the cache cannot fill, or that leaves a process without a row."""
    if total_steps < 1:
        n_rows = len(cache.rows(TRAINING_SPLITS))
        rule = f"be at most {n_rows}, the cache's rows of {' and '.join(TRAINING_SPLITS)}"
        raise MonosemaError(f"train.batch must {rule}, got {config.batch}; lower it")
    if config.batch < ranks.rows.size:
        rule = f"be at least {ranks.rows.size}, a row for each process that shares it"
        raise MonosemaError(f"train.batch must {rule}, got {config.batch}; raise it")


def _finished(
    steps: dict[str, TrainStep],
    cache: "ActivationCache",
    made_by: CacheConfig | None,
    seed: int,
    progress: Progress,
) -> dict[str, tuple[SparseAutoencoder, dict[str, float]]]:
    """Train the dictionaries whose entries end so by what the model of the cache predicts."""
    if made_by is None:
        return {}
    from activations_cache.builder import load_on_device

    model = load_on_device(made_by, progress).model
    tuned = {name: step for name, step in steps.items() if step.config.end_to_end is not None}
    return {
        name: fine_tuned(
            step.whole(), step.config, cache, model,
            seed=seed, precision="bf16" if step.bf16 else "fp32", progress=progress,
        )
        for name, step in tuned.items()
    }  # fmt: skip


def _save(
    steps: dict[str, TrainStep],
    finished: dict[str, tuple[SparseAutoencoder, dict[str, float]]],
    where: dict[str, Sites],
    path: Path,
    provenance: dict[str, Any],
) -> None:
    """Write every dictionary, as its steps or the end of its training left it."""
    for name, step in steps.items():
        whole, end = finished.get(name) or (step.whole(), None)
        if step.ranks.is_first:
            own = {"hook_points": where[name].inputs, "recipe": asdict(step.config)}
            own |= {} if end is None else {"end_to_end": end}
            save(whole, path / name, {**provenance, **own})


def _made_from(cache: "ActivationCache") -> dict[str, Any]:
    """The cache, its model and the length of its contexts, for the provenance."""
    context = cache.manifest.plan.context
    return {"cache": cache.fingerprint, "model": _model_of(cache), "context": context}


def _surroundings() -> dict[str, Any]:
    """What computes, for the provenance."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def _model_of(cache: "ActivationCache") -> dict[str, Any]:
    """The model that made a cache: its hashes, its path and its dtype, as far as they are known."""
    known = [cache.identity.get("model"), cache.manifest.provenance.get("model")]
    return {key: value for part in known if isinstance(part, dict) for key, value in part.items()}


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the device computes it natively, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def _require_memory(
    cache: "ActivationCache",
    config: TrainConfig,
    where: dict[str, Sites],
    precision: str,
    ranks: Ranks,
) -> None:
    """Refuse dictionaries that this process cannot hold."""
    on_gpu = torch.cuda.is_available()
    needed = {
        name: estimate(
            entry,
            sum(cache.d_model(point) for point in where[name].inputs),
            -(-config.batch // ranks.rows.size),
            d_out=sum(map(cache.d_model, where[name].outputs or where[name].inputs)),
            precision=precision,
            shards=config.latent_shards,
            on_gpu=on_gpu,
        ).total
        for name, entry in config.saes.items()
    }
    free = torch.cuda.mem_get_info(device())[0] if on_gpu else free_on_cpu()
    require_memory(sum(needed.values()), free, ", ".join(needed), device().type)


def _identity(
    cache: "ActivationCache",
    config: TrainConfig,
    precision: str,
    live: Mapping[str, Any] | None = None,
) -> str:
    """Digest of what is trained on what; not by how many processes, nor what is logged."""
    found = to_dict(config, all_keys=False)
    for name in ("latent_shards", "rank_timeout_seconds", "log_every", "wandb"):
        del found[name]
    found.pop("max_norm", None)
    if live or getattr(cache, "n_left_out", 0):  # else the rows are those of every limit
        found["max_norm"] = config.max_norm
    made_from = {"cache": cache.fingerprint, "train": found, "precision": precision}
    return digest(made_from | dict(live or {}))


def _fit(module: SAEModule, rows: CacheRows, made: list[Logger]) -> None:
    """Run Lightning's loop; it is told of one process, as the steps talk to the others."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in NOT_OURS:
            warnings.filterwarnings("ignore", message=text)
        trainer = lightning.Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=[local_rank()] if torch.cuda.is_available() else 1,
            plugins=LightningEnvironment(),
            max_epochs=1,
            logger=made,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = iter(rows)
        try:
            trainer.fit(module, itertools.repeat(batches))
        except Stopped:
            raise
        except SystemExit as stop:  # Lightning's answer to Ctrl-C, which says nothing
            raise KeyboardInterrupt from stop
        finally:
            batches.close()  # or a model goes on running for nobody
