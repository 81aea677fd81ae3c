"""Scores of what a latent does, rather than of when it fires: output side and sensitivity.

Scores that need no judge: embeddings, and how surprised a language model is.
"""

import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.hooks import capture, edit
from sae.autoencoder import SparseAutoencoder
from sae.explain.judges import Judge, Score, Writer, scored
from sae.explain.llm.chat import CallFailedError
from sae.explain.question_scorers import EXPECTED, Simulated, simulate
from sae.explain.windows import NEGATIVES, LatentWindows, Window, seed_of
from sae.statistics import Interval, auc, correlation, wilson

NextLogProbs = Callable[[int, float], Float[Tensor, "batch vocab"]]
"""Latent and strength to the next token's log probabilities after each of some neutral prompts."""


@dataclass(frozen=True)
class OutputSide:
    """Does amplifying the latent raise its own logit-lens tokens?

    value = mean over prompts of the AUC of the change of log probability, the latent's promoted
    tokens against all others; floor 0.5, whatever amplification does to all tokens alike.
    `details` has the output score of Arad et al. (2025, arXiv 2505.20063), the largest
    P x (1 - rank / vocab) of these tokens, before and after.
    """

    next_log_probs: NextLogProbs
    """The model; see `amplified`."""
    promoted: Int[Tensor, "d_sae k"]
    """Token ids by the logit lens."""
    strength: float = 2.0
    """Times the latent's maximum."""
    name: str = "output side"
    """Its name in the results."""

    async def score(
        self,
        latent: LatentWindows,
        explanation: str = "",  # noqa: ARG002
        judge: Judge | None = None,  # noqa: ARG002
    ) -> Score:
        """Two forward passes; the label is not looked at."""
        base = self.next_log_probs(latent.latent, 0.0)
        after = self.next_log_probs(latent.latent, self.strength * latent.max_activation)
        window_tokens = torch.zeros(base.shape[1], dtype=torch.bool)
        window_tokens[self.promoted[latent.latent]] = True
        change = (after - base).double().numpy()
        per_prompt = [
            auc(row[window_tokens.numpy()], row[~window_tokens.numpy()]).value for row in change
        ]
        known = [value for value in per_prompt if np.isfinite(value)]
        count = Score(self.name, 0.5, len(per_prompt), len(per_prompt) - len(known))
        if not known:
            return Score(self.name, 0.5, count.n, count.n_failed, reason="no finite change")
        interval = wilson(float(np.mean(known) * len(known)), len(known))
        missing = count.n_failed / count.n
        value_counted = interval.value * (1 - missing)
        scores = {
            "arad before": _arad(base, window_tokens),
            "arad after": _arad(after, window_tokens),
        }
        return scored(count, interval, (value_counted, value_counted + missing), details=scores)


def _arad(log_probs: Float[Tensor, "batch vocab"], window_tokens: Tensor) -> float:
    probs = log_probs.exp()
    rank = probs.argsort(dim=1, descending=True).argsort(dim=1)
    each = probs * (1 - rank / probs.shape[1])
    return float(each[:, window_tokens].amax(dim=1).mean())


def amplified(
    model: nn.Module,
    ids: Int[Tensor, "batch pos"],
    dictionary: SparseAutoencoder,
    hook_point: str,
) -> NextLogProbs:
    """The log probabilities after neutral prompts with strength x direction added everywhere.

    Args:
        model: A causal language model.
        ids: Prompts of equal length.
        dictionary: Whose directions are added.
        hook_point: Where.
    """

    @torch.no_grad()
    def next_log_probs(latent: int, strength: float) -> Float[Tensor, "batch vocab"]:
        added = strength * dictionary.direction(latent)
        edits = {hook_point: lambda h, positions: h + added.to(h)}  # noqa: ARG005
        with edit(model, edits) if strength else contextlib.nullcontext():
            logits = model(ids).logits[:, -1].float()
        return logits.log_softmax(dim=-1).cpu()

    return next_log_probs


