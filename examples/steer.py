"""Put a dictionary into a model and steer it, on a tiny model with random weights.

The directions are known here, so what steering does can be checked: the stream moves along one
direction by exactly what was asked for, on every generated token, with the KV cache on.
"""

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from activations_cache import capture
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.steer import Edit, Steering

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).eval().requires_grad_(False)
dictionary = SparseAutoencoder(SAEConfig(d_in=32, d_sae=128, activation=TopK(k=8)))
initialise(dictionary, torch.Generator().manual_seed(1))

# %%
# `sae.load("runs/demo/train/topk")` gives a trained one with its hook point and statistics.
dictionary = dictionary.requires_grad_(False).at("model.layers.1:out")
edit = Edit(dictionary, latent=7, add="2x norm")  # moves the stream by twice its norm
prompt = torch.tensor([[5, 17, 23, 42]])
with Steering(model, [edit], positions="generated") as steering:
    text = model.generate(prompt, max_new_tokens=12, do_sample=False)
(count,) = steering.counts
print(f"{count.name}: {count.n_chosen} of {count.n_seen} tokens, |h' - h| / |h| = "
      f"{count.relative_size:.2f}")  # fmt: skip

# %%
with capture(model, ["model.layers.1:out"]) as run:
    base = run(text)["model.layers.1:out"]
with Steering(model, [edit]), capture(model, ["model.layers.1:out"]) as run:
    steered = run(text)["model.layers.1:out"]
moved = (steered - base)[0, 1:]
cosine = torch.nn.functional.cosine_similarity(moved, dictionary.direction(7), dim=1)
print(f"recovered {(cosine > 0.999).float().mean():.0%} of the moves along the direction")
