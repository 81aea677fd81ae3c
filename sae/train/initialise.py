"""An autoencoder as a training config and the statistics of a cache make it.

First weights that look at rows: data points as directions, a median as bias, a fitting norm.

Training that starts from the weights of a dictionary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from activations_cache.config import TRAINING_SPLITS
from monosema.checks import MonosemaError
from sae import pretrained
from sae.architecture import SAEConfig, Slice
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import DictionaryConfig
from sae.train.forward.common import Moment, Rows
from sae.train.forward.run import forward
from sae.train.hook_points import HookPoints
from sae.train.optim_config import DataPoints

if TYPE_CHECKING:
    from activations_cache import ActivationCache

UNIT = 1e-3
"""By how much the norm of a decoder row may differ from 1 to be kept there."""


def start_from(path: str, form: SAEConfig, *, unit_norm: bool) -> SparseAutoencoder:
    """Load a dictionary and bring it exactly to the units of `form`.

    With r = new scale / old scale, activations, biases and thresholds become r times as large, the
    rows of encoder and decoder stay, and x -> x_hat is the same function. Where r differs between
    the columns, the latents' r is the mean of the output's, and the rows take up the difference.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If it is no dictionary, or one of another form.
    """
    old = pretrained.load(path)
    _require_same(path, old.config, form)
    r_in = _columns(form.slices_in, form.input_scale)
    r_in /= _columns(old.config.slices_in, old.config.input_scale)
    r_out = _columns(form.slices_out, form.scale_out)
    r_out /= _columns(old.config.slices_out, old.config.scale_out)
    made = SparseAutoencoder(form)
    made.load_state_dict({n: _scaled(n, t, r_in, r_out) for n, t in old.state_dict().items()})
    norms = made.W_dec.norm(dim=1)
    if unit_norm and float((norms - 1).abs().max()) > UNIT:
        raise MonosemaError(
            "init_from must be a dictionary whose decoder rows have norm 1 beside unit_norm, got "
            f"norms from {float(norms.min()):.3g} to {float(norms.max()):.3g} in {path}; set "
            "unit_norm: false"
        )
    return made


def _columns(slices: tuple[Slice, ...], scale: float) -> Float[Tensor, " d_in"]:
    """The scale of each column."""
    parts = [torch.full((part.width,), scale * part.scale, dtype=torch.float64) for part in slices]
    return torch.cat(parts)


def _scaled(
    name: str, tensor: Tensor, r_in: Float[Tensor, " d_in"], r_out: Float[Tensor, " d_out"]
) -> Tensor:
    """A weight in the new units."""
    whole, r_latents = tensor.double(), r_out.mean()
    match name:
        case "b_in":
            whole = whole * r_in
        case "b_dec":
            whole = whole * r_out
        case "b_enc" | "threshold" | "b_gate" | "b_mag":
            whole = whole * r_latents
        case "enc_rows":
            whole = whole * (r_latents / r_in)
        case "dec_rows":
            whole = whole * (r_out / r_latents)
        case "skip_rows":
            whole = whole * (r_out[:, None] / r_in)
    return whole.to(torch.float32)


def _require_same(path: str, old: SAEConfig, form: SAEConfig) -> None:
    """Refuse a dictionary of another form; k and where thresholds begin may differ."""
    values = {
        "activation.kind": (old.activation.kind, form.activation.kind),
        "d_in": (old.d_in, form.d_in),
        "d_out": (old.width_out, form.width_out),
        **{
            name: (getattr(old, name), getattr(form, name))
            for name in ("d_sae", "b_in", "input_norm", "undo_norm", "gate_by_decoder_norm", "skip")
        },
    }
    for name, (found, wanted) in values.items():
        if found != wanted:
            raise MonosemaError(
                f"init_from must be a dictionary with {name}={wanted!r}, got {found!r} in {path}; "
                "choose another one or change the entry"
            )


ITERATIONS = 100
"""Of Weiszfeld's algorithm, at most."""
RIDGE = 0.1
"""Of the mean square, added to each when rows are whitened."""


