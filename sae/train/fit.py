"""Train the dictionaries of a TrainConfig from a cache, with Lightning; resumable at any moment.

Where figures go: CSV files, TensorBoard, and Weights & Biases where it is asked for.
"""

import contextlib
import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import scalar

from activations_cache import io
from activations_cache.config import CacheConfig
from monosema.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.config import digest, to_dict
from sae.train import curves
from sae.train.checkpoint import Saver
from sae.train.config import TrainConfig, Wandb
from sae.train.cost import Needs, require_room
from sae.train.data_module import ActivationDataModule
from sae.train.end_to_end import fine_tuned, require_contexts
from sae.train.hook_points import hook_points_of
from sae.train.launch import joined, local_rank, requeue
from sae.train.live import live_rows, record_of
from sae.train.module import SAEModule, take_up
from sae.train.ranks import Ranks
from sae.train.signals import Stopped
from sae.train.step import TrainStep

if TYPE_CHECKING:
    from activations_cache import ActivationCache

CHECKPOINTS = "checkpoints"
STEPS_PER_TURN = 16
"""Steps of one turn of Lightning, whose own work takes a third of a millisecond on a slow core."""
NOT_OURS = (".*Experiment logs directory.*", ".*logging interval.*", ".*LeafSpec.*")
"""Lightning's warnings that do not apply: a killed run left logs behind; the last one is about
Lightning's own code."""


def train(
    cache: "ActivationCache",
    config: TrainConfig,
    path: str | Path,
    *,
    n_rows: int | None = None,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Train every entry of `config.saes` side by side; returns each dictionary's directory.

    A run that was stopped goes on from its newest checkpoint, bit-equal on the CPU to one that
    was not. A directory has one training at a time. The curves lie in `path/logs`, as CSV and for
    TensorBoard; `curves.draw(path)` makes a picture of them. Under torchrun or srun the processes
    train together (docs/cluster.md). With `n_rows` a cache's order ends after so many rows.

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
            return _train(cache, config, path, ranks, n_rows, progress)
        except Stopped as stop:
            if stop.wants_requeue and ranks.is_first:
                requeue()
            raise


def _train(
    cache: "ActivationCache",
    config: TrainConfig,
    path: Path,
    ranks: Ranks,
    n_rows: int | None,
    progress: Progress,
) -> dict[str, Path]:
    require_wandb(config.wandb)
    where = hook_points_of(config.saes, cache.hook_points)
    points = tuple(dict.fromkeys(p for s in where.values() for p in (*s.inputs, *s.outputs)))
    data = ActivationDataModule(
        cache,
        batch=config.batch,
        seed=config.seed,
        epochs=config.epochs,
        hook_points=points,
        max_norm=config.max_norm,
        steps_per_turn=STEPS_PER_TURN,
        n_rows=n_rows,
    )
    cache, precision = data.cache, resolve_precision(config.precision)
    ends = any(entry.end_to_end for entry in config.saes.values())
    made_by = require_contexts(cache, ranks.world.size) if ends else None
    require_room(Needs(config.saes, cache, points, config.batch, precision, ranks, device()))
    live: dict[str, Any] = {} if n_rows is None else {"n_rows": n_rows}
    if config.source == "live":
        place = path / CHECKPOINTS
        data.rows.source = source = live_rows(cache, config, points, place, ranks, progress)
        live |= {"live": record_of(source, config, ranks)}
    total_steps = data.rows.n_batches
    module = SAEModule(config)
    module.build(
        data, total_steps,
        precision=precision, ranks=ranks, device=device(), log_every=config.log_every,
    )  # fmt: skip
    identity = _identity(cache, config, precision, live)
    saver = Saver(path / CHECKPOINTS, identity, config, ranks, progress)
    with contextlib.closing(saver):
        _go_on(module, data, saver, path)
    finished = _finished(module.steps, cache, made_by, config.seed, progress)
    return module.save(path, finished, **live)


def _go_on(module: SAEModule, data: ActivationDataModule, saver: Saver, path: Path) -> None:
    """Train to the last step from the newest checkpoint on, and write one of it."""
    module.after_step, config = saver, saver.config
    take_up(module, saver)
    if module.n_steps == module.total_steps:
        return
    made = []
    if saver.ranks.is_first:
        made = loggers(path / curves.LOGS, module.n_steps, config.wandb, saver.identity)
    _fit(module, data, made, config.log_every)
    if module.n_steps < module.total_steps:
        raise OSError(
            f"{data.cache.path} must give {module.total_steps} batches of {config.batch} rows, got "
            f"{module.n_steps}; run `sae verify`"
        )
    saver.save(module.n_steps, module.full_state())


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


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the device computes it natively, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


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


def _fit(module: SAEModule, data: ActivationDataModule, made: list[Logger], every: int) -> None:
    """Run Lightning's loop; it is told of one process, as the steps talk to the others."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in NOT_OURS:
            warnings.filterwarnings("ignore", message=text)
        trainer = lightning.Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=[local_rank()] if torch.cuda.is_available() else 1,
            precision="bf16-mixed" if module.precision == "bf16" else "32-true",
            plugins=LightningEnvironment(),
            max_epochs=1,
            log_every_n_steps=every,
            logger=made,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, data)
        except Stopped:
            raise
        except SystemExit as stop:  # Lightning's answer to Ctrl-C, which says nothing
            raise KeyboardInterrupt from stop


def require_wandb(wanted: Wandb | None) -> None:
    """Refuse a run whose figures could not be logged as they should.

    Raises:
        ValueError: If Weights & Biases is asked for and not installed.
    """
    if wanted is not None and find_spec("wandb") is None:
        raise MonosemaError(
            "train.wandb must be absent where the package wandb is not installed, got project "
            f"{wanted.project!r}; pip install 'monosema[wandb]', or remove it"
        )


class OneEvent(TensorBoardLogger):
    """TensorBoard's files, with one event for all figures of a step instead of one for each.

    An event is some 60 us of the thread that trains and of one that writes beside it.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the figures of a step."""
        first, *rest = (scalar(name, value) for name, value in metrics.items())
        for other in rest:
            first.MergeFrom(other)
        self.experiment.file_writer.add_summary(first, step)


def loggers(logs: Path, start: int, wanted: Wandb | None, identity: str) -> list[Logger]:
    """The loggers of a run that begins at a step; a resumed one goes on in the same W&B run."""
    version = f"from-step-{start:08d}"
    made: list[Logger] = [
        CSVLogger(logs, name="csv", version=version, flush_logs_every_n_steps=1),
        OneEvent(logs, name="tensorboard", version=version),
    ]
    if wanted is not None:
        from lightning.pytorch.loggers import WandbLogger  # imports wandb when it is made

        made.append(
            WandbLogger(
                project=wanted.project,
                name=wanted.name,
                offline=wanted.offline,
                save_dir=logs,
                id=identity[:16],
                resume="allow",
            )
        )
    return made
