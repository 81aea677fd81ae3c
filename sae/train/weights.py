"""What is done to weights beside the optimiser's step: parts stand still, dead rows begin again.

A frozen part: baselines in which a random part never learns, or hardly (arXiv 2602.14111).

Resampling of dead latents: Bricken et al., Towards Monosemanticity, 2023.

A cross-layer transcoder (Lindsey et al. 2025, Circuit Tracing) is a dictionary whose latents come
in as many blocks as it reads hook points. The latents of a block read one place and write to this
place and those after it; all their other weights are 0 and stay so. What it gives is the sum over
the blocks, its losses are joint, and top-k chooses among all latents.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from sae.architecture import SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward.common import Rows
from sae.train.optim_config import Resample
from sae.train.ranks import Ranks

NEAR = 0.8
"""Cosine below which no row of a softly frozen decoder may fall with its first direction."""


def freeze(autoencoder: SparseAutoencoder, frozen: str) -> None:
    """Let the decoder's or the encoder's rows take no gradient, in place."""
    autoencoder.dec_rows.requires_grad_(frozen != "decoder")
    autoencoder.enc_rows.requires_grad_(frozen != "encoder")


def groups_of(
    learned: dict[str, torch.nn.Parameter], config: DictionaryConfig, form: SAEConfig
) -> list[dict[str, Any]]:
    """The parameters with their rates: single numbers have their own, or that of no width.

    These are JumpReLU's thresholds, and biases that follow a falling L0: at the rate of wide rows
    they lag behind it, and the penalty shortens what fires instead. `fires` is about what fires
    where an L0 is aimed at: what keeps latents shut has to come there (`travel_rate`).
    """
    lr, own, facts = config.optimizer.lr, config.threshold_lr, form.activation.facts
    singles = ("threshold",) if config.control is None else facts.parameters
    aims = config.control or config.l0
    target = None if aims is None else aims.target
    shuts = None if facts.opens is None else facts.opens[0]
    groups: dict[tuple[float | str, tuple[int, int], float], list[torch.nn.Parameter]] = {}
    for name, parameter in learned.items():
        rate, of, fires = lr, (config.d_sae, form.d_in), 0.0
        if name in singles and lr == "auto":
            of = (1, 1)
            fires = (form.d_in / target) ** 0.5 if target and name == shuts else 0.0
        if name == "threshold" and own is not None:
            rate = own
        groups.setdefault((rate, of, fires), []).append(parameter)
    return [
        {"params": p, "base_lr": rate, "of": of, "fires": fires}
        for (rate, of, fires), p in groups.items()
    ]


@torch.no_grad()
def open_(
    autoencoder: SparseAutoencoder,
    optimizer: Optimizer,
    dead: Bool[Tensor, " d_sae"],
    ranks: Ranks,
    taken: Bool[Tensor, ""] | None = None,
) -> None:
    """Move what keeps dead latents shut by its rate to where they open, if the step is taken.

    AuxK brings a dead latent's h up as far as many dead ones together need it, which may be below
    its threshold: from there that has no gradient. The rate is times the square of the share that
    lives: where few do, the data hold no more, and each latent that opens is paid by those.
    """
    opens = autoencoder.config.activation.facts.opens
    if opens is None:
        return
    name, sign = opens
    numbers = autoencoder.get_parameter(name)
    living = 1 - ranks.latents.mean(dead.float().mean())
    moves = sign * living.square() * (dead if taken is None else dead & taken)
    for group in optimizer.param_groups:
        if any(parameter is numbers for parameter in group["params"]):
            state = optimizer.state.get(numbers, {})
            for part in (numbers, *(state[key] for key in ("z", "x") if key in state)):
                part.add_(moves * group["lr"])


def anchor_of(
    autoencoder: SparseAutoencoder, config: DictionaryConfig
) -> Float[Tensor, "d_sae d_out"] | None:
    """The directions that a softly frozen decoder stays near to: those that it has now."""
    if config.frozen != "soft_decoder":
        return None
    return normalize(autoencoder.dec_rows.detach())


@torch.no_grad()
def keep_near_(
    dec_rows: Float[Tensor, "d_sae d_out"],
    anchor: Float[Tensor, "d_sae d_out"],
    taken: Bool[Tensor, ""] | None = None,
) -> None:
    """Turn rows that strayed back to a cosine of NEAR with their anchor, norms kept, in place."""
    norms = dec_rows.norm(dim=1, keepdim=True)
    unit = normalize(dec_rows)
    cosine = (unit * anchor).sum(dim=1, keepdim=True)
    aside = normalize(unit - cosine * anchor)
    turned = norms * (NEAR * anchor + (1 - NEAR**2) ** 0.5 * aside)
    strayed = cosine < NEAR if taken is None else (cosine < NEAR) & taken
    dec_rows.copy_(torch.where(strayed, turned, dec_rows))


def elsewhere(
    form: SAEConfig,
    enc_rows: Float[Tensor, "d_sae d_in"],
    dec_rows: Float[Tensor, "d_sae d_out"],
) -> Iterator[Float[Tensor, "block _"]]:
    """Yield views of all weights that a cross-layer transcoder has not."""
    widths_in = [part.width for part in form.slices_in]
    widths_out = [part.width for part in form.slices_out]
    blocks = zip(enc_rows.chunk(len(widths_in)), dec_rows.chunk(len(widths_in)), strict=True)
    for number, (reads, writes) in enumerate(blocks):
        parts = reads.split(widths_in, dim=1)
        yield from parts[:number] + parts[number + 1 :]
        yield from writes.split(widths_out, dim=1)[:number]


@torch.no_grad()
def blank_(autoencoder: SparseAutoencoder) -> None:
    """Set the weights that a cross-layer transcoder has not to 0; the rows keep their norms."""
    rows = (autoencoder.enc_rows, autoencoder.dec_rows)
    before = [weights.norm(dim=1, keepdim=True) for weights in rows]
    for part in elsewhere(autoencoder.config, *rows):
        part.zero_()
    for weights, norms in zip(rows, before, strict=True):
        now = weights.norm(dim=1, keepdim=True)
        weights.mul_(torch.where(now > 0, norms / now, 1.0))


@torch.no_grad()
def blank_gradients_(autoencoder: SparseAutoencoder) -> None:
    """Take out the gradients of those weights."""
    enc_rows, dec_rows = autoencoder.enc_rows.grad, autoencoder.dec_rows.grad
    if enc_rows is None or dec_rows is None:  # nothing fired
        return
    for part in elsewhere(autoencoder.config, enc_rows, dec_rows):
        part.zero_()


def is_resampling_due(settings: Resample, n_steps: int, total_steps: int) -> bool:
    """Whether it is done after so many steps: n times, evenly, the last time at `until`."""
    each = settings.until * total_steps / settings.n
    return n_steps in {round(each * i) for i in range(1, settings.n + 1)}


class Candidates(NamedTuple):
    """Rows that latents may begin again from, of all processes, and their squared errors."""

    rows: Rows
    losses: Float[Tensor, " batch"]


@torch.no_grad()
def candidates_of(autoencoder: SparseAutoencoder, rows: Rows, ranks: Ranks) -> Candidates:
    """The rows of the whole batch that are not reconstructed exactly."""
    y = autoencoder.decode_scaled(autoencoder.encode_scaled(rows.u), rows.u)
    losses = (rows.v - y).square().sum(dim=1)
    n_padding = ranks.largest(len(losses)) - len(losses)
    padded = (torch.cat([t, t.new_zeros(n_padding, *t.shape[1:])]) for t in (*rows, losses))
    u, v, losses = (ranks.rows.gather(t).flatten(0, 1) for t in padded)
    kept = losses > 0
    return Candidates(Rows(u[kept], v[kept]), losses[kept])


@torch.no_grad()
def resample_(
    autoencoder: SparseAutoencoder,
    dead: Bool[Tensor, " d_sae"],
    candidates: Candidates,
    settings: Resample,
    n_steps: int,
) -> Int[Tensor, " latent"]:
    """Begin dead latents again from rows of this batch; return their numbers.

    No row serves twice, so where more latents are dead than there are rows, those with the highest
    numbers have to wait.

    Args:
        autoencoder: Changed in place.
        dead: The latents that are dead.
        candidates: The rows, in the dictionary's units, with their errors.
        settings: The seed, and the norm of new encoder rows.
        n_steps: Steps done; decides with the seed what is drawn.
    """
    (u, v), losses = candidates
    latents = dead.nonzero().squeeze(1)[: len(losses)]
    if not len(latents):
        return latents
    drawn = _drawn(losses.square(), len(latents), f"resample {settings.seed} {n_steps}")
    alive = ~dead if bool((~dead).any()) else dead  # with none alive, the dead tell the norms
    b_in, enc_rows, dec_rows = (
        autoencoder.encoder().b_in,
        autoencoder.enc_rows,
        autoencoder.dec_rows,
    )
    size = enc_rows[alive].norm(dim=1).mean() * settings.encoder_norm
    read = u[drawn] if b_in is None else u[drawn] - b_in
    enc_rows[latents] = torch.nn.functional.normalize(read, dim=1) * size
    size = dec_rows[alive].norm(dim=1).mean()
    dec_rows[latents] = torch.nn.functional.normalize(v[drawn] - autoencoder.b_dec, dim=1) * size
    activation = autoencoder.config.activation
    for name in activation.facts.parameters:
        fresh = activation.first_threshold if name == "threshold" else 0
        autoencoder.get_parameter(name)[latents] = fresh
    return latents


def _drawn(weights: Float[Tensor, " batch"], n: int, seed: str) -> Int[Tensor, " latent"]:
    """Numbers of n rows, drawn without replacement; the same on every device."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(32))
    shares = weights.double().cpu()
    least = torch.finfo(torch.float32).tiny  # multinomial is float32 and refuses too few non-zeros
    shares = (shares / shares.max()).clamp_min(least)
    return torch.multinomial(shares.float(), n, generator=generator).to(weights.device)
