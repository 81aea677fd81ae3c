"""Fine-tuning by what the model predicts: KL(model || model with the dictionary's output in it).

Karvonen 2025 (arXiv 2503.17272) adds it to the loss on rows for a short end of the training; Braun
et al. 2024 (arXiv 2405.12241) train by it from the start.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations_cache.hooks import Edit, edit
from activations_cache.probe import require_next_token
from monosema.checks import MonosemaError, require
from sae.train.forward.common import Forward
from sae.train.step import StepMetrics, TrainStep


class EndToEndMetrics(NamedTuple):
    """Figures of one step."""

    kl: Float[Tensor, ""]
    """Mean over the predictions, in nats; from float32 log-probabilities."""
    rows: StepMetrics
    """Of the rows that the dictionary reads; `loss` is the sum that was minimised."""


class EndToEndStep:
    """A TrainStep whose rows come from a model that also tells what they are good for."""

    def __init__(
        self,
        step: TrainStep,
        model: nn.Module,
        hook_point: str = "",
        *,
        coefficient: float | None = None,
        skip_positions: int = 1,
    ) -> None:
        """Take a step, which changes its dictionary in place, and a model, which stays.

        Args:
            step: Losses on rows and the optimiser, with as many steps as there will be here.
            model: A causal language model in evaluation mode whose weights need no gradient.
            hook_point: What a dictionary that records none reads and predicts.
            coefficient: Weight of the KL; by default what makes it as large as the loss on rows.
            skip_positions: The stream at the first positions stays the model's own.

        Raises:
            ValueError: If the model's weights would get gradients, it does not predict the next
                token, or rows are to come in parts.
        """
        n = step.config.accumulate
        require(n == 1, "accumulate", "be 1 for end-to-end training", n)
        if any(weight.requires_grad for weight in model.parameters()):
            raise MonosemaError(
                "model must have weights without gradients, got some that need them"
            )
        # A model that sees all tokens sees the padding too, and its logits are of no next token.
        require_next_token(model, "to train on what it predicts")
        self.step, self.model = step, model
        self.coefficient, self.skip_positions = coefficient, skip_positions
        self.read, self.predicted = step.autoencoder.config.sites(hook_point)

    def __call__(self, input_ids: Int[Tensor, "example pos"]) -> EndToEndMetrics:
        """Train on these contexts; a token id below 0 is padding at the end."""
        mask = (input_ids >= 0) & (torch.arange(input_ids.shape[1]) >= self.skip_positions).to(
            input_ids.device
        )
        streams: dict[str, Tensor] = {}
        with torch.no_grad():
            watch = {p: _watch(streams, p) for p in (*self.read, *self.predicted)}
            base = self._log_probabilities(input_ids, mask, watch)
        x = torch.cat([streams[point][mask].float() for point in self.read], dim=1)
        target = torch.cat([streams[point][mask].float() for point in self.predicted], dim=1)
        autoencoder, kl = self.step.autoencoder, x.new_zeros(())

        def loss_of(found: Forward) -> Float[Tensor, ""]:
            nonlocal kl
            widths = [part.width for part in autoencoder.config.slices_out]
            parts = autoencoder(x).split(widths, dim=1)
            edits = {p: _put(part, mask) for p, part in zip(self.predicted, parts, strict=True)}
            spliced = self._log_probabilities(input_ids, mask, edits)
            found_kl = (base.exp() * (base - spliced)).sum(dim=-1).mean()
            kl = found_kl.detach()
            weight = self.coefficient
            if weight is None:
                weight = float(found.loss.detach() / kl) if float(kl) > 0 else 0.0
            return found.loss + weight * found_kl

        others = target if self.step.config.outputs else None
        metrics = self.step(x, others, loss_of=loss_of)
        return EndToEndMetrics(kl, metrics)

    def _log_probabilities(
        self,
        input_ids: Int[Tensor, "example pos"],
        mask: Bool[Tensor, "example pos"],
        edits: Mapping[str, Edit],
    ) -> Float[Tensor, "batch vocab"]:
        with edit(self.model, edits):
            logits = self.model(input_ids=input_ids.clamp_min(0), use_cache=False).logits
        return logits[mask].float().log_softmax(dim=-1)


def _watch(streams: dict[str, Tensor], hook_point: str) -> Edit:
    def watch(stream: Float[Tensor, "example pos _"], _: Tensor) -> Float[Tensor, "example pos _"]:
        streams[hook_point] = stream.clone()
        return stream

    return watch


def _put(rows: Float[Tensor, "row _"], mask: Bool[Tensor, "example pos"]) -> Edit:
    def put(stream: Float[Tensor, "example pos _"], _: Tensor) -> Float[Tensor, "example pos _"]:
        new = stream.clone()
        new[mask] = rows.to(stream)
        return new

    return put
