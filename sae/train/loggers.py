"""Where figures go: CSV files, TensorBoard, and Weights & Biases where it is asked for."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import scalar

from monosema.checks import MonosemaError
from sae.train.config import Wandb


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