@torch.no_grad()
def refine_(
    autoencoder: SparseAutoencoder,
    entry: DictionaryConfig,
    read: Callable[[int], tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]],
) -> None:
    """Bring fresh weights, in place, to what `entry.init` says beyond a mean and random rows.

    Args:
        autoencoder: As `sae.autoencoder.initialise` left it.
        entry: What is trained.
        read: Gives so many rows, or as many as there are, in the model's units: what is read, and
            what is predicted.
    """
    init = entry.init
    looked_at = init.n_rows if init.bias == "median" or init.norms else 0
    taken = entry.d_sae if isinstance(init, DataPoints) else 0
    if not looked_at and not taken:
        return
    x, target = read(max(looked_at, taken))
    u = autoencoder.scaled(x)
    rows = Rows(u, autoencoder.scaled_out(target) if entry.outputs else u)
    few = Rows(*(part[: init.n_rows] for part in rows))
    if init.bias == "median":
        autoencoder.b_dec.copy_(geometric_median(few.v))
    if isinstance(init, DataPoints):
        _take_rows_(autoencoder, rows, whiten=init.whiten)
    if init.norms:
        _choose_norm_(autoencoder, entry, few)


def geometric_median(points: Float[Tensor, "row d_out"]) -> Float[Tensor, " d_out"]:
    """The point with the least sum of distances to all (Weiszfeld 1937), from the mean on.

    A guess on top of a point moves on or stays as Vardi and Zhang (2000) have it: no division by 0.
    """
    exact = points.double()
    guess = exact.mean(dim=0)
    for _ in range(ITERATIONS):
        distance = (exact - guess).norm(dim=1)
        on_top = distance <= 1e-12 * exact.norm(dim=1).clamp_min(1)
        weight = torch.where(on_top, 0.0, 1 / distance.clamp_min(torch.finfo(torch.float64).tiny))
        if not bool((weight > 0).any()):
            break
        moved = (weight[:, None] * exact).sum(dim=0) / weight.sum()
        pull = (weight[:, None] * (exact - guess)).sum(dim=0).norm()
        stay = min(1.0, float(on_top.sum() / pull)) if float(pull) > 0 else 1.0
        step = (1 - stay) * (moved - guess)
        guess = guess + step
        if float(step.norm()) <= 1e-9 * max(float(guess.norm()), 1e-9):
            break
    return guess.to(points.dtype)


def _take_rows_(autoencoder: SparseAutoencoder, rows: Rows, *, whiten: bool) -> None:
    """Directions of rows less the bias for as many latents as there are such, norms kept."""
    b_in = autoencoder.encoder().b_in
    read, predicted = rows.u if b_in is None else rows.u - b_in, rows.v - autoencoder.b_dec
    kept = _directions(read, predicted)[: len(autoencoder.dec_rows)]

    def along(points: Float[Tensor, "row d"]) -> Float[Tensor, "kept d"]:
        return normalize(_whitened(points[kept]) if whiten else points[kept], dim=1)

    encoder = along(read)  # at 4,096 dimensions a core whitens for 40 s: once where that is enough
    decoder = encoder if torch.equal(read, predicted) else along(predicted)
    for weights, directions in ((autoencoder.enc_rows, encoder), (autoencoder.dec_rows, decoder)):
        norms = weights[: len(kept)].norm(dim=1, keepdim=True)
        weights[: len(kept)] = directions * norms


