"""Where the weights begin, as frozen configs; no torch here."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from activations_cache.checks import at_least, positive, require


@dataclass(frozen=True, kw_only=True)
class _Initial:
    """What all ways to begin share: the bias, and the length of the rows."""

    bias: Literal["mean", "median"] = "mean"
    """Where b_dec begins: the rows' mean, or their geometric median, which outliers hardly move."""
    norms: tuple[float, ...] = ()
    """Norms of the first rows that are tried: that of least error takes decoder_norm's place."""
    n_rows: int = 4096
    """Rows of the cache that are looked at, drawn by the seed; not needed for mean alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for norm in self.norms:
            positive("norms", norm)
        require(len({*self.norms}) == len(self.norms), "norms", "name each once", self.norms)
        at_least("n_rows", self.n_rows, 1)


@dataclass(frozen=True, kw_only=True)
class Tied(_Initial):
    """Random decoder directions, the encoder their transpose; what is meant without a kind."""

    IMPLIED: ClassVar[bool] = True

    kind: Literal["tied"] = "tied"
    """Tells the ways to begin apart."""


@dataclass(frozen=True, kw_only=True)
class DataPoints(_Initial):
    """Decoder directions of rows of the cache less the bias, the encoder their transpose.

    Where there are fewer rows than latents, the others are random. Rows that are predicted from
    others give the decoder, those that are read the encoder.
    """

    kind: Literal["data_points"] = "data_points"
    """Tells the ways to begin apart."""


Init = Tied | DataPoints
