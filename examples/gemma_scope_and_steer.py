r"""Load a dictionary of Gemma Scope and steer with it.

    python examples/gemma_scope_and_steer.py google/gemma-2-2b model.layers.20:out \
        google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71

Without arguments a tiny random model and a directory of the same form stand in. `sae inspect PATH`
says what was read; run `sae verify-release` on a release before you trust it.
"""

# %%
import torch

import sae
import stand_ins
from activations_cache import ModelConfig, load_model
from sae.steer import Edit, Splice, Steering, SweepConfig, Target
from sae.steer.sweep import sweep

given = stand_ins.arguments()
model, hook_point, release = given or (
    stand_ins.language_model(), "model.layers.1:out", stand_ins.gemma_scope(),
)  # fmt: skip

# %%
# The release does not name the place in this project's words, so it is given. Nothing is guessed:
# where two formats or two orientations fit, `format=` has to be named.
dictionary = sae.load(release, format="gemma_scope").at(hook_point)
loaded = load_model(ModelConfig(path=model, dtype="float32"))
prompt = loaded.tokenizer("the sister was in the garden", return_tensors="pt")
dictionary

# %%
# h' = h + (g(f) - f) d: what the dictionary does not reconstruct stays in the stream. Strengths are
# in units of the stream's norm here, because a release has no statistics; `"10x max"` needs those
# of `sae evaluate`.
settings = {"max_new_tokens": 8, "do_sample": False}
base = loaded.model.generate(**prompt, **settings)
for strength in ("0.5x norm", "2x norm"):
    edit = Edit(dictionary, latent=7, add=strength)
    with Steering(loaded.model, [edit], positions="generated") as steering:
        steered = loaded.model.generate(**prompt, **settings)
    [count] = steering.counts
    print(f"{strength}: {loaded.tokenizer.decode(steered[0])!r}; the stream moved by "
          f"{count.relative_size:.2f} of its norm on {count.n_chosen} tokens")  # fmt: skip
steering

# %%
# Many strengths at once, each beside a random direction that moves the stream by as much: what is
# gained in the tokens that the latent stands for, and what it costs on a neutral text.
neutral = loaded.tokenizer(["the letter was in the carriage"], return_tensors="pt")["input_ids"]
stands_for = loaded.tokenizer("music", return_tensors="pt")["input_ids"][0]
target = Target(loaded.model, loaded.tokenizer, dictionary, 7, stands_for)
strengths = SweepConfig(
    strengths=(0.5, 1.0, 2.0), unit="norm", prompts=("the sister was",), max_new_tokens=8
)
sweep(target, neutral, strengths)

# %%
# With the error kept, a dictionary without edits changes nothing; without it, the model lives on
# the reconstruction alone.
with torch.no_grad():
    logits = loaded.model(**prompt).logits
    with Steering(loaded.model, [Splice(dictionary, keep_error=False)]):
        spliced = loaded.model(**prompt).logits
kl = (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - spliced.log_softmax(-1))).sum(-1)
print(f"KL of the prompt's tokens by the reconstruction alone: {kl.mean():.4f} nats")