def _whitened(points: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The points times the inverse root of their second moment, steadied by a tenth of its mean."""
    moment = points.new_zeros(points.shape[1], points.shape[1], dtype=torch.float64)
    for part in points.split(4096):  # all at once in float64 would be twice the rows
        moment += part.double().T @ part.double()
    squares, axes = torch.linalg.eigh(moment)
    steadied = squares.clamp_min(0) + RIDGE * squares.mean()
    return points @ ((axes * steadied.rsqrt()) @ axes.T).to(points.dtype)


def _directions(
    read: Float[Tensor, "row d_in"], predicted: Float[Tensor, "row d_out"]
) -> Int[Tensor, " kept"]:
    """The rows with a direction of their own: two latents with the same one would stay the same."""
    whole = torch.cat([normalize(read, dim=1), normalize(predicted, dim=1)], dim=1)
    _, copy_of = torch.unique(whole, dim=0, return_inverse=True)
    first = torch.full_like(copy_of, len(copy_of))
    number = torch.arange(len(copy_of), device=copy_of.device)
    is_first = first.scatter_reduce(0, copy_of, number, "amin")[copy_of] == number
    has_one = (read.norm(dim=1) > 0) & (predicted.norm(dim=1) > 0)
    return (is_first & has_one & whole.isfinite().all(dim=1)).nonzero()[:, 0]


def _choose_norm_(autoencoder: SparseAutoencoder, entry: DictionaryConfig, rows: Rows) -> None:
    """Give all rows the norm, of those to be tried, at which these rows' error is least."""
    directions = [normalize(w, dim=1) for w in (autoencoder.enc_rows, autoencoder.dec_rows)]
    dead = torch.zeros(entry.d_sae, dtype=torch.bool)
    moment = Moment(0, 1, dead, bf16=False, n_rows=len(rows.u))
    errors: dict[float, float] = {}

    def set_to(norm: float, *, trained: bool) -> None:
        autoencoder.enc_rows.copy_(directions[0] * norm)
        autoencoder.dec_rows.copy_(directions[1] * (1.0 if trained and entry.unit_norm else norm))

    for norm in entry.init.norms:
        set_to(norm, trained=True)
        errors[norm] = float(forward(autoencoder, entry, rows, moment).error)
    set_to(min(errors, key=lambda norm: errors[norm]), trained=False)


def new_autoencoder(
    cache: "ActivationCache", where: HookPoints, entry: DictionaryConfig, seed: int
) -> SparseAutoencoder:
    """The dictionary of these hook points of a cache that training begins with, on the CPU."""
    inputs = [_unit(cache, point, entry) for point in where.inputs]
    outputs = [_unit(cache, point, entry) for point in where.outputs]
    form = architecture(entry, inputs, outputs)
    if entry.init_from is not None:
        return start_from(entry.init_from, form, unit_norm=entry.unit_norm)
    autoencoder = SparseAutoencoder(form)
    generator = torch.Generator().manual_seed(seed if entry.seed is None else entry.seed)
    initialise(
        autoencoder,
        generator,
        mean=_mean(outputs or inputs),
        mean_in=_mean(inputs),
        decoder_norm=entry.decoder_norm,
    )
    refine_(autoencoder, entry, lambda n: _drawn(cache, where, n, generator))
    return autoencoder


def _drawn(
    cache: "ActivationCache", where: HookPoints, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]:
    """Rows of the cache that are trained on: what is read, and what is predicted."""
    every = cache.rows(TRAINING_SPLITS)
    rows = every[torch.randperm(len(every), generator=generator)[:n]]
    both = [
        torch.cat([cache[point][rows] for point in points], dim=1)
        for points in (where.inputs, where.outputs or where.inputs)
    ]
    return both[0], both[1]


class Unit(NamedTuple):
    """A hook point, and what its statistics say of its part of a dictionary."""

    part: Slice
    mean: Float[Tensor, " d_model"] | None


def _unit(cache: "ActivationCache", hook_point: str, entry: DictionaryConfig) -> Unit:
    rows = cache[hook_point]
    scale, mean = units(rows.mean, rows.mean_square_norm, entry)
    return Unit(Slice(hook_point=hook_point, width=len(rows.mean), scale=scale), mean)


def _mean(found: list[Unit]) -> Float[Tensor, " d_in"] | None:
    means = [unit.mean for unit in found if unit.mean is not None]
    return torch.cat(means) if means else None


def architecture(entry: DictionaryConfig, inputs: list[Unit], outputs: list[Unit]) -> SAEConfig:
    """The form of a dictionary of these hook points; a single one's scale is that of the whole."""
    (scale_in, parts_in), (scale_out, parts_out) = _whole(inputs), _whole(outputs)
    return entry.architecture(
        sum(part.width for part in parts_in),
        scale_in,
        d_out=sum(part.width for part in parts_out) if outputs else None,
        output_scale=scale_out if outputs else None,
        inputs=parts_in,
        outputs=parts_out,
    )


def _whole(found: list[Unit]) -> tuple[float, tuple[Slice, ...]]:
    parts = tuple(unit.part for unit in found)
    if len(parts) != 1:
        return 1.0, parts
    return parts[0].scale, (replace(parts[0], scale=1.0),)


def units(
    mean: Float[Tensor, " d_in"], mean_square_norm: float, entry: DictionaryConfig
) -> tuple[float, Float[Tensor, " d_in"] | None]:
    """The scale that brings centred rows to a mean square norm of d_in, and where b_dec starts.

    Normed rows have that size by themselves, and their mean is not that of the cache: b_dec starts
    at 0 then.
    """
    if entry.input_norm != "none":
        return 1.0, None
    variance = mean_square_norm - float(mean.double().square().sum())
    if not variance > 0:
        rule = f"differ from each other, got a variance of {variance:.3g}"
        raise MonosemaError(f"rows to train on must {rule}; check the hook point")
    return (mean.shape[0] / variance) ** 0.5, mean.float()
