"""What goes into a forward pass of training beside the rows, and what comes out.

Terms of the loss that several forward passes have, and BatchTopK's selection over all processes.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosema.checks import MonosemaError
from sae import losses
from sae.activations import EncoderWeights, Latents
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.loss_config import Control, FixedPrefixes, Matryoshka, RandomPrefixes
from sae.train.optim_config import first_target, random_prefixes, target_now
from sae.train.ranks import ALONE, Ranks
from sae_kernels import Csr, encode_batch_topk
from sae_kernels import auxk as reconstruction_by_dead
from sae_kernels.launch import counts, rows_of

Taken = Bool[Tensor, ""] | None
"""Whether a step is taken, where only the device knows; None where the host has looked: it is."""


class Power(NamedTuple):
    """Where p-annealing stands."""

    p: float = 1.0
    """The power of the penalty."""
    scale: float | Float[Tensor, ""] = 1.0
    """What its weight is multiplied by."""

    def followed_by(self, new: "Power", taken: Taken) -> "Power":
        """The new one, if the step is taken; where the power itself falls the host looks."""
        if taken is None or (new.p != self.p and bool(taken)):
            return new
        if new.p != self.p or not isinstance(new.scale, Tensor):
            return self
        return Power(self.p, new.scale.where(taken, self.scale))


class DeadBound:
    """A bound on how many latents are dead, for some steps after one at which the host looked.

    The host looks seldom: how many can be dead by then is known from how long they are silent.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self.most, self.until, self.n_rows = 0, 0, 0

    def of(
        self,
        silent: Int[Tensor, " d_sae"],
        dead_after: int,
        n_steps: int,
        n_rows: int,
        ranks: Ranks = ALONE,
    ) -> int:
        """The bound at a step with so many rows; latents are dead after so many silent ones.

        It has three binary digits, so that it, and shapes with it, seldom change.
        """
        if n_steps >= self.until or n_rows > self.n_rows:
            ahead = min(max(dead_after // (8 * n_rows), 8), LOOK_EVERY)
            most = ranks.largest(int((silent + ahead * n_rows >= dead_after).sum()))
            digit = 1 << max(most.bit_length() - 3, 0)
            self.most = min(-(-most // digit) * digit, len(silent))
            self.until, self.n_rows = n_steps + ahead, n_rows
        return self.most


class Rows(NamedTuple):
    """The rows of a step, in the dictionary's units."""

    u: Float[Tensor, "batch d_in"]
    """What is read."""
    v: Float[Tensor, "batch d_out"]
    """What is predicted; u itself for an autoencoder proper."""


class Forward(NamedTuple):
    """What a forward pass gives."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    error: Float[Tensor, ""]
    """The squared error of the whole dictionary, summed over d."""
    n_fired: Int[Tensor, " d_sae"]
    """In how many rows each latent fired."""
    l0: Float[Tensor, ""]
    """Mean number of latents that fired in a row."""
    y: Float[Tensor, "batch d_out"]
    """The whole dictionary's reconstruction, detached; of a batch in parts the first one's."""
    threshold: Float[Tensor, ""] | None = None
    """For BatchTopK: the smallest activation that was kept."""
    power: Power | None = None
    """For p-annealing: where it stands now."""
    squares: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None = None
    """Squared norms of the gradients of enc_rows and dec_rows, where they are known already."""


LOOK_EVERY = 64
"""Steps at most between two at which the host looks how many latents are dead."""


class WeightedLoss(NamedTuple):
    """A loss of the user's own, ready to be called."""

    coefficient: float
    loss: losses.Loss


class Moment(NamedTuple):
    """Where training stands, as far as the losses depend on it."""

    n_steps: int
    total_steps: int
    dead: Bool[Tensor, " d_sae"]
    """Latents that are dead."""
    bf16: bool
    """Whether the encoder's and the dense products are in bfloat16."""
    power: Power = Power()
    """Where p-annealing stood after the step before."""
    ranks: Ranks = ALONE
    """The processes that train together."""
    n_rows: int = 0
    """Rows of the batch, on all processes."""
    share: float = 1.0
    """This process's part of them."""
    losses: tuple[WeightedLoss, ...] = ()
    """Losses of the user's own."""
    most_dead: int | None = None
    """A number that the dead latents do not exceed; without it the host looks how many they are."""
    looks: bool = True
    """Whether the host may look at what is on the device."""


def autocast(device: torch.device, is_on: bool) -> torch.autocast:
    """A context in which products are in bfloat16, if it is on."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_on)


def prefix_ends(matryoshka: Matryoshka, d_sae: int, n_steps: int) -> tuple[int, ...]:
    """Sizes of the prefixes at a step, the whole dictionary last."""
    if isinstance(matryoshka, FixedPrefixes):
        return (*matryoshka.ends, d_sae)
    assert isinstance(matryoshka, RandomPrefixes), matryoshka
    of = matryoshka
    return random_prefixes(n_steps, of.seed, of.n, d_sae, of.exponent)


def prefix_share(matryoshka: Matryoshka, n_steps: int, total_steps: int) -> float:
    """Weight of the mean over the prefixes at a step; the rest is that of the whole dictionary."""
    until = matryoshka.until if isinstance(matryoshka, FixedPrefixes) else None
    return 1.0 if until is None else max(0.0, 1 - n_steps / (until * total_steps))


def penalised_encoder(autoencoder: SparseAutoencoder, config: DictionaryConfig) -> EncoderWeights:
    """The encoder beside a penalty; under a controller b_dec stands still in it.

    The penalty would move b_dec to where all pre-activations are low. Latents that fall silent on
    the way never fire again, since b_dec moves on.
    """
    weights = autoencoder.encoder()
    if config.control is None or config.b_in != "b_dec":
        return weights
    return weights._replace(b_in=autoencoder.b_dec.detach())


def encoder_of_dead(autoencoder: SparseAutoencoder) -> EncoderWeights:
    """What reads rows for the dead latents: b_in stands still, and gates have no bias.

    A gate that is shut for all rows has no gradient. Without its bias many rows reach it: its
    latent aligns with what is missing, and its h grows until the gate opens.
    """
    weights = autoencoder.encoder()
    b_in = None if weights.b_in is None else weights.b_in.detach()
    is_gate = autoencoder.config.activation.facts.trains == "gated"
    b_enc = torch.zeros_like(weights.b_enc) if is_gate else weights.b_enc
    return weights._replace(b_in=b_in, b_enc=b_enc)


def auxk(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    y: Float[Tensor, "batch d_out"],
) -> float | Float[Tensor, ""]:
    """How badly the dead latents reconstruct what y leaves, times the coefficient; 0 without."""
    settings, dec_rows = config.auxk, autoencoder.dec_rows
    if settings is None or not may_be_dead(moment):
        return 0.0
    k, weights = settings.k or max(rows.u.shape[1] // 2, 1), encoder_of_dead(autoencoder)
    if weights.norms is not None:
        dec_rows = dec_rows / weights.norms[:, None]
    with autocast(rows.u.device, moment.bf16 or settings.products == "bf16"):
        found = reconstruction_by_dead(
            rows.u,
            weights.enc_rows,
            weights.b_enc,
            dec_rows,
            moment.dead,
            k,
            b_in=weights.b_in,
            most=moment.most_dead,
        )
    residual = (rows.v - y).detach()
    with autocast(rows.u.device, False):
        error = losses.squared_error(residual, found.to(residual.dtype))
    return settings.coefficient * error * (1 if moment.most_dead is None else moment.dead.any())


def may_be_dead(moment: Moment) -> bool:
    """Whether any latent may be dead."""
    return bool(moment.dead.any()) if moment.most_dead is None else moment.most_dead > 0


def own_losses(
    autoencoder: SparseAutoencoder,
    rows: Rows,
    moment: Moment,
    y: Float[Tensor, "batch d_out"],
    acts: Latents | Float[Tensor, "batch d_sae"],
) -> float | Float[Tensor, ""]:
    """The losses of the user's own; 0 without.

    Raises:
        ValueError: If one is not a single number.
    """
    total, at = 0.0, (moment.dead, moment.n_steps, moment.total_steps)
    with autocast(rows.u.device, False):
        for coefficient, loss in moment.losses:
            value = loss(losses.StepTensors(autoencoder, *rows, y, acts, *at))
            if not isinstance(value, Tensor) or value.dim() != 0:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise MonosemaError(
                    f"{type(loss).__name__} must give a tensor without dimensions, got {shape}; "
                    "take the mean over the rows"
                )
            total = total + coefficient * value
    return total


def controlled(control: Control, found: Forward, rows: Rows, moment: Moment) -> Forward:
    """The same with the penalty's new weight."""
    l0, before = moment.ranks.mean(found.l0, moment.share), moment.power
    first = first_target(control, rows.u.shape[1], len(moment.dead))
    target = target_now(control, first, moment.n_steps, moment.total_steps)
    rate = control.rate * max(1.0, math.log(first / control.target, 16))
    off = (l0.double() / target - 1).clamp(-1.0, 1.0)
    return found._replace(power=Power(before.p, before.scale * (rate * off).exp()))


def weighed(weight: float | Float[Tensor, ""], term: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """A term of the loss at its weight, which may be a figure on the device."""
    return (weight.to(term.dtype) if isinstance(weight, Tensor) else weight) * term


DIGIT_BITS = 16
"""The largest values are counted by so many of their bits at a time."""


class _Bound(NamedTuple):
    """What separates the values that are kept from the others."""

    key: Int[Tensor, ""]
    """The smallest value that is kept, as its bits."""
    n_equal: Int[Tensor, ""]
    """How many of those that equal it are kept."""


def batch_topk(
    u: Float[Tensor, "batch d_in"],
    weights: EncoderWeights,
    k: int,
    n_rows: int,
    ranks: Ranks,
    looks: bool = True,
) -> Csr:
    """This process's part of the k * n_rows largest activations of all processes.

    Value descending, on equal values row and then latent ascending, as in one process. Each
    process offers its own best. Where rows are split, the bound may lie below all of these, and it
    may have more that belong to the answer: then all of them offer twice as many. That is the one
    thing that the host has to look at. What is not kept stays as a place with the value 0 where it
    should look at nothing else.
    """
    d_sae, are_split = len(weights.enc_rows), ranks.rows.size > 1
    offered = min(2 * k if are_split else k, d_sae)
    while True:
        found = encode_batch_topk(
            u, weights.enc_rows, weights.b_enc, offered, b_in=weights.b_in, relu=True
        )
        keys = _keys(found.values)
        bound = _bound(keys, k * n_rows, ranks)
        # of one process all, where it has the rows of all: it can offer no more than are kept
        if not (are_split and offered < d_sae and ranks.holds_for_any(_is_short(keys, bound))):
            kept = _above(found, keys, bound, ranks, looks)
            break
        offered = min(2 * offered, d_sae)
    if weights.norms is None:
        return kept
    return kept._replace(values=kept.values / weights.norms[kept.indices])


def _is_short(keys: Int[Tensor, " entry"], bound: _Bound) -> Bool[Tensor, ""]:
    """Whether all that was offered is kept, so that more may belong to the answer."""
    return ((keys >= bound.key).all() & (bound.key > 0)) if len(keys) else bound.key < 0


def _keys(values: Float[Tensor, " entry"]) -> Int[Tensor, " entry"]:
    """Bits of values that are not negative; these order them, with NaN on top."""
    wide = values.dtype == torch.float64
    return values.detach().abs().view(torch.int64 if wide else torch.int32)


def _bound(keys: Int[Tensor, " entry"], n_kept: int, ranks: Ranks) -> _Bound:
    """Find the n_kept-th largest key of all processes, digit by digit from the highest."""
    found, left = keys.new_zeros(1), keys.new_full((1,), n_kept, dtype=torch.int64)
    is_left = torch.ones_like(keys, dtype=torch.bool)
    for shift in range(8 * keys.element_size() - DIGIT_BITS, -1, -DIGIT_BITS):
        digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
        of_digit = counts(digits, 1 << DIGIT_BITS, is_left)
        ranks.world.sum_(of_digit)
        falling = of_digit.flip(0)
        above = falling.cumsum(0)
        place = torch.searchsorted(above, left)
        left = left - (above - falling).gather(0, place)
        digit = (1 << DIGIT_BITS) - 1 - place
        found = found | (digit << shift).to(found.dtype)
        is_left = is_left & (digits == digit)
    return _Bound(found[0], left[0])


def _above(
    found: Csr, keys: Int[Tensor, " entry"], bound: _Bound, ranks: Ranks, looks: bool
) -> Csr:
    """Keep what is above the bound, and of what equals it the first ones of all processes."""
    n_rows = len(found.row_ptr) - 1
    rows = rows_of(found.row_ptr, len(keys))
    equal = keys == bound.key
    per_row = counts(rows, n_rows, equal)
    others = ranks.latents.gather(per_row)  # (shards, batch)
    per_process = ranks.rows.gather(others.sum().reshape(1))
    before = per_process[: ranks.rows.rank].sum()
    earlier_rows = others.sum(dim=0).cumsum(0) - others.sum(dim=0)
    first = before + earlier_rows + others[: ranks.latents.rank].sum(dim=0)
    place = equal.cumsum(0) - 1 - (per_row.cumsum(0) - per_row)[rows]
    kept = (keys > bound.key) | (equal & (first[rows] + place < bound.n_equal))
    if not looks:
        return found._replace(values=found.values.where(kept, found.values.new_zeros(())))
    ends = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[found.row_ptr]
    return Csr(found.values[kept], found.indices[kept], ends)