@dataclass(frozen=True)
class Sensitivity:
    """Share of texts made to fit the label on which the latent does fire.

    Scores of a label on texts where the latent fires say nothing of texts that fit and leave it
    silent; this does. Floor: how often a text of that length fires by the density alone,
    1 - (1 - density)^tokens.
    """

    texts_for: Callable[[str], Awaitable[list[str]]] | None
    """Label to texts that fit it, such as those of a labelled set; None: the judge writes them."""
    peaks_on: Callable[[int, Sequence[str]], list[float]]
    """Latent and texts to its largest activation on each."""
    n_tokens: int = 32
    """Usual length of these texts."""
    name: str = "sensitivity"
    """Its name in the results."""

    async def score(
        self,
        latent: LatentWindows,
        explanation: str,
        judge: Judge | None = None,
    ) -> Score:
        """Get texts, run them, count."""
        floor = 1 - (1 - latent.density) ** self.n_tokens
        texts_for = self.texts_for or (judge.texts if isinstance(judge, Writer) else None)
        if texts_for is None:
            return Score(self.name, floor, 0, 0, reason="nobody to write texts")
        try:
            texts = await texts_for(explanation)
        except CallFailedError as error:
            if error.reason == "budget":
                raise
            return Score(self.name, floor, 1, 1, worst=0.0, best=1.0, reason=str(error))
        if not texts:
            return Score(self.name, floor, 0, 0, reason="no texts")
        peaks = np.array(self.peaks_on(latent.latent, texts))
        interval = wilson(float((peaks > 0).sum()), len(peaks))
        share = {"mean share of the maximum": float(peaks.mean() / latent.max_activation)}
        counts = Score(self.name, floor, len(texts), 0)
        return scored(counts, interval, (interval.value, interval.value), details=share)


Divergence = Callable[[int, Window, Sequence[float]], float]
"""Latent, window and an activation for each of its tokens to how far they move the model."""


def divergences(
    model: nn.Module,
    tokens: Int[Tensor, "example pos"],
    dictionary: SparseAutoencoder,
    places: tuple[Sequence[str], str],
    *,
    first_position: int = 0,
) -> Divergence:
    """How far predictions move when a latent has other activations on a window's tokens.

    Mean over the window's tokens of the Jensen-Shannon divergence between the next token's
    probabilities of the model as it is and with h + (v - f) d in the stream's place, in nats.

    Args:
        model: A causal language model.
        tokens: Of the cache's examples, which windows are pieces of.
        dictionary: Whose latents.
        places: Where it reads and where it writes.
        first_position: Positions below this one, which have no rows, are left as they are.
    """
    inputs, output = places

    @torch.no_grad()
    def divergence(latent: int, window: Window, values: Sequence[float]) -> float:
        here = slice(window.start, window.start + len(window.tokens))
        ids = tokens[window.example, : here.stop][None].long()
        with capture(model, list(inputs)) as run:
            streams = run(ids)
        x = torch.cat([streams[point][0, here].float() for point in inputs], dim=1)
        change = torch.tensor(values).to(x) - dictionary.encode_dense(x)[:, latent]
        change[: max(first_position - window.start, 0)] = 0
        size = dictionary.output_norm(x).size
        moved = change[:, None] * dictionary.direction(latent) * size

        def move(h: Tensor, _: Tensor) -> Tensor:
            h = h.clone()
            h[0, here] += moved.to(h)
            return h

        base = model(ids).logits[0, here].double().log_softmax(dim=-1)
        with edit(model, {output: move}):
            other = model(ids).logits[0, here].double().log_softmax(dim=-1)
        middle = torch.logaddexp(base, other) - math.log(2)
        sides = [(log_p.exp() * (log_p - middle)).sum(dim=-1) for log_p in (base, other)]
        return float((sides[0] + sides[1]).mean() / 2)

    return divergence


@dataclass(frozen=True)
class Ablation:
    """Does the model go on alike with a latent's activations as a label predicts them?

    value = 1 - sum of D(simulated) / sum of D(mean) over windows, the ablation score of Bills et
    al. (2023), D as `divergences` has it. Levels become activations by a line that is fitted on
    every second window and used on the others, and the other way round; the mean is of the same
    windows. 1: the model does the same; floor 0: a constant is as good. `details` has the
    simulation's correlation. A failed window counts as 0 in `worst` and as 1 in `best`.
    """

    divergence: Divergence
    """The model."""
    n_random: int = 10
    """Random negatives that stand beside the active windows."""
    name: str = "ablation"
    """Its name in the results."""

    async def score(self, latent: LatentWindows, explanation: str, judge: Judge) -> Score:
        """Ask about one window at a time, then run the model on each three times."""
        made = await simulate(latent, explanation, judge, self.n_random)
        count = Score(self.name, 0.0, made.n, made.n - len(made.windows))
        if len(made.windows) < FEWEST_WINDOWS:
            return replace(count, reason=f"fewer than {FEWEST_WINDOWS} answered windows")
        pairs = list(zip(made.windows, calibrated(made), strict=True))
        moved = np.array([
            [self.divergence(latent.latent, window, values) for values in both]
            for window, both in pairs
        ])
        if moved[:, 1].sum() <= 0:
            return replace(count, reason="undefined: the mean moves the model nowhere")
        seed = seed_of("ablation", latent.latent)
        picks = np.random.default_rng(seed).integers(0, len(moved), (1000, len(moved)))
        sums = moved[picks].sum(axis=1)
        ratios = 1 - sums[:, 0] / np.maximum(sums[:, 1], 1e-300)
        low, high = np.quantile(ratios, [0.025, 0.975])
        value = float(1 - moved[:, 0].sum() / moved[:, 1].sum())
        interval = Interval(value, float(min(low, value)), float(max(high, value)))
        share = len(made.windows) / made.n
        real = [window.activations for window in made.windows]
        alike = correlation(made.predicted, real, seed=seed)
        details = {EXPECTED: made.share_expected}
        details |= {} if alike is None else {"pearson": alike.value}
        bounds = value * share, value * share + 1 - share
        return scored(count, interval, bounds, details=details)


