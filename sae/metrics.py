"""Streaming metrics, each with one definition; losses, logs, evaluation and tables use these.

All sums are kept in float64 and all counts in int64, so a figure does not depend on how the rows
were cut into batches. Every class has `update` (a batch of rows) and `merge` (what another process
or shard counted).
"""

import hashlib
import math
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache import seals
from monosema.checks import MonosemaError
from sae.autoencoder import Latents
from sae.read_out import ReadOut, ReadOutName

__all__ = [
    "FVU",
    "Agreement",
    "Firing",
    "L0Histogram",
    "ce_recovered",
    "fvu",
    "fvu_uncentred",
    "stats_file",
]

STATS = "stats.safetensors"
"""Name of the file that `Firing.save` writes beside a dictionary's weights."""

COUNT_AGAIN = "`sae evaluate DICT --cache CACHE`"
"""What makes it, for messages."""

Figure = TypeVar("Figure", float, Tensor)


class FVU:
    """Fraction of variance unexplained of a set of rows, centred per dimension over that set.

    fvu = sum ||x - x_hat||^2 / sum ||x - mean||^2, both sums over all rows that were seen and
    `mean` the mean row. Means and variances of batches are combined as Chan et al. 1979 do.
    """

    def __init__(self) -> None:
        """Start with no rows."""
        self.n_rows = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._spread = torch.zeros((), dtype=torch.float64)
        self._error = torch.zeros((), dtype=torch.float64)

    def update(self, x: Float[Tensor, "batch d_out"], x_hat: Float[Tensor, "batch d_out"]) -> None:
        """Add rows and their reconstructions, both in the same units."""
        if len(x) == 0:
            return
        exact = x.detach().double()
        batch = FVU()
        batch.n_rows = len(x)
        batch._mean = exact.mean(dim=0)
        batch._spread = (exact - batch._mean).square().sum(dim=0)
        batch._error = (exact - x_hat.detach().double()).square().sum(dim=0)
        self.merge(batch)

    def merge(self, other: "FVU") -> None:
        """Add the rows that `other` has seen, as if they had been seen here."""
        total = self.n_rows + other.n_rows
        if total == 0:
            return
        step = other._mean - self._mean
        between = step.square() * (self.n_rows * other.n_rows / total)
        self._mean = self._mean + step * (other.n_rows / total)
        self._spread = self._spread + other._spread + between
        self._error = self._error + other._error
        self.n_rows = total

    def compute(self) -> float:
        """The centred figure: 0 is perfect, 1 is what predicting the mean row gives.

        It is nan where the rows seen do not vary (so also for no rows or one).
        """
        return _ratio(float(self._error.sum()), float(self._spread.sum()))

    def per_dimension(self) -> Float[Tensor, " d_out"]:
        """The centred figure of each dimension; inf or nan where that dimension does not vary."""
        return self._error / self._spread

    def compute_uncentred(self) -> float:
        """Squared error over sum ||x||^2: 1 is what predicting zero gives; nan for zero rows."""
        square = (self._spread + self.n_rows * self._mean.square()).sum()
        return _ratio(float(self._error.sum()), float(square))


def fvu(x: Float[Tensor, "batch d_out"], x_hat: Float[Tensor, "batch d_out"]) -> float:
    """Fraction of variance unexplained, centred per dimension over these rows (see FVU)."""
    metric = FVU()
    metric.update(x, x_hat)
    return metric.compute()


def fvu_uncentred(x: Float[Tensor, "batch d_out"], x_hat: Float[Tensor, "batch d_out"]) -> float:
    """Squared error over squared norm, sum ||x - x_hat||^2 / sum ||x||^2 over these rows."""
    metric = FVU()
    metric.update(x, x_hat)
    return metric.compute_uncentred()


