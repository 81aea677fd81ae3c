"""TCAV: whether a model's answer moves along a concept's direction, tested against random sets.

Concept bottlenecks: an answer from predicted concepts alone, and what correcting them gives.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Float64, Int
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from activations_cache.checks import Progress, silent
from monosema.checks import MonosemaError
from sae.evaluate.probe_tasks import Units, check_two_classes, columns, mean_difference

TIE = 1e-12
"""Scores that differ by less are equal: they are means of shares, which are rounded."""

Sides = Literal["greater", "both"]
"""Whether a concept may be significant for a score above chance alone, or for one below as well."""


@dataclass(frozen=True, kw_only=True)
class TCAV:
    """One concept and one answer of the model."""

    score: float
    """Share of the inputs at which the answer grows along the concept, mean over random sets."""
    random: float
    """The same of the random sets, each taken as the concept; mean."""
    p: float
    """Rank of the score among theirs: no smaller than 1 / (random sets + 1)."""
    significant: bool
    """Whether p, times the number of concepts tested (Bonferroni), is at most the level."""


def concept_vector(
    concept: Float[Tensor, "row d_in"], other: Float[Tensor, "other d_in"]
) -> Float[Tensor, " d_in"]:
    """Unit normal of a linear classifier of a concept's rows against others.

    Raises:
        ValueError: If a side has no row.
    """
    if len(concept) == 0 or len(other) == 0:
        raise MonosemaError(f"both sides must have rows, got {len(concept)} and {len(other)}")
    x = torch.cat([concept, other]).detach().double()
    x = x - x.mean(dim=0)
    x = x / x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    y = (torch.arange(len(x)) < len(concept)).numpy()
    model = LogisticRegression(C=0.1, max_iter=1000)
    if x.shape[1] <= len(x):
        normal = torch.from_numpy(model.fit(x.numpy(), y).coef_[0])
    else:  # the normal lies in the span of the rows, which has fewer dimensions
        u, sizes, axes = torch.linalg.svd(x, full_matrices=False)
        normal = torch.from_numpy(model.fit((u * sizes).numpy(), y).coef_[0]) @ axes
    return torch.nn.functional.normalize(normal, dim=0)


def gradients(
    answer: Callable[[Tensor], Tensor], x: Float[Tensor, "row d_in"]
) -> Float[Tensor, "row d_in"]:
    """Gradient of each row's answer, such as a logit of the rest of a model."""
    rows = x.detach().clone().requires_grad_(True)
    return torch.autograd.grad(answer(rows).sum(), rows)[0]


def tcav_score(gradient: Float[Tensor, "row d_in"], vector: Float[Tensor, " d_in"]) -> float:
    """Share of the rows whose directional derivative along a vector is above 0."""
    return float((gradient.double() @ vector.double() > 0).double().mean())


def sets_needed(n_concepts: int, level: float = 0.05, sides: Sides = "both") -> int:
    """Random sets from which on a concept can be significant at all."""
    return math.ceil(n_concepts * (2 if sides == "both" else 1) / level - 1e-9) - 1


