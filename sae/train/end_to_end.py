"""Fine-tuning by what the model predicts: KL(model || model with the dictionary's output in it).

Karvonen 2025 (arXiv 2503.17272) adds it to the loss on rows for a short end of the training; Braun
et al. 2024 (arXiv 2405.12241) train by it from the start.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations_cache.config import TRAINING_SPLITS, CacheConfig
from activations_cache.hooks import Edit, edit
from activations_cache.probe import require_next_token
from monosema.checks import MonosemaError, Progress, require, silent
from sae.autoencoder import SparseAutoencoder
from sae.config import from_dict
from sae.train.config import DictionaryConfig
from sae.train.forward.common import Forward
from sae.train.optim_config import Adam, EndToEnd
from sae.train.step import StepMetrics, TrainStep

if TYPE_CHECKING:
    from activations_cache import ActivationCache


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
        self.read, self.predicted = step.autoencoder.config.hook_points_or(hook_point)

    def __call__(
        self,
        input_ids: Int[Tensor, "example pos"],
        gives_row: Bool[Tensor, "example pos"] | None = None,
    ) -> EndToEndMetrics:
        """Train on these contexts; a token id below 0 is padding at the end.

        `gives_row` says where the stream does not stay the model's own; without it everywhere but
        in padding and at the first positions.
        """
        mask = (input_ids >= 0) & (torch.arange(input_ids.shape[1]) >= self.skip_positions).to(
            input_ids.device
        )
        mask = mask if gives_row is None else mask & gives_row
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


def require_contexts(cache: "ActivationCache", n_processes: int) -> CacheConfig:
    """Return what a cache was made from, if dictionaries can be trained on its contexts.

    Raises:
        MonosemaError: If it is of images, names no model, or mixes documents that see nothing of
            each other, or if several processes train.
    """
    recorded = cache.manifest.plan.request.get("config", {})
    what, rule = f"{cache.path}", "beside end_to_end"
    if not recorded.get("model") or not recorded.get("text"):
        raise MonosemaError(f"{what} must be of a language model's texts {rule}, got another one")
    if cache.examples.segment is not None:
        raise MonosemaError(f"{what} must have attention 'context' {rule}, got 'document'")
    require(n_processes == 1, "processes", f"be 1 {rule}", n_processes)
    return from_dict(CacheConfig, recorded, what)


def fine_tuned(
    autoencoder: SparseAutoencoder,
    entry: DictionaryConfig,
    cache: "ActivationCache",
    model: nn.Module,
    *,
    seed: int,
    precision: str = "fp32",
    progress: Progress = silent,
) -> tuple[SparseAutoencoder, dict[str, float]]:
    """Train a copy of a dictionary by what the model predicts, as `entry.end_to_end` says.

    Args:
        autoencoder: What was trained on rows.
        entry: How it was; its schedules are over.
        cache: Its contexts are read; rows that it has not, or leaves out, stay the model's own.
        model: The cache's, on the dictionary's device.
        seed: Of the order of the contexts.
        precision: As of TrainStep.
        progress: Called after each step.

    Returns:
        The dictionary, and the KL of its first and of its last steps.
    """
    settings = entry.end_to_end
    assert settings is not None, "only entries that ask for it come here"
    rows = cache.refs(cache.rows(TRAINING_SPLITS))
    tokens = cache.examples.tokens
    gives_row = torch.zeros(tokens.shape, dtype=torch.bool)
    gives_row[rows.example, rows.position] = True
    chosen = list(_contexts(gives_row, settings, seed))
    made = copy.deepcopy(autoencoder)
    rows_step = TrainStep(made, _over(entry, settings), len(chosen), precision=precision)
    point = cache.hook_points[0]  # for a dictionary that records none
    step = EndToEndStep(rows_step, model, point, coefficient=settings.coefficient, skip_positions=0)
    kl, device = [], made.dec_rows.device
    for n, contexts in enumerate(chosen, start=1):
        found = step(tokens[contexts].to(device), gives_row[contexts].to(device))
        kl.append(float(found.kl))
        progress(n, len(chosen), "steps end to end")
    some = max(len(kl) // 10, 1)
    first, last = (sum(part) / some for part in (kl[:some], kl[-some:]))
    return rows_step.whole(), {"kl_first": first, "kl_last": last, "steps": len(chosen)}


def _contexts(
    gives_row: Bool[Tensor, "example pos"], settings: EndToEnd, seed: int
) -> Iterator[Int[Tensor, " context"]]:
    """Yield the contexts of each step, in another order each time they are over."""
    n_rows = gives_row.sum(dim=1)
    known = n_rows.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        order = known[torch.randperm(len(known), generator=generator)]
        for contexts in order.split(settings.contexts):
            yield contexts
            done += int(n_rows[contexts].sum())
            if done >= settings.n_rows:
                return


def _over(entry: DictionaryConfig, settings: EndToEnd) -> DictionaryConfig:
    """The same losses as they are once their schedules are over, and a rate that falls to 0."""
    terms: dict[str, Any] = dict(entry.terms)
    ends = {n: replace(term, ramp=0.0) for n, term in terms.items() if hasattr(term, "ramp")}
    if entry.l0 is not None:
        ends["l0"] = replace(entry.l0, ramp=0.0, threshold_lr=None)
    if entry.tanh is not None:
        ends["tanh"] = replace(entry.tanh, ramp=0.0, threshold_lr=None)
    if getattr(entry.matryoshka, "until", None) is not None:
        ends["matryoshka"] = None
    optimizer = Adam(lr=settings.lr, decay=0.9)
    return replace(entry, k_anneal=None, accumulate=1, optimizer=optimizer, end_to_end=None, **ends)