FEWEST_WINDOWS = 4
"""Answered windows below which a half of them fits no line."""


def calibrated(made: Simulated) -> list[tuple[list[float], list[float]]]:
    """Of each window what its levels stand for, and the mean, both by the other half of windows."""
    results = []
    for number, levels in enumerate(made.predicted):
        others = range(1 - number % 2, len(made.predicted), 2)
        x = np.concatenate([made.predicted[i] for i in others])
        y = np.concatenate([made.windows[i].activations for i in others])
        slope = float(np.cov(x, y, bias=True)[0, 1] / x.var()) if x.var() > 0 else 0.0
        values = y.mean() + slope * (np.array(levels) - x.mean())
        results.append((values.clip(0).tolist(), [float(y.mean())] * len(levels)))
    return results


Embed = Callable[[list[str]], Float[Tensor, "batch d_model"]]
"""Texts to vectors; such as `LocalClient.embed`."""

LogLikelihood = Callable[[str, str], float]
"""Mean log probability of a text's tokens after a prefix; such as `LocalClient.log_likelihood`."""


@dataclass(frozen=True)
class Embedding:
    """AUC of the cosine between label and window, active windows against negatives; floor 0.5."""

    embed: Embed
    """The embedding model."""
    name: str = "embedding"
    """Its name in the results."""

    async def score(
        self,
        latent: LatentWindows,
        explanation: str,
        judge: Judge | None = None,  # noqa: ARG002
    ) -> Score:
        """Embed the label and all score windows."""
        windows = latent.of("score", "active", *NEGATIVES)
        vectors = self.embed([explanation, *(window.text for window in windows)]).float()
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        figures = (vectors[1:] @ vectors[0]).tolist()
        return by_source(self.name, [w.source for w in windows], figures)


@dataclass(frozen=True)
class Surprisal:
    """AUC of how much the label lowers the loss of a window; floor 0.5.

    figure(window) = log p(window | label) - log p(window | a text that says nothing), per token.
    """

    log_likelihood: LogLikelihood
    """The language model."""
    name: str = "surprisal"
    """Its name in the results."""

    async def score(
        self,
        latent: LatentWindows,
        explanation: str,
        judge: Judge | None = None,  # noqa: ARG002
    ) -> Score:
        """Two likelihoods of every score window."""
        windows = latent.of("score", "active", *NEGATIVES)
        with_label, without = f"This text is about {explanation}:", "This is a text:"
        figures = [
            self.log_likelihood(with_label, w.text) - self.log_likelihood(without, w.text)
            for w in windows
        ]
        return by_source(self.name, [w.source for w in windows], figures)


def by_source(name: str, sources: Sequence[str], figures: Sequence[float]) -> Score:
    """AUC of figures of active windows against the negatives of all sources, and of each."""
    values, source = np.array(figures, np.float64), np.array(sources)
    known = np.isfinite(values)
    base = Score(name, 0.5, len(values), int((~known).sum()))
    positive = values[known & (source == "active")]
    results = {
        one: auc(positive, values[known & (source == one)]).value
        for one in dict.fromkeys(source.tolist())
        if one != "active" and len(positive) and (known & (source == one)).any()
    }
    if not results:
        return Score(name, 0.5, base.n, base.n_failed, reason="no active windows or no negatives")
    interval = auc(positive, values[known & (source != "active")])
    extreme = [np.where(known, values, np.where((source == "active") == up, np.inf, -np.inf))
               for up in (False, True)]  # fmt: skip
    worst, best = (auc(v[source == "active"], v[source != "active"]).value for v in extreme)
    return scored(base, interval, (worst, best), per_source=results)