def tcav(
    concepts: Mapping[str, Float[Tensor, "row d_in"]],
    random_sets: Sequence[Float[Tensor, "other d_in"]],
    gradient: Float[Tensor, "class d_in"],
    *,
    level: float = 0.05,
    sides: Sides = "both",
    progress: Progress = silent,
) -> dict[str, TCAV]:
    """Kim et al. 2018 (arXiv 1711.11279) on any layer's rows, with a null that holds.

    A concept's score is the mean over its classifiers against every random set. Each random set is
    taken as the concept in the same way, against the other random sets and the concept; p is the
    rank of the concept's score among these. The published test takes the scores of one concept
    for independent, though all share its rows: with 20 sets it calls a third of random concepts
    significant. Give all sets as many rows as the concepts have, or their scores are no null.

    Args:
        concepts: Rows of inputs that show each concept.
        random_sets: Rows of several random sets of inputs, at least 4.
        gradient: Of the answer, at the rows of the class's inputs (`gradients`).
        level: Of the test, before Bonferroni's correction for the number of concepts.
        sides: Whether a score below chance counts as well.
        progress: Called after each set's classifiers.

    Raises:
        ValueError: If there are fewer than 4 random sets or the level is not in 0..1.
    """
    if len(random_sets) < 4:
        raise MonosemaError(f"random_sets must be at least 4, got {len(random_sets)}")
    if not 0 < level < 1:
        raise MonosemaError(f"level must be above 0 and below 1, got {level}")
    n, total = len(random_sets), len(random_sets) + len(concepts)
    scores = torch.zeros(n, n, dtype=torch.float64)
    for i, one in enumerate(random_sets):
        for j in range(i):
            scores[i, j], scores[j, i] = _both_ways(gradient, concept_vector(one, random_sets[j]))
        progress(i + 1, total, "sets")
    results = {}
    for done, (name, rows) in enumerate(concepts.items(), start=n + 1):
        pairs = [_both_ways(gradient, concept_vector(rows, other)) for other in random_sets]
        along, against = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
        null = (scores.sum(dim=1) + against) / n
        p = _rank(float(along.mean()), null, sides)
        results[name] = TCAV(
            score=float(along.mean()), random=float(null.mean()), p=p,
            significant=p * len(concepts) <= level,
        )  # fmt: skip
        progress(done, total, "sets")
    return results


def _both_ways(
    gradient: Float[Tensor, "class d_in"], vector: Float[Tensor, " d_in"]
) -> tuple[float, float]:
    """The score along a vector, and that along its opposite."""
    slope = gradient.double() @ vector.double()
    return float((slope > 0).double().mean()), float((slope < 0).double().mean())


def _rank(score: float, null: Float64[Tensor, " set"], sides: Sides) -> float:
    above, below = (1 + int((null >= score - TIE).sum())), (1 + int((null <= score + TIE).sum()))
    n = len(null) + 1
    return above / n if sides == "greater" else min(1.0, 2 * min(above, below) / n)


class ConceptBottleneck:
    """y = g(c_hat(units)): each concept by a probe of k units, the answer by a head on them.

    Koh et al. 2020 (arXiv 2007.04612), fitted one after the other: the head learns on true
    concepts, so correcting a prediction moves its input towards what it knows.
    """

    def __init__(self, k: int = 5, head: Literal["linear", "tree"] = "linear") -> None:
        """Take the number of units per concept and the kind of head; "tree" learns XOR."""
        if k < 1:
            raise MonosemaError(f"k must be at least 1, got {k}")
        self.k = k
        self._probes: list[tuple[Int[np.ndarray, " k"], LogisticRegression]] = []
        self._head = (
            LogisticRegression(max_iter=1000)
            if head == "linear"
            else DecisionTreeClassifier(random_state=0)
        )

    def fit(
        self,
        units: Units,
        concepts: Bool[np.ndarray, "row concept"],
        y: Int[np.ndarray, " row"],
    ) -> "ConceptBottleneck":
        """Fit the probes to the concepts and the head to the answers.

        Raises:
            ValueError: If a concept is in no row or in all.
        """
        self._probes = []
        for i in range(concepts.shape[1]):
            check_two_classes(concepts[:, i], f"concept {i}")
            chosen = np.argsort(-np.abs(mean_difference(units, concepts[:, i])))[: self.k]
            probe = LogisticRegression(max_iter=1000).fit(columns(units, chosen), concepts[:, i])
            self._probes.append((chosen, probe))
        self._head.fit(concepts.astype(float), y)
        return self

    def concepts(self, units: Units) -> Float[np.ndarray, "row concept"]:
        """Probability of each concept."""
        results = [probe.predict_proba(columns(units, ids))[:, 1] for ids, probe in self._probes]
        return np.stack(results, axis=1)

    def predict(
        self, units: Units, given: Mapping[int, Bool[np.ndarray, " row"]] | None = None
    ) -> Int[np.ndarray, " row"]:
        """Answers, with some concepts set to what is given instead of predicted.

        Raises:
            ValueError: If a number is not of a concept.
        """
        concepts = (self.concepts(units) > 0.5).astype(float)
        for number, values in (given or {}).items():
            _check_concept(number, len(self._probes))
            concepts[:, number] = values
        return np.asarray(self._head.predict(concepts))


