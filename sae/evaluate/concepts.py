"""TCAV: whether a model's answer moves along a concept's direction, tested against random sets.

Concept bottlenecks: an answer from predicted concepts alone, and what correcting them gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from monosema.checks import MonosemaError
from sae.evaluate.probe_tasks import Units, check_two_classes, columns, mean_difference


@dataclass(frozen=True, kw_only=True)
class TCAV:
    """One concept and one answer of the model."""

    score: float
    """Share of the inputs at which the answer grows along the concept, mean over random sets."""
    random: float
    """The same for directions between two random sets."""
    p: float
    """Of a two-sided Welch t-test between the scores of both; nan where neither varies."""
    significant: bool
    """Whether p, times the number of concepts tested (Bonferroni), is below 0.05."""


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
    scale = (x - x.mean(dim=0)).square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    y = torch.arange(len(x)) < len(concept)
    model = LogisticRegression(C=0.1, max_iter=1000)
    model.fit(((x - x.mean(dim=0)) / scale).numpy(), y.numpy())
    return torch.nn.functional.normalize(torch.from_numpy(model.coef_[0]), dim=0)


def gradients(
    answer: Callable[[Tensor], Tensor], x: Float[Tensor, "row d_in"]
) -> Float[Tensor, "row d_in"]:
    """Gradient of each row's answer, such as a logit of the rest of a model."""
    rows = x.detach().clone().requires_grad_(True)
    return torch.autograd.grad(answer(rows).sum(), rows)[0]


def tcav_score(gradient: Float[Tensor, "row d_in"], vector: Float[Tensor, " d_in"]) -> float:
    """Share of the rows whose directional derivative along a vector is above 0."""
    return float((gradient.double() @ vector.double() > 0).double().mean())


def tcav(
    concept: Float[Tensor, "row d_in"],
    random_sets: Sequence[Float[Tensor, "other d_in"]],
    gradient: Float[Tensor, "class d_in"],
    *,
    n_concepts: int = 1,
) -> TCAV:
    """Kim et al. 2018 (arXiv 1711.11279) on any layer's rows.

    The score of the concept against every random set is held against those of pairs of random sets;
    one set alone would call almost every direction significant.

    Args:
        concept: Rows of inputs that show the concept.
        random_sets: Rows of several random sets of inputs, at least 4.
        gradient: Of the answer, at the rows of the class's inputs (`gradients`).
        n_concepts: How many concepts are tested, for Bonferroni's correction.

    Raises:
        ValueError: If there are fewer than 4 random sets.
    """
    if len(random_sets) < 4:
        raise MonosemaError(f"random_sets must be at least 4, got {len(random_sets)}")
    concept_scores = [tcav_score(gradient, concept_vector(concept, other)) for other in random_sets]
    ring = zip(random_sets, [*random_sets[1:], random_sets[0]], strict=True)
    chance = [tcav_score(gradient, concept_vector(a, b)) for a, b in ring]
    score, random = sum(concept_scores) / len(concept_scores), sum(chance) / len(chance)
    p = _p_value(concept_scores, chance)
    return TCAV(score=score, random=random, p=p, significant=p * n_concepts < 0.05)


def _p_value(a: list[float], b: list[float]) -> float:
    """Welch's test, or that of the side that varies against the constant of the other."""
    constant_a, constant_b = len(set(a)) == 1, len(set(b)) == 1
    if constant_a and constant_b:
        return float("nan") if a[0] == b[0] else 0.0
    if constant_a or constant_b:
        varies, constant = (b, a[0]) if constant_a else (a, b[0])
        return float(np.asarray(stats.ttest_1samp(varies, constant))[1])
    return float(np.asarray(stats.ttest_ind(a, b, equal_var=False))[1])


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
            if not 0 <= number < len(self._probes):
                raise MonosemaError(
                    f"given must name concepts 0..{len(self._probes) - 1}, got {number}"
                )
            concepts[:, number] = values
        return np.asarray(self._head.predict(concepts))


def intervention_curve(
    model: ConceptBottleneck,
    units: Units,
    concepts: Bool[np.ndarray, "row concept"],
    y: Int[np.ndarray, " row"],
    order: Sequence[int] | None = None,
) -> list[float]:
    """Accuracy with the first 0, 1, ... concepts of an order set to their true values."""
    numbers = list(range(concepts.shape[1])) if order is None else list(order)
    given = [{i: concepts[:, i] for i in numbers[:n]} for n in range(len(numbers) + 1)]
    return [float((model.predict(units, of_one) == y).mean()) for of_one in given]
