"""The refined read-out of a dictionary, set from rows, and a linear encoder that learns from it.

tau is set without any truth. The lengths p_i of latents that are in a row lie around what the
latent usually adds; those of latents that are not are what noise and overlap leave. Where the two
kinds part, the density of all lengths has a valley, and fewest errors are made by cutting in it: in
units of each latent's usual length, since latents differ in it. Where they do not part, nothing in
the rows says which latents are too many. Then tau is one length for all, and keeps the number of
latents that the dictionary fires.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import TRAINING_SPLITS
from sae import activations
from sae.architecture import JumpReLU
from sae.autoencoder import Latents, SparseAutoencoder
from sae.metrics import FVU, L0Histogram
from sae.read_out import (
    NEAR_AT_LEAST,
    READ_OUTS,
    ReadOut,
    candidates,
    require_refinable,
)
from sae.train.optim_config import automatic_rate

ROWS, CHUNK = 16_384, 2048
"""Rows that a read-out is set on, and rows at once."""

NEAR_THRESHOLD = 4
"""Where a threshold decides, so many times the latents that fire may fire in the second round."""

BINS, SMOOTHING, DEPTH = 200, 6, 1.5
"""Of the histogram of lengths; the bins that a bell curve spreads each over; and how many times
the valley's density the lower of its two sides must have."""

SIDE = 0.1
"""Share of the lengths that each side of a valley must hold: tails are too thin to have one."""

LEAST = 8
"""Lengths above the valley that a latent must have for a usual length of its own."""


class Figures(NamedTuple):
    """What one way of reading does on rows."""

    fvu: float
    l0: float


def _chunks(
    dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"]
) -> Iterator[Float[Tensor, "batch d_in"]]:
    for part in x.split(CHUNK):
        yield part.to(dictionary.dec_rows.device)


def sample(
    rows: ActivationCache, hook_point: str, splits: tuple[str, ...], n: int, seed: int
) -> Float[Tensor, "row d_in"]:
    """Return some rows of a cache, which shows the hook points that are read as one."""
    numbers = rows.rows(splits)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return rows[hook_point][numbers[order[:n]].sort().values].float()


def set_read_out(
    dictionary: SparseAutoencoder,
    rows: ActivationCache,
    hook_point: str,
    n: int = ROWS,
    seed: int = 0,
    progress: Progress = silent,
) -> ReadOut:
    """Set the refined read-out of a dictionary on so many training rows of a cache."""
    require_refinable(dictionary.config)
    x = sample(rows, hook_point, TRAINING_SPLITS, n, seed)
    is_its_cache = dictionary.provenance.get("cache") == rows.fingerprint
    fit = fit_read_out(dictionary, x, progress, trained_on_them=is_its_cache)
    made_from = {**fit.made_from, "cache": rows.fingerprint, "seed": seed}
    dictionary.read_out = read_out = replace(fit, made_from=made_from)
    return read_out


