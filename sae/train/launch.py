"""Joining the processes that a launcher (torchrun, srun) started, one per device.

Which flags of a Trainer can work, and how one is told where a run goes on.
"""

import datetime
import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from activations_cache.shared_text import require_launched
from monosema.checks import MonosemaError
from sae.train.ranks import RankError, Ranks, connect

if TYPE_CHECKING:
    from sae.train.data_module import TrainingRows

PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16"}
"""Of a Trainer, and what each is in a config."""

logger = logging.getLogger(__name__)


@contextmanager
def joined(latent_shards: int, timeout_seconds: float) -> Iterator[Ranks]:
    """Join the other processes for as long as the context lasts; alone where nothing launched us.

    A process group that is there already is used and left as it is.

    Args:
        latent_shards: Processes that share one dictionary.
        timeout_seconds: How long a process waits for another one.

    Raises:
        RankError: If the others do not come in that time.
        ValueError: If the number of processes does not fit the shards or the GPUs.
    """
    environment = _launcher()
    if dist.is_initialized() or environment is None or environment.world_size() == 1:
        yield connect(latent_shards)
        return
    _join(environment, datetime.timedelta(seconds=timeout_seconds))
    try:
        yield connect(latent_shards)
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number among those of its machine, which is that of its GPU."""
    environment = _launcher()
    return 0 if environment is None else environment.local_rank()


def requeue() -> None:
    """Ask SLURM to start this job again when it can; does nothing outside of SLURM."""
    job = SLURMEnvironment.job_id()
    if job is None:
        return
    command = ["scontrol", "requeue", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        logger.warning("%s failed: %s", " ".join(command), done.stderr.strip())


def _launcher() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():  # first: torchrun may run inside of SLURM
        return TorchElasticEnvironment()
    require_launched()
    return SLURMEnvironment() if SLURMEnvironment.detect() else None


def _join(environment: ClusterEnvironment, timeout: datetime.timedelta) -> None:
    rank, size = environment.global_rank(), environment.world_size()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        here, n_gpus = environment.local_rank(), torch.cuda.device_count()
        if here >= n_gpus:
            raise MonosemaError(
                f"processes per machine must be at most its {n_gpus} GPUs, got one with the local "
                f"rank {here}; start fewer"
            )
        torch.cuda.set_device(here)
    address = f"tcp://{environment.main_address}:{environment.main_port}"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=address,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise RankError(
            f"all {size} processes must meet at {address} within {timeout.total_seconds():.0f} s, "
            f"got {reason} at rank {rank}; are all of them started?"
        ) from error


def count(trainer: lightning.Trainer, n_steps: int) -> None:
    """Set Lightning's `global_step`."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.total.ready = progress.total.completed = n_steps


def go_on(trainer: lightning.Trainer, n_steps: int, rows: "TrainingRows") -> None:
    """Bring Lightning's counters to where one of its own checkpoints after that step has them."""
    loop, at_once = trainer.fit_loop, rows.data.steps_per_turn
    n_turns = len(rows) if at_once > 1 else int(trainer.num_training_batches)
    per_pass = rows.n_batches if at_once > 1 else n_turns
    n_passes, within = divmod(n_steps - 1, per_pass)
    turn = n_turns - -(-(per_pass - within - 1) // at_once)
    count(trainer, n_steps)
    begun = {"ready": n_passes + 1, "started": n_passes + 1}
    ended = {"processed": n_passes, "completed": n_passes}
    loop.epoch_progress.load_state_dict({"total": begun | ended, "current": begun | ended})
    counts = [
        {"ready": n, "started": n, "processed": n, "completed": n - 1}
        for n in (n_passes * n_turns + turn, turn)
    ]
    batches = loop.epoch_loop.batch_progress
    is_last = turn == n_turns
    batches.load_state_dict({"total": counts[0], "current": counts[1], "is_last_batch": is_last})
    loop.epoch_loop._batches_that_stepped = batches.total.ready - 1
    loop.load_state_dict(loop.state_dict())  # which says that it goes on


def require_flags(trainer: lightning.Trainer) -> None:
    """Refuse flags of a Trainer that a TrainStep cannot follow, and name what it follows.

    Raises:
        MonosemaError: If there is one.
    """
    strategy, precision = trainer.strategy, str(trainer.precision)
    overfit, callbacks = vars(trainer)["overfit_batches"], vars(trainer)["callbacks"]
    known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
    parts = "saes.NAME.accumulate cuts a batch into parts"
    mean = "saes.NAME.ema keeps a mean of the weights"
    flags = {
        "gradient_clip_val": (
            not trainer.gradient_clip_val, "be absent", trainer.gradient_clip_val,
            "saes.NAME.optimizer.clip limits the gradients",
        ),
        "accumulate_grad_batches": (
            trainer.accumulate_grad_batches == 1, "be 1", trainer.accumulate_grad_batches, parts
        ),
        "precision": (
            precision in PRECISIONS, f"be one of {', '.join(PRECISIONS)}", precision,
            "weights stay in fp32; bf16-mixed is train.precision bf16",
        ),
        "overfit_batches": (
            not overfit, "be 0", overfit,
            "limit_train_batches shortens a pass",
        ),
        "strategy": (
            known and not isinstance(strategy, DeepSpeedStrategy),
            "be one device, ddp or ModelParallelStrategy", type(strategy).__name__,
            "train.latent_shards splits what one device cannot hold",
        ),
    }  # fmt: skip
    if isinstance(strategy, ModelParallelStrategy):
        flags["enable_checkpointing"] = (
            not trainer.checkpoint_callbacks, "be False beside ModelParallelStrategy", True,
            "it loads DTensors alone, and sae.train.Checkpoints is for all",
        )  # fmt: skip
    for kind, instead in (
        (GradientAccumulationScheduler, parts),
        (StochasticWeightAveraging, mean),
    ):
        absent = not any(isinstance(one, kind) for one in callbacks)
        flags[f"callbacks with {kind.__name__}"] = (absent, "be absent", "one", instead)
    for name, (holds, rule, value, instead) in flags.items():
        if not holds:
            raise MonosemaError(f"{name} must {rule}, got {value}; {instead}")
