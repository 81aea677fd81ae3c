"""SCR and TPP, kept as counter-examples: the audit of arXiv 2605.18229 found both unfit.

Both select the n latents that matter most to a linear probe, remove them from the rows and look
at the accuracy that is left. Nothing in this project ranks dictionaries by them; `audit` prints
beside a value what the reader needs to see why.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from monosema.checks import MonosemaError


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What a value of such a metric is worth."""

    value: float
    """Mean over seeds."""
    reseed_cv: float
    """Standard deviation between seeds over the mean; the audit found 0.39 for TPP at n = 10."""
    oracle: float
    """The value of the true dictionary: below `value`, the metric prefers something else."""

    @property
    def is_fit(self) -> bool:
        """Whether the truth is not beaten and seeds agree to a tenth."""
        return self.oracle >= self.value and self.reseed_cv <= 0.1


def audit(values: Sequence[float], oracle: float) -> Audit:
    """Hold values of several seeds against that of the truth.

    Raises:
        ValueError: If there are fewer than 2 seeds.
    """
    if len(values) < 2:
        raise MonosemaError(f"values must be of at least 2 seeds, got {len(values)}")
    found = torch.tensor(values, dtype=torch.float64)
    mean = float(found.mean())
    cv = float(found.std()) / abs(mean) if mean else float("inf")
    return Audit(value=mean, reseed_cv=cv, oracle=oracle)


class Probe:
    """A linear probe of one concept."""

    def __init__(self, x: Float[Tensor, "row d_model"], y: Bool[Tensor, " row"]) -> None:
        """Fit it."""
        self.model = LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy())
        self.weight = torch.from_numpy(self.model.coef_[0]).double()

    def accuracy(self, x: Float[Tensor, "row d_model"], y: Bool[Tensor, " row"]) -> float:
        """Share of the rows that it calls right."""
        return float((self.model.predict(x.numpy()) == y.numpy()).mean())


def strongest(
    acts: Float[Tensor, "row d_sae"],
    dec_rows: Float[Tensor, "d_sae d_model"],
    y: Bool[Tensor, " row"],
    weight: Float[Tensor, " d_model"],
    n: int,
) -> Int64[Tensor, " n"]:
    """The n latents of the largest (difference of means) * <direction, probe>.

    Raises:
        ValueError: If n is not in 1..d_sae.
    """
    if not 1 <= n <= len(dec_rows):
        raise MonosemaError(f"n must be in 1..{len(dec_rows)}, the number of latents, got {n}")
    contrast = acts[y].double().mean(dim=0) - acts[~y].double().mean(dim=0)
    return (contrast * (dec_rows.double() @ weight)).topk(n).indices


def without(
    x: Float[Tensor, "row d_model"],
    acts: Float[Tensor, "row d_sae"],
    dec_rows: Float[Tensor, "d_sae d_model"],
    latents: Int64[Tensor, " n"],
    *,
    to_mean: bool = False,
) -> Float[Tensor, "row d_model"]:
    """Rows less what some latents add to them, or add beyond their mean; the error is kept."""
    chosen = acts[:, latents]
    return x - (chosen - chosen.mean(dim=0) if to_mean else chosen) @ dec_rows[latents]


def tpp(
    x: Float[Tensor, "row d_model"],
    acts: Float[Tensor, "row d_sae"],
    dec_rows: Float[Tensor, "d_sae d_model"],
    concepts: Bool[Tensor, "row concept"],
    n: int,
) -> float:
    """Targeted probe perturbation: accuracy lost on a concept by removing its n latents.

    Mean over concepts i of the loss on i less the mean loss on the others (arXiv 2411.18895).
    """
    columns = concepts.unbind(dim=1)
    probes = [Probe(x, y) for y in columns]
    before = torch.tensor([p.accuracy(x, y) for p, y in zip(probes, columns, strict=True)])
    margins = []
    for i, (probe, y) in enumerate(zip(probes, columns, strict=True)):
        rest = without(x, acts, dec_rows, strongest(acts, dec_rows, y, probe.weight, n))
        after = torch.tensor([p.accuracy(rest, z) for p, z in zip(probes, columns, strict=True)])
        lost = before - after
        others = torch.cat([lost[:i], lost[i + 1 :]])
        margins.append(float(lost[i] - others.mean()))
    return sum(margins) / len(margins)


def scr(
    x: Float[Tensor, "row d_model"],
    acts: Float[Tensor, "row d_sae"],
    dec_rows: Float[Tensor, "d_sae d_model"],
    wanted: Bool[Tensor, " row"],
    spurious: Bool[Tensor, " row"],
    n: int,
    *,
    to_mean: bool = False,
) -> float:
    """Spurious correlation removal, (acc_ablated - acc_base) / (acc_clean - acc_base).

    The biased probe is fitted where both concepts agree and scored on all rows, before and after
    the n latents of the spurious concept are removed; the clean one is fitted on all rows. As
    published latents are set to 0, which moves rows across the probe's threshold: for a perfect
    dictionary of two concepts this gives 0.05, and 1 with `to_mean`.

    Raises:
        ValueError: If the bias costs nothing, so that there is nothing to remove.
    """
    agree = wanted == spurious
    biased, clean = Probe(x[agree], wanted[agree]), Probe(x, wanted)
    base, best = biased.accuracy(x, wanted), clean.accuracy(x, wanted)
    if best <= base:
        raise MonosemaError(
            f"the biased probe must be worse than the clean one, got {base}, {best}"
        )
    weight = Probe(x, spurious).weight
    chosen = strongest(acts, dec_rows, spurious, weight, n)
    rest = without(x, acts, dec_rows, chosen, to_mean=to_mean)
    return (biased.accuracy(rest, wanted) - base) / (best - base)