class Agreement:
    """How far reconstructions agree with their rows in direction and in length."""

    def __init__(self) -> None:
        """Start with no rows."""
        self.n_rows = 0
        self._cosine = 0.0
        self._norm_ratio = 0.0
        self._dot = 0.0
        self._square_hat = 0.0

    def update(self, x: Float[Tensor, "batch d_out"], x_hat: Float[Tensor, "batch d_out"]) -> None:
        """Add rows and their reconstructions; rows of norm 0 have no direction and are left out."""
        exact, exact_hat = x.detach().double(), x_hat.detach().double()
        norm = exact.norm(dim=1)
        exact, exact_hat, norm = exact[norm > 0], exact_hat[norm > 0], norm[norm > 0]
        norm_hat, dot = exact_hat.norm(dim=1), (exact * exact_hat).sum(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        self.n_rows += len(exact)
        self._cosine += float((dot / (norm * norm_hat).clamp_min(tiny)).sum())
        self._norm_ratio += float((norm_hat / norm).sum())
        self._dot += float(dot.sum())
        self._square_hat += float(norm_hat.square().sum())

    def merge(self, other: "Agreement") -> None:
        """Add the rows that `other` has seen."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def cosine(self) -> float:
        """Mean over rows of the cosine of x and x_hat (0 where x_hat is 0)."""
        return _ratio(self._cosine, self.n_rows)

    @property
    def norm_ratio(self) -> float:
        """Mean over rows of ||x_hat|| / ||x||."""
        return _ratio(self._norm_ratio, self.n_rows)

    @property
    def relative_bias(self) -> float:
        """E ||x_hat||^2 / E <x, x_hat>: 1 without shrinkage, below 1 where x_hat is too short."""
        return _ratio(self._square_hat, self._dot)


class L0Histogram:
    """How many latents fire in a row: a histogram of the counts."""

    def __init__(self) -> None:
        """Start with no rows."""
        self.rows_per_count = torch.zeros(1, dtype=torch.int64)

    def update(self, values: Float[Tensor, "batch k"]) -> None:
        """Add rows of activations, sparse or dense; only values other than 0 fire."""
        counts = (values.detach() != 0).sum(dim=1).cpu()
        self._add(torch.bincount(counts, minlength=1))

    def merge(self, other: "L0Histogram") -> None:
        """Add the rows that `other` has seen."""
        self._add(other.rows_per_count)

    def _add(self, rows_per_count: Int[Tensor, " row"]) -> None:
        size = max(len(self.rows_per_count), len(rows_per_count))
        total = torch.zeros(size, dtype=torch.int64)
        total[: len(self.rows_per_count)] += self.rows_per_count
        total[: len(rows_per_count)] += rows_per_count
        self.rows_per_count = total

    @property
    def mean(self) -> float:
        """Mean number of latents that fire in a row; nan for no rows."""
        fired = (self.rows_per_count * torch.arange(len(self.rows_per_count))).sum()
        return _ratio(int(fired), int(self.rows_per_count.sum()))

    def quantile(self, share: float) -> int:
        """The smallest count that at least `share` of the rows do not exceed.

        Raises:
            ValueError: If share lies outside 0..1 or no row was seen.
        """
        if not 0 <= share <= 1:
            raise MonosemaError(f"share must lie in 0..1, got {share}")
        n_rows = int(self.rows_per_count.sum())
        if n_rows == 0:
            raise MonosemaError("quantile must be asked for after rows were seen, got 0 rows")
        rank = max(1, math.ceil(share * n_rows))
        return int(torch.searchsorted(self.rows_per_count.cumsum(0), rank))


class Firing:
    """Per latent: in how many rows it fired, and its largest activation."""

    def __init__(self, d_sae: int) -> None:
        """Start with no rows."""
        self.n_rows = 0
        self.n_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.max_activation = torch.zeros(d_sae, dtype=torch.float32)

    def update(self, latents: Latents) -> None:
        """Add a batch of encoded rows."""
        values, indices = latents.values.detach().cpu(), latents.indices.cpu()
        fired = values != 0
        values, indices = values[fired].float(), indices[fired]
        self.n_rows += len(fired)
        self.n_fired += torch.bincount(indices, minlength=len(self.n_fired))
        self.max_activation.scatter_reduce_(0, indices, values, "amax")

    def merge(self, other: "Firing") -> None:
        """Add the rows that `other` has seen."""
        self.n_rows += other.n_rows
        self.n_fired += other.n_fired
        self.max_activation = torch.maximum(self.max_activation, other.max_activation)

    def save(
        self, directory: str | Path, weights_sha256: str | None = None, name: str = STATS
    ) -> Path:
        """Write `stats.safetensors` into a dictionary's directory and return its path.

        It holds float32 `max_activation` and `density`, int64 `n_fired`, each (d_sae,), and the
        int64 scalar `n_rows`; its metadata names the hash of the dictionary's weights.

        Args:
            directory: Where it goes.
            weights_sha256: Of the weights; of those in the directory when absent.
            name: Of the file; another one for latents that are read otherwise (`stats_file`).
        """
        path = Path(directory) / name
        tensors = {
            "max_activation": self.max_activation,
            "density": self.density,
            "n_fired": self.n_fired,
            "n_rows": torch.tensor(self.n_rows),
        }
        metadata = {"sae_sha256": weights_sha256 or _weights_sha256(path.parent)}
        seals.write(path.parent, {name: safetensors.torch.save(tensors, metadata)})
        return path

    @classmethod
    def read(
        cls, directory: str | Path, weights_sha256: str | None = None, name: str = STATS
    ) -> "Firing":
        """Read what `save` wrote.

        Args:
            directory: Where it is.
            weights_sha256: As for `save`.
            name: As for `save`.

        Raises:
            FileNotFoundError: If the directory holds no statistics.
            ValueError: If they are damaged, or were made for other weights than are there.
        """
        path = Path(directory) / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} must exist, got no such file; run {COUNT_AGAIN}")
        seals.require_whole(path, advice=f"run {COUNT_AGAIN} again to make it anew")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                max_activation = file.get_tensor("max_activation")
                n_fired, n_rows = file.get_tensor("n_fired"), file.get_tensor("n_rows")
        except safetensors.SafetensorError as error:
            raise MonosemaError(f"{path} must be whole, got: {error}; run {COUNT_AGAIN}") from error
        found = weights_sha256 or _weights_sha256(path.parent)
        if metadata.get("sae_sha256") != found:
            raise MonosemaError(
                f"{path} must be made for the weights of the dictionary (sha256 {found}), "
                f"got {metadata.get('sae_sha256')}; run {COUNT_AGAIN}"
            )
        firing = cls(len(n_fired))
        firing.n_rows = int(n_rows)
        firing.n_fired, firing.max_activation = n_fired, max_activation
        return firing

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows in which each latent fired."""
        return (self.n_fired.double() / max(self.n_rows, 1)).float()

    @property
    def n_dead(self) -> int:
        """Latents that fired in none of the `n_rows` rows."""
        return int((self.n_fired == 0).sum())

    @property
    def dead_fraction(self) -> float:
        """`n_dead` over d_sae."""
        return self.n_dead / len(self.n_fired)

    @property
    def dead_density_bound(self) -> float:
        """Rule of three: with 95 % confidence a silent latent fires in fewer than 3/n of rows."""
        return _ratio(3, self.n_rows)


def stats_file(
    read_by: ReadOutName, weights_sha256: str, read_out: ReadOut | None
) -> tuple[str, str]:
    """The name of the file of statistics for one way of reading, and the hash that it is of.

    Refined latents depend on the weights and on what the read-out was set to.
    """
    if read_by == "linear":
        return STATS, weights_sha256
    of = f"{weights_sha256} {read_out.sha256 if read_out else None}"
    return f"{read_by}_{STATS}", hashlib.sha256(of.encode()).hexdigest()


def ce_recovered(ce_base: Figure, ce_spliced: Figure, ce_ablated: Figure) -> Figure:
    """Share of the cross-entropy lost by an ablation that a dictionary brings back.

    (ce_ablated - ce_spliced) / (ce_ablated - ce_base), all three in nats per token over the same
    tokens, as numbers or as tensors of one shape: 1 for a perfect dictionary, 0 for one that is as
    bad as the ablation, negative for a worse one; nan where the ablation changes nothing.
    """
    recovered, lost = ce_ablated - ce_spliced, ce_ablated - ce_base
    if isinstance(lost, Tensor):
        return recovered / lost.masked_fill(lost == 0, math.nan)
    return recovered / lost if lost != 0 else math.nan


def _weights_sha256(directory: Path) -> str:
    return seals.sha256(directory / "sae.safetensors")


def _ratio(numerator: float | int, denominator: float | int) -> float:
    return numerator / denominator if denominator != 0 else math.nan
