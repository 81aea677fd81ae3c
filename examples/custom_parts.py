"""An activation, a loss and an explainer of your own.

Nothing has to be registered: a dictionary is its weights, a loss is a function of tensors, and an
explainer is what turns windows into a question. What proves itself goes into the source tree, where
CONTRIBUTING.md names the files.
"""

# %%
# **Activation and loss.** Rows with 32 known directions, of which about 2 are present. The
# activation is a soft threshold, max(h - t, 0) with a t of its own for each latent; the loss
# punishes latents that fire together and look alike, beside the L1 norm.
import asyncio
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder, initialise

generator = torch.Generator().manual_seed(0)
truth = normalize(torch.randn(32, 16, generator=generator), dim=1)


def rows(n: int) -> torch.Tensor:
    """Rows in which about 2 of the 32 directions are present."""
    present = torch.rand(n, 32, generator=generator) < 2 / 32
    return (present * (1 + torch.rand(n, 32, generator=generator))) @ truth


def soft_threshold(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What exceeds t, less t."""
    return torch.relu(h - t)


def crowding(a: torch.Tensor, dec_rows: torch.Tensor) -> torch.Tensor:
    """Mean over rows of sum_ij a_i a_j cos(d_i, d_j)^2, i != j."""
    alike = (normalize(dec_rows, dim=1) @ normalize(dec_rows, dim=1).T).square().fill_diagonal_(0)
    return (a @ alike * a).sum(dim=1).mean()


dictionary = SparseAutoencoder(SAEConfig(d_in=16, d_sae=32, activation=ReLU()))
initialise(dictionary, generator)
threshold = torch.zeros(32, requires_grad=True)
optimizer = torch.optim.Adam([*dictionary.parameters(), threshold], lr=1e-2)
for _ in range(800):
    x = rows(256)
    h = (x - dictionary.b_dec) @ dictionary.enc_rows.T + dictionary.b_enc
    a = soft_threshold(h, threshold)
    error = (a @ dictionary.dec_rows + dictionary.b_dec - x).square().sum(dim=1).mean()
    norms = dictionary.dec_rows.norm(dim=1)
    loss = error + 0.3 * (a * norms).sum(dim=1).mean() + 0.02 * crowding(a, dictionary.dec_rows)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# A soft threshold is a ReLU with another bias, so it folds into the one form that everything else
# here (evaluating, explaining, steering, saving) works with. Fold what you can: what has no such
# form can be trained this way, but not saved.
with torch.no_grad():
    dictionary.b_enc -= threshold
    x = rows(512)
    best = (normalize(dictionary.dec_rows, dim=1) @ truth.T).max(dim=0).values
    fvu = (dictionary(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
print(f"FVU {fvu:.3f}, recovered {(best > 0.9).float().mean():.0%} of 32 directions")

# %%
# **Explainer.** A subclass says what is asked; it never sees the split on which labels are scored.
# `explain_all` does the rest: answers that are kept, limits, scores with floors, controls. The name
# is part of what answers are kept under, so change it with every word.
from sae.explain.config import LLMConfig
from sae.explain.explainers import LLMExplainer
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import Message, Request, Response, reply
from sae.explain.llm.corpus_text import NOTE, escape, read_items
from sae.explain.pipeline import ExplainPlan, explain_all
from sae.explain.question_scorers import Detection
from sae.explain.windows import LatentWindows, Window


@dataclass(frozen=True)
class OneWord(LLMExplainer):
    """Asks for one word, from the tokens at the peaks alone."""

    @property
    def name(self) -> str:
        """Name and version of the prompt."""
        return "one-word/1"

    def request(self, latent: LatentWindows) -> Request:
        """The question."""
        windows = latent.of("explain", "active")[: self.n_windows]
        peaks = [w.tokens[w.activations.index(w.peak)] for w in windows]
        user = f"Peaks: {', '.join(map(escape, peaks))}\nOne line: LABEL: one word for them."
        messages = (Message("system", f"You name what tokens have in common. {NOTE}"),
                    Message("user", user))  # fmt: skip
        return Request(prompt=self.name, messages=messages, max_tokens=20)


# %%
# Windows come from `sae.explain.collect` (see the tutorial on vLLM); here are some by hand, and in
# the place of a model a client that looks for the word: it needs a name and `complete` alone.
def windows(split: int) -> tuple[Window, ...]:
    """Four in which the latent fires on "sheep", four in which it is silent."""
    fires = [Window(split, i, (f"a{i}", " sheep"), (0.0, 1.0 + i), "active", 0) for i in range(4)]
    silent = [Window(split, 9 + i, (f"b{i}", " stone"), (0.0, 0.0), "random") for i in range(4)]
    return (*fires, *silent)


class WordClient:
    """Labels by what stands behind `Peaks:`; a text fits a label that it contains."""

    name = "words"

    async def complete(self, request: Request) -> Response:
        """Answer one question."""
        user = request.messages[-1].content
        if user.startswith("Peaks: "):
            return reply(request, f"LABEL: {user.removeprefix('Peaks: ').split(',')[0].strip()}")
        word = user.split("\n")[0].removeprefix("Label: ")
        return reply(request, str([int(word in item.text) for item in read_items(user)]))


latent = LatentWindows(7, 4.0, 0.01, explain=windows(0), score=windows(1))
caller = Caller(WordClient(), LLMConfig(model="words", cache_mode="off"), None)
plan = ExplainPlan(explainer=OneWord(), scorers=(Detection(),), min_windows=2, n_controls=0)
[found] = asyncio.run(explain_all([latent], plan, caller))
[score] = found.scores
interval = f"[{score.low:.2f}, {score.high:.2f}]"
print(f"{found.status}: {found.explanation.text!r} by {found.explanation.method}")
print(f"{score.scorer} {score.value:.2f} {interval}, chance {score.floor}")
