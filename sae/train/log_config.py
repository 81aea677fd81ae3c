"""Where the figures of a training run go, as frozen configs; no torch here."""

from dataclasses import dataclass

from activations_cache.checks import require


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases, beside CSV and TensorBoard; needs `pip install 'monosema[wandb]'`."""

    project: str
    """Where the run stands there."""
    name: str | None = None
    """How it is called there; the service's own choice when absent."""
    offline: bool = False
    """Write to `logs/wandb` and send nothing; `wandb sync` sends it later."""

    def __post_init__(self) -> None:
        """Check names."""
        require(bool(self.project), "project", "name a project", self.project)
