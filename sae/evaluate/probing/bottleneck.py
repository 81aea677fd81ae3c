"""Concept bottlenecks: an answer from predicted concepts alone, and what correcting them gives."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from sae.evaluate.probing.units import Units, check_two_classes, columns, mean_difference


class ConceptBottleneck:
    """y = g(c_hat(units)): each concept by a probe of k units, the answer by a head on them.

    Koh et al. 2020 (arXiv 2007.04612), fitted one after the other: the head learns on true
    concepts, so correcting a prediction moves its input towards what it knows.
    """

    def __init__(self, k: int = 5, head: Literal["linear", "tree"] = "linear") -> None:
        """Take the number of units per concept and the kind of head; "tree" learns XOR."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
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
        found = [probe.predict_proba(columns(units, ids))[:, 1] for ids, probe in self._probes]
        return np.stack(found, axis=1)

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
                raise ValueError(
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
