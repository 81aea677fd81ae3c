"""Training of a cross-layer transcoder: one TrainStep per source, on what the others leave.

The gradient of the joint squared error in one source's weights is that of the source's own error on
the residual of the others, held still; so each source's ordinary step is a step on the joint loss.
Only clipping is each source's own. One process.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from monosema.checks import require
from sae import losses
from sae.cross_layer import CrossLayerTranscoder
from sae.train.config import DictionaryConfig
from sae.train.step import StepMetrics, TrainStep


class CrossLayerMetrics(NamedTuple):
    """Figures of one step."""

    fvu: Float[Tensor, ""]
    """Joint squared error over this batch's variance, of all places, in the dictionary's units."""
    l0: Float[Tensor, ""]
    """Mean number of latents that fire in a row, of all sources together."""
    sources: tuple[StepMetrics, ...]
    """Those of each source's step; its FVU is of what the others left."""


class CrossLayerStep:
    """One step of every source per call; `state_dict` holds all that changes."""

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        config: DictionaryConfig,
        total_steps: int,
        *,
        precision: str = "fp32",
    ) -> None:
        """Take the transcoder, which the steps change in place.

        Args:
            transcoder: Its sources are initialised and record their hook points.
            config: Losses and optimiser of every source; the hook points are the sources' own.
            total_steps: Length of the schedules.
            precision: As of TrainStep.

        Raises:
            ValueError: If the activation fires otherwise in training than afterwards.
        """
        kind = config.activation.kind
        require(kind != "batchtopk", "activation.kind", "not be 'batchtopk' across layers", kind)
        rule = "be absent across layers"
        require(config.k_anneal is None, "k_anneal", rule, config.k_anneal)
        self.transcoder = transcoder
        self.steps: list[TrainStep] = []
        for source in transcoder.autoencoders:
            read, predicted = source.config.hook_points_or("")
            entry = replace(config, inputs=read, outputs=predicted, skip=source.config.skip)
            self.steps.append(TrainStep(source, entry, total_steps, precision=precision))

    def __call__(
        self, x: Sequence[Float[Tensor, "batch _"]], targets: Sequence[Float[Tensor, "batch _"]]
    ) -> CrossLayerMetrics:
        """Train on the rows that each source reads and those of each place that is predicted."""
        pairs = zip(self.transcoder.autoencoders, x, strict=True)
        with torch.no_grad():
            outputs = [source(rows) for source, rows in pairs]
        totals = self.transcoder.total(outputs)
        residual = [v - x_hat for v, x_hat in zip(targets, totals, strict=True)]
        metrics = tuple(
            step(rows, torch.cat(residual[layer:], dim=1) + outputs[layer])
            for layer, (step, rows) in enumerate(zip(self.steps, x, strict=True))
        )
        first = self.transcoder.autoencoders[0]
        v = first.scaled_out(torch.cat([*targets], dim=1))
        error = losses.squared_error(v, first.scaled_out(torch.cat(totals, dim=1)))
        l0 = torch.stack([m.l0 for m in metrics]).sum()
        return CrossLayerMetrics(error / losses.batch_variance(v), l0, metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs, as flat named tensors."""
        return {
            f"{layer}/{name}": tensor
            for layer, step in enumerate(self.steps)
            for name, tensor in step.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`'s tensors."""
        for layer, step in enumerate(self.steps):
            of = f"{layer}/"
            own = {n.removeprefix(of): t for n, t in state.items() if n.startswith(of)}
            step.load_state_dict(own)
