"""What a term of the loss is to the rest of training, and a loss of the user's own; no torch here.

The terms themselves are in `sae.train.loss_config`, their formulas in `sae.losses`.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from monosema.checks import MonosemaError, require
from sae.architecture import Facts

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
NEEDS = ("output", "latents", "dense")
"""What a loss can look at (`sae.losses.Loss`)."""
COMPOSED = 7.0
"""Dense matrices that a dense dictionary holds where torch differentiates it."""
FROM_SPARSE = 3.0
"""Dense matrices that a loss which needs all of d_sae holds beside sparse latents."""


class LossFacts(NamedTuple):
    """What the rest of training has to know of a term of the loss beside its formula."""

    trains: tuple[str, ...] = ("sparse", "dense", "gated")
    """The forward passes that have it, as an activation's facts name them."""
    choices: tuple[str, ...] = ("none", "row", "batch", "group")
    """The choices of latents that it fits."""
    thresholds: tuple[str, ...] = ("none", "one", "per latent")
    """The thresholds that it fits."""
    is_penalty: bool = False
    """Whether it makes latents sparse; a dictionary without a choice needs one such term."""
    in_one_op: bool = True
    """Whether a dense dictionary that has it can still be trained by one kernel."""
    is_sharded: bool = True
    """Whether it can be computed where the latents are split among processes."""


class Sizes(NamedTuple):
    """What a term's memory depends on, in bytes."""

    weights: int
    """The encoder and the decoder in fp32."""
    dense: int
    """A matrix (batch, d_sae) in fp32."""
    rows: int
    """The rows that are read, in fp32."""
    precision: str
    """"fp32" or "bf16"."""
    dead: float
    """The share of the latents that is dead."""


class Term:
    """What every term of the loss answers; those that differ say so."""

    facts: ClassVar[LossFacts] = LossFacts()

    @classmethod
    def suits(cls, activation: Facts) -> bool:
        """Whether a dictionary with this activation can have the term."""
        return (
            activation.trains in cls.facts.trains
            and activation.choice in cls.facts.choices
            and activation.threshold in cls.facts.thresholds
        )

    @property
    def whole_batch(self) -> str | None:
        """What of the term needs the whole batch: a field as `.name`, "" for all of it; or None."""
        return None

    def memory(self, sizes: Sizes) -> float:  # noqa: ARG002
        """Bytes that it holds at the peak of a step."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class OwnLoss(Term):
    """A loss of the user's own, added to the others (docs/training.md has an example)."""

    loss: str
    """`module:Class`; objects of the class are called with `sae.losses.StepTensors`."""
    coefficient: float = 1.0
    """Its weight."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class, by name."""

    facts: ClassVar = LossFacts(in_one_op=False, is_sharded=False)

    def __post_init__(self) -> None:
        """Check the form of the name; the module is imported when training begins."""
        is_name = _NAME.fullmatch(self.loss) is not None
        require(is_name, "loss", "have the form module:Class", self.loss)

    def memory(self, sizes: Sizes) -> float:
        """What the class says it needs of a sparse dictionary's latents; the rest is counted."""
        needs = getattr(self._class(), "needs", "output")
        return FROM_SPARSE * sizes.dense if needs == "dense" else 0.0

    def make(self) -> Any:
        """Import the class and make the loss.

        Raises:
            ValueError: If there is no such class, or it refuses the settings.
        """
        try:
            made = self._class()(**self.settings)
        except (TypeError, ValueError) as error:
            raise MonosemaError(
                f"losses.settings must be what {self.loss} takes, got {self.settings!r} ({error})"
            ) from error
        is_loss = callable(made) and getattr(made, "needs", None) in NEEDS
        rule = f"name a class whose objects can be called and have `needs`, one of {NEEDS}"
        require(is_loss, "losses.loss", rule, self.loss)
        return made

    def _class(self) -> Callable[..., Any]:
        module, _, name = self.loss.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise MonosemaError(
                f"losses.loss must name a class that can be imported, got {self.loss!r} ({error}); "
                "put its folder on PYTHONPATH"
            ) from error
