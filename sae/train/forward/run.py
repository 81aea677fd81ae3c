"""The forward pass that fits the activation."""

from typing import assert_never

from jaxtyping import Float
from torch import Tensor

from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import dense, gated, sparse
from sae.train.forward.result import Forward, Moment, autocast


def forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    moment: Moment,
) -> Forward:
    """Losses of rows in the dictionary's units."""
    with autocast(u.device, moment.bf16):
        match autoencoder.config.activation:
            case TopK() as activation:
                return sparse.topk(autoencoder, config, activation, u, moment)
            case BatchTopK() as activation:
                return sparse.batch_topk(autoencoder, config, activation, u, moment)
            case ReLU() | JumpReLU():
                return dense.forward(autoencoder, config, u, moment)
            case Gated():
                return gated.forward(autoencoder, config, u, moment)
            case _:
                assert_never(autoencoder.config.activation)
