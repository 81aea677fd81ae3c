"""The recipes of other projects on a world whose features are known, where installed.

Each trains by its own classes with its own defaults (learning rate, AuxK, schedule), at the same k,
width, batches and rows as ours; what it saves is read by `sae.load`, as a user's file would be.
Beside the defaults stand the settings that the authors recommend where these differ: batches of
1,024 (SAELens, documentation of SynthSAEBench), and a rate that falls over the last fifth
(dictionary_learning, its demonstration), with the warm-up's default of 1,000 steps made the share
that it has in their shortest published run of 24,414 steps. sparsify's are its defaults.
"""

import importlib
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.pretrained import load

Rows = Callable[[], Iterator[Tensor]]
Train = Callable[[Rows, int, int, int, int, Path], None]
SHARES = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Groups of Matryoshka; they have no default, so they are those of our own recipe."""


def sae_lens(kind: str, at_once: int = 1) -> Train:
    """SAELens: its trainer as it is; `kind` topk, batchtopk or matryoshka_batchtopk.

    `at_once` batches are put together.
    """

    def train(rows: Rows, n_steps: int, d_sae: int, k: int, seed: int, folder: Path) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(seed)
        stream = map(torch.cat, zip(*[rows()] * at_once, strict=False))
        first = next(stream)
        made, config = get_sae_training_class(kind)
        more = {"matryoshka_widths": _ends(d_sae)[:-1]} if "matryoshka" in kind else {}
        coder = made(config(d_in=first.shape[1], d_sae=d_sae, k=k, **more))
        options = SAETrainerConfig(
            total_training_samples=n_steps // at_once * len(first),
            train_batch_size_samples=len(first),
            lr_end=3e-5,  # a tenth of lr, as its runner derives it; its schedule is constant
            logger=LoggingConfig(log_to_wandb=False),
        )
        SAETrainer(options, coder, itertools.chain([first], stream)).fit()
        coder.save_inference_model(str(folder))

    return train


def dictionary_learning(
    module: str, trainer: str, dictionary: str, *, recommended: bool = False
) -> Train:
    """dictionary_learning: `update` of a trainer, step by step."""

    def train(rows: Rows, n_steps: int, d_sae: int, k: int, seed: int, folder: Path) -> None:
        result = importlib.import_module(f"dictionary_learning.trainers.{module}")
        more = {"group_fractions": list(SHARES)} if "matryoshka" in module else {}
        if recommended:
            more |= {"warmup_steps": n_steps * 1000 // 24_414, "decay_start": n_steps * 4 // 5}
        stream = rows()
        first = next(stream)
        theirs = getattr(result, trainer)(
            steps=n_steps, activation_dim=first.shape[1], dict_size=d_sae, k=k, layer=0,
            lm_name="", seed=seed, device="cpu", **more,
        )  # fmt: skip
        theirs.update(0, first)
        for step, x in enumerate(stream, 1):
            theirs.update(step, x)
        torch.save(theirs.ae.state_dict(), folder / "ae.pt")
        record = {
            "dict_class": dictionary,
            "activation_dim": first.shape[1],
            "dict_size": d_sae,
            "k": k,
        }
        (folder / "config.json").write_text(json.dumps({"trainer": record, "buffer": {}}))

    return train


def sparsify(rows: Rows, n_steps: int, d_sae: int, k: int, seed: int, folder: Path) -> None:
    """sparsify: its coder in its trainer's loop, by its default optimiser, signum."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig, sparse_coder, utils
    from sparsify.sign_sgd import SignSGD

    del n_steps
    torch.manual_seed(seed)
    sparse_coder.decoder_impl = utils.eager_decode  # its Triton decoder needs a GPU
    stream = rows()
    first = next(stream)
    coder = SparseCoder(first.shape[1], SparseCoderConfig(num_latents=d_sae, k=k))
    coder.b_dec.data = first.mean(0)
    rate = 5e-3 / (d_sae / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
    optimizer.train()
    for x in itertools.chain([first], stream):
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    coder.save_to_disk(folder)


THEIRS = {
    "topk": ("top_k", "TopKTrainer", "AutoEncoderTopK"),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer", "BatchTopKSAE"),
    "matryoshka": (
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        "MatryoshkaBatchTopKSAE",
    ),
}
"""Module, trainer and dictionary of dictionary_learning."""

KINDS = {"topk": "topk", "batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
"""Of SAELens."""

RECIPES: dict[str, tuple[str, Train]] = {
    **{f"SAELens {name}": ("sae_lens", sae_lens(kind)) for name, kind in KINDS.items()},
    **{
        f"SAELens {name}, recommended": ("sae_lens", sae_lens(kind, at_once=4))
        for name, kind in KINDS.items()
    },
    **{
        f"dictionary_learning {name}{suffix}": (
            "dictionary_learning",
            dictionary_learning(*parts, recommended=bool(suffix)),
        )
        for suffix in ("", ", recommended")
        for name, parts in THEIRS.items()
    },
    "sparsify topk": ("sparsify", sparsify),
}
"""The module that must be importable, and the training."""


def train_peers(
    rows: Rows, n_steps: int, d_sae: int, k: int, seed: int
) -> dict[str, SparseAutoencoder]:
    """Train the recipes of the peers that are installed.

    Args:
        rows: Gives the stream of batches, the same each time.
        n_steps: How many batches it has.
        d_sae: Latents.
        k: Active latents of a row.
        seed: Of the initial weights.
    """
    results = {}
    for name, (module, train) in RECIPES.items():
        if importlib.util.find_spec(module) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            train(rows, n_steps, d_sae, k, seed, Path(folder))
            results[name] = load(folder, allow_pt=True)
    return results


def _ends(d_sae: int) -> list[int]:
    """Ends of the groups."""
    return [round(sum(SHARES[: i + 1]) * d_sae) for i in range(len(SHARES))]
