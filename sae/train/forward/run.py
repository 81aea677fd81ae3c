"""The forward pass that fits the activation."""

from typing import assert_never

from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import dense, sharded, sparse
from sae.train.forward.common import Forward, Moment, Rows, autocast, controlled


def forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
) -> Forward:
    """Losses of rows in the dictionary's units."""
    found = _forward(autoencoder, config, rows, moment)
    return found if config.control is None else controlled(config.control, found, moment)


def _forward(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Forward:
    trains = autoencoder.config.activation.facts.trains
    with autocast(rows.u.device, moment.bf16):
        if moment.ranks.latents.size > 1:
            return sharded.forward(autoencoder, config, rows, moment)
        match trains:
            case "sparse":
                return sparse.forward(autoencoder, config, rows, moment)
            case "dense":
                return dense.forward(autoencoder, config, rows, moment)
            case "gated":
                return dense.gated_forward(autoencoder, config, rows, moment)
            case _:
                assert_never(trains)