@torch.no_grad()
def figures(dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"]) -> dict[str, Figures]:
    """FVU and L0 of rows by each way of reading."""
    found: dict[str, Figures] = {}
    for name in READ_OUTS[: 1 if dictionary.read_out is None else 2]:
        fvu, l0 = FVU(), L0Histogram()
        for part in _chunks(dictionary, x):
            latents = dictionary.encode(part, name)
            fvu.update(part, dictionary.decode(latents, part))
            l0.update(latents.values)
        found[name] = Figures(fvu.compute(), l0.mean)
    return found


@torch.no_grad()
def fit_read_out(
    dictionary: SparseAutoencoder,
    x: Float[Tensor, "row d_in"],
    progress: Progress = silent,
    *,
    trained_on_them: bool = False,
) -> ReadOut:
    """Set the refined read-out on rows; the dictionary is not changed.

    Args:
        dictionary: Any that predicts the rows that it reads.
        x: The rows.
        progress: Called after each chunk.
        trained_on_them: It is known that the dictionary was trained on such rows, so that one
            which reconstructs them worse than their mean is a bad one, and not one of other rows.

    Raises:
        ValueError: If there are no rows, or the dictionary does not reconstruct them.
    """
    require_refinable(dictionary.config)
    if len(x) < 2:
        raise MonosemaError(f"rows must be at least 2 to set a read-out, got {len(x)}")
    linear = figures(dictionary.reading("linear"), x)["linear"]
    if not linear.fvu < (float("inf") if trained_on_them else 1):
        raise MonosemaError(
            "the dictionary must reconstruct the rows better than their mean, with an FVU below 1, "
            f"got {linear.fvu:.3g}; pass the cache and the hook point that it was trained on"
        )
    weights, decoder = dictionary.encoder(), dictionary.decoder()
    activation, d_sae = dictionary.config.activation, dictionary.config.d_sae
    margin = _margin(dictionary, x[:CHUNK], linear.l0)
    lengths, latents = [], []
    for part in _chunks(dictionary, x):
        found = candidates(activation, dictionary.scaled(part), weights, decoder, margin)
        lengths.append(found.lengths.cpu())
        latents.append(found.latents.indices.cpu())
        progress(min(len(lengths) * CHUNK, len(x)), len(x), "rows")
    tau, rule = _tau(torch.cat(lengths), torch.cat(latents), d_sae, round(linear.l0 * len(x)))
    return ReadOut(tau=tau, margin=margin, made_from={"rows": len(x), "rule": rule})


def _margin(dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"], l0: float) -> float:
    """How far below the threshold the latents reach that may fire in the second round."""
    activation, weights = dictionary.config.activation, dictionary.encoder()
    if activation.facts.choice in ("row", "group"):
        return 0.0
    u = dictionary.scaled(x.to(weights.enc_rows.device))
    below = activations.threshold_of(activation, weights) - activations.pre_acts(u, weights)
    n = min(round(max(NEAR_THRESHOLD * l0, NEAR_AT_LEAST) * len(x)), below.numel())
    return max(0.0, float(below.flatten().kthvalue(n).values))


def _tau(
    lengths: Float[Tensor, " entry"], latents: Int[Tensor, " entry"], d_sae: int, n: int
) -> tuple[Float[Tensor, " d_sae"], str]:
    """What p_i must exceed, for each latent, and the rule that said so."""
    lengths, latents = lengths[lengths > 0], latents[lengths > 0]
    cut = valley(lengths)
    if cut is None:
        ordered = lengths.sort(descending=True).values
        tau = float(ordered[n]) if n < len(ordered) else 0.0
        return torch.full((d_sae,), tau), "as many latents as the linear read-out"
    usual = usual_lengths(lengths, latents, cut, d_sae)
    share = valley(lengths / usual[latents])
    tau = torch.full((d_sae,), cut) if share is None else usual * share
    return tau, "the valley between the lengths of latents that are there and of those that are not"


def usual_lengths(
    lengths: Float[Tensor, " entry"], latents: Int[Tensor, " entry"], cut: float, d_sae: int
) -> Float[Tensor, " d_sae"]:
    """Mean length of each latent above the cut; the mean over latents where it has too few."""
    is_above = lengths > cut
    n = torch.bincount(latents[is_above], minlength=d_sae)
    total = torch.zeros(d_sae).index_add_(0, latents[is_above], lengths[is_above].float())
    usual = total / n.clamp_min(1)
    has_own = n >= LEAST
    mean = usual[has_own].mean() if bool(has_own.any()) else lengths[is_above].mean()
    return torch.where(has_own, usual, mean)


def valley(lengths: Float[Tensor, " entry"]) -> float | None:
    """Where the density of lengths is low between two sides that are higher; None if nowhere."""
    if len(lengths) < BINS:
        return None
    ordered, last = lengths.float().sort().values, len(lengths) - 1
    most, *ends = (float(ordered[int(share * last)]) for share in (0.999, SIDE, 1 - SIDE))
    counts = torch.histc(lengths.float(), BINS, 0, most)
    reach = 4 * SMOOTHING
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / SMOOTHING).square())
    padded = torch.nn.functional.pad(counts[None, None], (reach, reach), mode="replicate")
    density = torch.nn.functional.conv1d(padded, (bell / bell.sum())[None, None])[0, 0]
    left, right = density.cummax(0).values, density.flip(0).cummax(0).values.flip(0)
    middles = (torch.arange(BINS) + 0.5) * most / BINS
    depth = torch.minimum(left, right) / density.clamp_min(1e-9)
    depth[(middles < ends[0]) | (middles > ends[1])] = 0
    place = int(depth.argmax())
    return float(middles[place]) if float(depth[place]) >= DEPTH else None


STEPS, BATCH = 1000, 512
"""Of the distilled encoder: steps of Adam, and rows of each."""

SILENT = 0.25
"""Where a latent is silent, pre-activations are pushed below this share of its usual activation."""

N_THRESHOLDS = 64
"""Thresholds that are tried for each latent, up to 1.5 times its usual activation."""


