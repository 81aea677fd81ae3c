"""Which tokens a latent's decoder row makes more and less likely, seen through the unembedding.

Words for latents from weights alone: log p(c|w), the mutual-information form that works.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from activations_cache import seals
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.models import Tokenizer
from sae.autoencoder import SparseAutoencoder
from sae.explain.config import ExplainConfig
from sae.explain.examples import SplitFirings
from sae.explain.labels import Rules, fires_enough
from sae.explain.scores import (
    bootstrap_mean,
    exchanged_labels,
    known_or_none,
    plain,
    score_rules,
)
from sae.explain.tables import WEIGHTS, as_json

_CELLS = 1 << 25  # logits held at once: 128 MiB


class PromotedTokens(NamedTuple):
    """The tokens at both ends of every latent's logits, the strongest first."""

    promoted: Int[Tensor, "d_sae k"]
    """Ids of the tokens with the largest logits."""
    promoted_logits: Float[Tensor, "d_sae k"]
    """Their logits, per unit of activation."""
    suppressed: Int[Tensor, "d_sae k"]
    """Ids of the tokens with the smallest logits, the most negative first."""
    suppressed_logits: Float[Tensor, "d_sae k"]
    """Their logits."""
    with_final_norm: bool
    """Whether the directions were multiplied by the final norm's weight."""


