"""Concepts by the direction of text embeddings: cosine with both modalities centred, and SpLiCE."""

import torch
from jaxtyping import Float
from sklearn.linear_model import Lasso
from torch import Tensor


def text_cosine(
    directions: Float[Tensor, "d_sae d_model"],
    texts: Float[Tensor, "word d_model"],
    other_texts: Float[Tensor, "batch d_model"] | None = None,
) -> Float[Tensor, "d_sae word"]:
    """Cosine of latents' directions and text embeddings, the texts without their common mean.

    A dictionary's directions have no offset of their modality, text embeddings have; taken off,
    a constant shift of all texts changes no name.

    Args:
        directions: Decoder rows, in the space of the embeddings.
        texts: One embedding per concept.
        other_texts: Where the mean is taken; the concepts themselves when absent.

    Raises:
        ValueError: If there is only one concept to take the mean of.
    """
    population = texts if other_texts is None else other_texts
    if len(population) < 2:
        raise ValueError(f"concepts must be at least two to be centred, got {len(population)}")
    centred = torch.nn.functional.normalize(texts - population.mean(dim=0), dim=1)
    return torch.nn.functional.normalize(directions, dim=1) @ centred.T


def splice(
    z: Float[Tensor, "batch d_model"], concepts: Float[Tensor, "word d_in"], penalty: float
) -> Float[Tensor, "batch word"]:
    """Sparse non-negative weights of concepts: min over w >= 0 of |z - C w|^2 + penalty |w|_1.

    SpLiCE (Bhalla et al. 2024, arXiv 2402.10376). Both sides are taken as they are: centre and
    normalise them first, each modality by its own mean.

    Raises:
        ValueError: If widths differ or the penalty is not positive.
    """
    if z.shape[1] != concepts.shape[1]:
        raise ValueError(f"concepts must be as wide as z, {z.shape[1]}, got {concepts.shape[1]}")
    if penalty <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}")
    # scikit-learn minimises |z - C w|^2 / (2 d) + alpha |w|_1.
    model = Lasso(
        alpha=penalty / (2 * z.shape[1]), positive=True, fit_intercept=False, max_iter=10_000,
        tol=1e-6,
    )  # fmt: skip
    model.fit(concepts.T.double().numpy(), z.T.double().numpy())
    return torch.from_numpy(model.coef_).reshape(len(z), len(concepts)).to(z)