def _check_concept(number: int, n: int) -> None:
    if not 0 <= number < n:
        raise MonosemaError(f"given must name concepts 0..{n - 1}, got {number}")


class ConceptEmbedding:
    """y = g(mixed embeddings): each concept has one for true and one for false.

    c_i = p_i positive_i + (1 - p_i) negative_i, both functions of the units, p_i the probability of
    concept i; the head sees all c_i, so that it knows what the concepts leave out (Espinosa
    Zarlenga et al. 2022, arXiv 2209.09056). In training a quarter of the probabilities are the true
    concepts (their RandInt), so that corrections mean something.
    """

    def __init__(
        self, width: int = 16, steps: int = 300, rate: float = 3e-3, seed: int = 0
    ) -> None:
        """Take the width of an embedding, and how it is trained."""
        self.width, self.steps, self.rate, self.seed = width, steps, rate, seed
        self._net: _Embeddings | None = None

    def fit(
        self,
        units: Units,
        concepts: Bool[np.ndarray, "row concept"],
        y: Int[np.ndarray, " row"],
    ) -> "ConceptEmbedding":
        """Fit all parts together, to the concepts and to the answers.

        Raises:
            ValueError: If a concept is in no row or in all.
        """
        for i in range(concepts.shape[1]):
            check_two_classes(concepts[:, i], f"concept {i}")
        dense = _dense(units)
        scale = dense.std(axis=0)
        self._mean, self._scale = dense.mean(axis=0), np.where(scale > 0, scale, 1)
        self._classes, target = np.unique(y, return_inverse=True)
        x, truth, target = self._scaled(units), torch.tensor(concepts).float(), torch.tensor(target)
        made = torch.Generator().manual_seed(self.seed)
        sizes = (x.shape[1], truth.shape[1], self.width, len(self._classes))
        net = self._net = _Embeddings(*sizes, made)
        adam = torch.optim.Adam(net.parameters(), lr=self.rate)
        losses = nn.functional
        for _ in range(self.steps):
            at = torch.randint(len(x), (min(256, len(x)),), generator=made)
            known = torch.rand(len(at), truth.shape[1], generator=made) < 0.25
            answer, logits = net(x[at], torch.where(known, truth[at], float("nan")))
            loss = losses.cross_entropy(answer, target[at])
            loss = loss + losses.binary_cross_entropy_with_logits(logits, truth[at])
            adam.zero_grad()
            loss.backward()
            adam.step()
        return self

    @torch.no_grad()
    def concepts(self, units: Units) -> Float[np.ndarray, "row concept"]:
        """Probability of each concept."""
        net, x = self._fitted(), self._scaled(units)
        return net(x, torch.full((len(x), net.n), float("nan")))[1].sigmoid().numpy()

    @torch.no_grad()
    def predict(
        self, units: Units, given: Mapping[int, Bool[np.ndarray, " row"]] | None = None
    ) -> Int[np.ndarray, " row"]:
        """Answers, with some concepts set to what is given instead of predicted.

        Raises:
            ValueError: If a number is not of a concept.
        """
        net, x = self._fitted(), self._scaled(units)
        known = torch.full((len(x), net.n), float("nan"))
        for number, values in (given or {}).items():
            _check_concept(number, net.n)
            known[:, number] = torch.tensor(values).float()
        return self._classes[net(x, known)[0].argmax(dim=1).numpy()]

    def _fitted(self) -> "_Embeddings":
        assert self._net is not None, "used before it was fitted"
        return self._net

    def _scaled(self, units: Units) -> Float[Tensor, "row unit"]:
        dense = _dense(units)
        return torch.tensor((dense - self._mean) / self._scale, dtype=torch.float32)


