"""Train a dictionary on any rows with a bare loop: no cache, no model, no Lightning.

The rows are sparse mixes of 64 known directions; at the end each direction is looked for among
the latents.
"""

# %%
import torch

from sae.architecture import TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train import DictionaryConfig, TrainStep
from sae.train.config import Adam, AuxK

generator = torch.Generator().manual_seed(0)
truth = torch.nn.functional.normalize(torch.randn(64, 24, generator=generator), dim=1)


def rows(n: int) -> torch.Tensor:
    """Rows in which about 3 of the 64 directions are present."""
    present = torch.rand(n, 64, generator=generator) < 3 / 64
    return (present * (1 + torch.rand(n, 64, generator=generator))) @ truth


# %%
config = DictionaryConfig(
    d_sae=64,
    activation=TopK(k=3),
    auxk=AuxK(coefficient=0.5),
    dead_after_tokens=2_000,
    optimizer=Adam(lr=1e-2, decay=0.5),
)
dictionary = SparseAutoencoder(config.architecture(d_in=24, input_scale=1.0))
initialise(dictionary, generator)
step = TrainStep(dictionary, config, total_steps=600)
for _ in range(600):
    metrics = step(rows(256))

# %%
cosine = dictionary.W_dec @ truth.T
recovered = (cosine.max(dim=0).values > 0.9).float().mean()
print(f"fvu {metrics.fvu:.3f}, l0 {metrics.l0:.1f}, recovered {recovered:.0%} of 64 directions")
