"""Whole TopK training steps of other projects, as their trainers take them, where installed."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[], object]


def sparsify_step(x: Tensor, d_sae: int, k: int) -> Step:
    """EleutherAI's sparsify: its coder, its projection and norm, Adam, its dead-latent counts."""
    from sparsify import SparseCoder, sparse_coder, utils
    from sparsify.config import SparseCoderConfig

    sparse_coder.decoder_impl = utils.eager_decode  # its Triton decoder needs a GPU
    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=k), dtype=x.dtype)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3, fused=True)
    silent = torch.zeros(d_sae, dtype=torch.int64)

    def run() -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        out.fvu.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    return run


def dictionary_learning_step(x: Tensor, d_sae: int, k: int) -> Step:
    """The trainer of dictionary_learning, `update` as it is."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10_000, activation_dim=x.shape[1], dict_size=d_sae, k=k, layer=0, lm_name="",
        seed=0, device="cpu",
    )  # fmt: skip
    return lambda: trainer.update(1, x)  # step 0 computes a geometric median


def sae_lens_step(x: Tensor, d_sae: int, k: int) -> Step:
    """SAELens: its training forward, then what its trainer does with it."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    passes, fired = torch.zeros(d_sae), torch.zeros(d_sae)

    def run() -> None:
        out = sae.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=passes > 1000, n_training_steps=1,
                is_logging_step=False,
            )
        )  # fmt: skip
        with torch.no_grad():
            fires = out.feature_acts.bool().float()
            passes.add_(1)
            passes[fires.sum(-2).bool()] = 0
            fired.add_(fires.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


STEPS = {
    "sparsify": sparsify_step,
    "dictionary_learning": dictionary_learning_step,
    "sae_lens": sae_lens_step,
}
"""By the name of the module that must be importable."""


def peer_steps(x: Tensor, d_sae: int, k: int) -> dict[str, Step]:
    """Make the steps of the peers that are installed."""
    return {
        f"topk, {name}": make(x, d_sae, k)
        for name, make in STEPS.items()
        if importlib.util.find_spec(name) is not None
    }