def _dense(units: Units) -> Float[np.ndarray, "row unit"]:
    return units.toarray() if isinstance(units, scipy.sparse.csr_matrix) else units


class _Embeddings(nn.Module):
    def __init__(
        self, d_in: int, n: int, width: int, n_classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.n, self.width = n, width
        self.body = nn.Sequential(nn.Linear(d_in, 64), nn.LeakyReLU(), nn.Linear(64, 64))
        self.both = nn.Sequential(nn.LeakyReLU(), nn.Linear(64, n * 2 * width))
        self.concept = nn.Linear(2 * width, 1)
        self.head = nn.Sequential(
            nn.Linear(n * width, 64), nn.LeakyReLU(), nn.Linear(64, n_classes)
        )
        for layer in self.modules():  # as torch draws them, by our own generator
            if isinstance(layer, nn.Linear):
                bound = 1 / layer.in_features**0.5
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter.data, -bound, bound, generator=generator)

    def forward(
        self, x: Float[Tensor, "row unit"], known: Float[Tensor, "row concept"]
    ) -> tuple[Float[Tensor, "row answer"], Float[Tensor, "row concept"]]:
        """Logits of answers and concepts; a known concept stands in its probability's place."""
        both = self.both(self.body(x)).view(len(x), self.n, 2, self.width)
        logits = self.concept(both.flatten(2))[..., 0]
        p = torch.where(known.isnan(), logits.sigmoid(), known)[..., None]
        mixed = p * both[:, :, 0] + (1 - p) * both[:, :, 1]
        return self.head(mixed.flatten(1)), logits


def intervention_curve(
    model: ConceptBottleneck | ConceptEmbedding,
    units: Units,
    concepts: Bool[np.ndarray, "row concept"],
    y: Int[np.ndarray, " row"],
    order: Sequence[int] | None = None,
) -> list[float]:
    """Accuracy with the first 0, 1, ... concepts of an order set to their true values."""
    numbers = list(range(concepts.shape[1])) if order is None else list(order)
    given = [{i: concepts[:, i] for i in numbers[:n]} for n in range(len(numbers) + 1)]
    return [float((model.predict(units, of_one) == y).mean()) for of_one in given]


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """How often an answer is right as its concepts are corrected, on rows not fitted on."""

    concepts: tuple[float, ...]
    """Share of rows on which each concept is told right."""
    accuracy: tuple[float, ...]
    """Of the answer with the first 0, 1, ... concepts set to what is true."""
    control: tuple[float, ...]
    """The same where they are set to those of other rows."""

    @property
    def ends(self) -> tuple[float, float, float, float]:
        """Mean over concepts; the answer as predicted, corrected, and by other rows' concepts."""
        mean = sum(self.concepts) / len(self.concepts)
        return mean, self.accuracy[0], self.accuracy[-1], self.control[-1]


def corrected(
    model: ConceptBottleneck | ConceptEmbedding,
    units: Units,
    concepts: Bool[np.ndarray, "row concept"],
    y: Int[np.ndarray, " row"],
    seed: int = 0,
) -> Corrected:
    """Score a fitted model on other rows; the seed decides whose concepts the control takes."""
    others = concepts[np.random.default_rng(seed).permutation(len(concepts))]
    right = (model.concepts(units) > 0.5) == concepts
    curves = [tuple(intervention_curve(model, units, given, y)) for given in (concepts, others)]
    return Corrected(
        concepts=tuple(right.mean(axis=0).tolist()), accuracy=curves[0], control=curves[1]
    )