def distilled(
    dictionary: SparseAutoencoder,
    x: Float[Tensor, "row d_in"],
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress = silent,
) -> SparseAutoencoder:
    """A dictionary with the same decoder whose linear encoder is fitted to the refined latents.

    Where a latent fires, (h - a)^2 is made small, a its refined activation; where it is silent,
    max(h - SILENT * usual, 0)^2, both times |d_i|^2: how far below its threshold a silent latent
    is does not matter. Then each latent gets the threshold at which it agrees most, by F1, with
    the refined latent on these rows. The form is JumpReLU's.

    Args:
        dictionary: With a refined read-out.
        x: Rows to learn from.
        steps: Steps of Adam, whose rate is `lr: auto` and falls to 0.
        seed: Decides which rows are in which step.
        progress: Called after each step.
    """
    targets, usual = _targets(dictionary, x)
    student = _student(dictionary)
    weights = student.dec_rows.detach().square().sum(dim=1)
    batch = min(BATCH, len(x))
    lr = automatic_rate(student.config.d_sae, student.config.d_in, batch, steps)
    adam = torch.optim.Adam([student.enc_rows, student.b_enc], lr=lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        with torch.enable_grad():
            u = student.scaled(x[rows].to(weights.device))
            h = activations.pre_acts(u, student.encoder())
            a = activations.to_dense(targets.rows(rows), len(weights))
            wrong = torch.where(a > 0, h - a, torch.relu(h - SILENT * usual))
            loss = (wrong.square() * weights).sum(dim=1).mean()
            student.enc_rows.grad, student.b_enc.grad = torch.autograd.grad(
                loss, [student.enc_rows, student.b_enc]
            )
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        adam.step()
        progress(step + 1, steps, "steps")
    _set_thresholds(student, x, targets, usual)
    return student


class _Targets(NamedTuple):
    """The refined latents of all rows, row after row."""

    values: Float[Tensor, " entry"]
    indices: Int[Tensor, " entry"]
    bounds: Int[Tensor, " bound"]

    def rows(self, numbers: Int[Tensor, " row"]) -> Latents:
        """Those of some rows."""
        first, counts = self.bounds[numbers], self.bounds.diff()[numbers]
        width = max(int(counts.max()), 1)
        place = torch.arange(width)
        is_there = place < counts[:, None]
        entry = (first[:, None] + place).clamp_max(max(len(self.values) - 1, 0))
        return Latents(self.values[entry] * is_there, self.indices[entry] * is_there)


@torch.no_grad()
def _targets(
    dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"]
) -> tuple[_Targets, Float[Tensor, " d_sae"]]:
    values, indices, counts = [], [], []
    for part in _chunks(dictionary, x):
        latents = dictionary.encode(part, "refined")
        fires = latents.values != 0
        values.append(latents.values[fires])
        indices.append(latents.indices[fires])
        counts.append(fires.sum(dim=1))
    bounds = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    targets = _Targets(torch.cat(values), torch.cat(indices), bounds)
    usual = usual_lengths(targets.values, targets.indices, 0.0, dictionary.config.d_sae)
    return targets, usual


@torch.no_grad()
def _student(dictionary: SparseAutoencoder) -> SparseAutoencoder:
    """The same dictionary in JumpReLU's form; its encoder gives the activations themselves."""
    config = dictionary.config
    form = replace(config, activation=JumpReLU(threshold=0.0), gate_by_decoder_norm=False)
    student, weights = SparseAutoencoder(form).to(dictionary.dec_rows.device), dictionary.encoder()
    given = dict(dictionary.named_parameters())
    for name, parameter in student.named_parameters():
        if name in given and name != "threshold":
            parameter.copy_(given[name])
    rows, bias = weights.enc_rows, weights.b_enc
    if weights.magnitude is not None:
        rows = rows * weights.magnitude.scale[:, None]
        bias = bias * weights.magnitude.scale + weights.magnitude.shift
    if weights.norms is not None:
        rows, bias = rows / weights.norms[:, None], bias / weights.norms
    student.enc_rows.copy_(rows)
    student.b_enc.copy_(bias)
    return student


@torch.no_grad()
def _set_thresholds(
    student: SparseAutoencoder,
    x: Float[Tensor, "row d_in"],
    targets: _Targets,
    usual: Float[Tensor, " d_sae"],
) -> None:
    """Give each latent the threshold at which its firing agrees most with the targets'."""
    d_sae = student.config.d_sae
    called, hits = torch.zeros(2, N_THRESHOLDS, d_sae, dtype=torch.int64, device=usual.device)
    step = 1.5 * usual / N_THRESHOLDS
    start = 0
    for part in _chunks(student, x):
        h = activations.pre_acts(student.scaled(part), student.encoder())
        fires = (
            activations.to_dense(targets.rows(torch.arange(start, start + len(part))), d_sae) > 0
        )
        place = (h / step).ceil().long().sub(1).clamp(-1, N_THRESHOLDS - 1) + 1
        room = torch.zeros(2, N_THRESHOLDS + 1, d_sae, dtype=torch.int64, device=usual.device)
        room[0].scatter_add_(0, place, torch.ones_like(place))
        room[1].scatter_add_(0, place, fires.long())
        # Above the threshold number i are the rows at places i + 1 and more.
        called += room[0, 1:].flip(0).cumsum(dim=0).flip(0)
        hits += room[1, 1:].flip(0).cumsum(dim=0).flip(0)
        start += len(part)
    n_fired = torch.bincount(targets.indices, minlength=d_sae)
    f1 = 2 * hits / (called + n_fired).clamp_min(1)
    student.get_parameter("threshold").copy_(f1.argmax(dim=0) * step)
