"""Joining the processes that a launcher (torchrun, srun) started, one per device."""

import datetime
import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from monosema.checks import MonosemaError
from sae.train.ranks import RankError, Ranks, connect

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
    if not SLURMEnvironment.detect():
        return None
    try:
        return SLURMEnvironment()
    except RuntimeError as error:
        raise MonosemaError(
            "a SLURM job must set --ntasks-per-node, got --ntasks alone; start it with "
            "--ntasks-per-node=N, one task for each GPU of a node"
        ) from error


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