@torch.no_grad()
def promoted_tokens(
    dictionary: SparseAutoencoder,
    unembed: Float[Tensor, "vocab d_model"],
    final_norm_weight: Float[Tensor, " d_model"] | None,
    k: int = 10,
    *,
    progress: Progress | None = None,
) -> PromotedTokens:
    """The k tokens that each latent promotes and suppresses most, by the logit lens.

    logits = (direction * final_norm_weight) @ unembed.T: the direct path from the residual stream,
    leaving out the layers between and the norm's division, which changes the logits' scale only.

    Args:
        dictionary: Whose decoder rows are read, in the model's units; of several hook points the
            last one's part.
        unembed: The model's output embedding.
        final_norm_weight: Weight of the final RMS norm; without it the directions stay as they are.
        k: How many tokens at each end.
        progress: Called after each chunk with the number of latents done.

    Raises:
        ValueError: If widths differ or k is larger than the vocabulary.
    """
    widths = [part.width for part in dictionary.config.slices_out]
    directions = dictionary.directions.split(widths, dim=1)[-1]
    vocab, d_model = unembed.shape
    if directions.shape[1] != d_model:
        raise MonosemaError(
            f"unembed must be as wide as the decoder rows, {directions.shape[1]}, got {d_model}"
        )
    if not 1 <= k <= vocab:
        raise MonosemaError(f"k must lie between 1 and the vocabulary's size {vocab}, got {k}")
    if final_norm_weight is not None:
        directions = directions * final_norm_weight.to(directions)
    report = progress or silent
    readout = unembed.to(directions).T
    ends: list[tuple[Tensor, ...]] = []
    for chunk in directions.split(max(1, _CELLS // vocab)):
        logits = chunk @ readout  # (latents, vocab)
        high, low = logits.topk(k), logits.topk(k, largest=False)
        ends.append((high.indices, high.values, low.indices, low.values))
        report(sum(len(end[0]) for end in ends), len(directions), "latents through the logit lens")
    joined = [torch.cat(parts) for parts in zip(*ends, strict=True)]
    return PromotedTokens(*joined, with_final_norm=final_norm_weight is not None)


def weight_pmi(
    enc_rows: Float[Tensor, "d_sae d_in"], word_vectors: Float[Tensor, "word d_in"]
) -> Float[Tensor, "d_sae word"]:
    """Log p(c|w) + log d_sae, the pointwise mutual information under a uniform prior of latents.

    logits l_cw = <enc_c / |enc_c|, E_w>; p(c|w) is their softmax over latents. This is the second
    factor of the score of Wu et al. (2025, arXiv 2502.15576). Their whole score, p(w|c) log p(c|w)
    sorted descending, finds none of the planted words of our test, because log p(c|w) is negative
    and the least likely words win; log p(c|w) alone finds all.

    Args:
        enc_rows: Encoder directions.
        word_vectors: Mean embedding of each word's tokens.
    """
    logits = torch.nn.functional.normalize(enc_rows, dim=1) @ word_vectors.T
    return logits.log_softmax(dim=0) + torch.log(torch.tensor(float(len(enc_rows))))


WordVectors = Callable[[Sequence[str]], Float[Tensor, "word d_model"]]
"""Words to their mean output embeddings."""

_WORDS_AT_ONCE = 256
N_FREQUENT = 250
"""Labels of words among so many of the most frequent ones say little (Wu et al. 2025)."""


def word_vectors(tokenizer: Tokenizer, unembed: Float[Tensor, "vocab d_model"]) -> WordVectors:
    """What gives a word inside a sentence the mean of its tokens' rows of the unembedding."""

    def vectors(words: Sequence[str]) -> Float[Tensor, "word d_model"]:
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        return torch.stack([unembed[one].mean(dim=0) for one in ids])

    return vectors


class WeightLabels(NamedTuple):
    """Labels from weights alone, and how well they tell firings on unseen documents."""

    words: Int64[np.ndarray, "d_sae word"]
    """Numbers of the words that each label lists, best first; -1 where there are no more."""
    pmi: Float[Tensor, "d_sae word"]
    """Their pointwise mutual information, in nats."""
    auc: np.ndarray
    """Of the latents that were scored; nan for the others."""
    summary: dict[str, Any]
    """Means over the scored latents, and how often labels name the most frequent words."""


def frequent_words(made_from: SplitFirings, names: Sequence[str], n: int) -> list[int]:
    """The n most frequent words of the explain split with a letter or digit, in this order."""
    values = made_from.text.values["word"]
    counts = np.bincount(values[values >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    known = [i for i in order.tolist() if counts[i] and any(map(str.isalnum, names[i]))]
    return known[:n]


def labels_by_weights(
    dictionary: SparseAutoencoder,
    parts: Sequence[SplitFirings],
    names: Sequence[str],
    vectors: WordVectors | None,
    config: ExplainConfig,
) -> WeightLabels:
    """Labels from weights, scored on the latents that labels from the corpus are scored on.

    Raises:
        ValueError: If nothing gives words their vectors.
    """
    if vectors is None:
        raise MonosemaError("vectors must be given for labels from weights, got None")
    wanted = np.logical_and(*(fires_enough(p.codes, p.text, config) for p in parts))
    words = frequent_words(parts[0], names, config.weights)
    return weight_labels(
        dictionary, vectors([names[i] for i in words]), words, parts[1], wanted,
        n=min(config.words_per_label, len(words)), seed=config.seed,
    )  # fmt: skip


def write_weight_labels(directory: Path, made: WeightLabels, names: Sequence[str]) -> None:
    """Write the labels from weights of all latents."""
    latents = []
    figures = zip(made.words.tolist(), made.pmi.tolist(), made.auc.tolist(), strict=True)
    for latent, (numbers, values, auc) in enumerate(figures):
        listed = [(names[i], pmi) for i, pmi in zip(numbers, values, strict=True) if i >= 0]
        words, pmi = [word for word, _ in listed], [value for _, value in listed]
        latents.append({"latent": latent, "words": words, "pmi": pmi, "auc": known_or_none(auc)})
    seals.write(directory, {WEIGHTS: as_json({"summary": made.summary, "latents": latents})})


@torch.no_grad()
def weight_labels(
    dictionary: SparseAutoencoder,
    vectors: Float[Tensor, "word d_model"],
    words: Sequence[int],
    scored_on: SplitFirings,
    wanted: Bool[np.ndarray, " d_sae"],
    *,
    n: int = 5,
    seed: int = 0,
) -> WeightLabels:
    """Label each latent by the words of the largest weight PMI, and score that as a rule.

    No activation is looked at until the score, which is that of labels from the corpus: the AUC of
    the rule that a row with a listed word scores the word's PMI. Words of a PMI of 0 or less are
    not listed.

    Args:
        dictionary: Of several hook points the last one's part of the encoder is read.
        vectors: Of the words.
        words: Their numbers among the words of the text, most frequent first.
        scored_on: Firings on the score split, and its text.
        wanted: Which latents are scored.
        n: Words of a label at most.
        seed: Decides which labels are exchanged for the control, and the resamples.

    Raises:
        ValueError: If the model's words are of another width than the rows that are read.
    """
    widths = [part.width for part in dictionary.config.slices_in]
    enc = dictionary.enc_rows.split(widths, dim=1)[-1]
    if enc.shape[1] != vectors.shape[1]:
        raise MonosemaError(
            f"weights must be 0 for rows of another width, {enc.shape[1]}, than the model's output "
            f"embedding, {vectors.shape[1]}"
        )
    values, places = _best_words(enc, vectors, n)
    listed = (values > 0).numpy()
    number = np.where(listed, np.array(words)[places.numpy()], -1)
    weight = np.where(listed, values.double().numpy(), 0.0)
    rules = Rules(np.zeros(len(enc), np.int64), number.astype(np.int32), weight)
    score = score_rules(rules, ("word",), scored_on.codes, scored_on.text, wanted)
    generator, scored = np.random.default_rng(seed), np.flatnonzero(wanted)
    partner, exchanged = exchanged_labels(wanted, generator)
    other = score_rules(rules.of(partner), ("word",), scored_on.codes, scored_on.text, exchanged)
    known = listed[scored]
    frequent = np.isin(number[scored], np.array(words[:N_FREQUENT]))[known]
    summary = {
        "n_scored": len(scored),
        "n_words": len(words),
        "auc": plain(bootstrap_mean(score.auc[scored], generator)),
        "control_auc": plain(bootstrap_mean(other.auc[exchanged], generator)),
        "n_different_words": len(np.unique(number[scored][known])),
        "share_frequent": float(frequent.mean()) if known.any() else 0.0,
    }
    return WeightLabels(number, values, score.auc, summary)


def _best_words(
    enc: Float[Tensor, "d_sae d_model"], vectors: Float[Tensor, "word d_model"], n: int
) -> tuple[Float[Tensor, "d_sae n"], Int[Tensor, "d_sae n"]]:
    """The n largest PMI of each latent and their words; of all latents, so words come in parts."""
    best = torch.full((len(enc), n), float("-inf")), torch.zeros(len(enc), n, dtype=torch.int64)
    for first in range(0, len(vectors), _WORDS_AT_ONCE):
        pmi = weight_pmi(enc, vectors[first : first + _WORDS_AT_ONCE].to(enc))
        place = torch.arange(first, first + pmi.shape[1]).expand(len(enc), -1)
        both = torch.cat([best[0], pmi.cpu()], 1), torch.cat([best[1], place], 1)
        top = both[0].topk(n, dim=1)
        best = top.values, both[1].gather(1, top.indices)
    return best
