"""overcomplete: a pickled state_dict, and beside it overcomplete.json with what it leaves out.

The library saves no settings, so a file alone may be a ReLU, a top-k or another autoencoder. The
user writes them down: {"class": "TopKSAE", "top_k": 32, "normalization": "l2"}; for RATopKSAE and
RAJumpSAE "delta" instead of the normalization.
"""

import torch
from torch import Tensor

from sae.architecture import Activation, JumpReLU, ReLU, SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "overcomplete"
CHECKED_AGAINST = "overcomplete 0.3 itself"
SETTINGS = "overcomplete.json"
CLASSES = ("SAE", "TopKSAE", "JumpSAE", "RATopKSAE", "RAJumpSAE")
REFUSED = {
    "BatchTopKSAE": "its threshold is not saved",
    "MpSAE": "its encoder is a loop",
    "OMPSAE": "its encoder is a loop",
    "QSAE": "its latents are quantised",
}
EPS = 1e-8
BATCH_NORM_EPS = 1e-5
LINEAR = "encoder.final_block.0."
NORM = "encoder.final_block.1."
TIED = "encoder.tied_to."


def fits(files: Files) -> bool:
    """Whether the settings lie beside a pickled file, or its tensors have the library's names."""
    names = files.pickled_names()
    return files.has_sibling(SETTINGS) or "dictionary.multiplier" in names


def read(files: Files) -> Reading:
    """Read a dictionary with a linear encoder, as it is after `.eval()`.

    Raises:
        DictionaryFormatError: If the settings are missing, for encoders that are not linear, and
            for classes that have no form here.
    """
    if not files.has_sibling(SETTINGS):
        raise DictionaryFormatError(
            f"{files.root} must hold {SETTINGS} with what the file does not say, such as "
            '{"class": "TopKSAE", "top_k": 32, "normalization": "l2"}, got none'
        )
    cfg = Fields(files.json(SETTINGS), SETTINGS)
    kind = cfg.word("class", (*CLASSES, *REFUSED))
    if kind in REFUSED:
        raise DictionaryFormatError(
            f"class must be one of {CLASSES}, got {kind!r}: {REFUSED[kind]}"
        )
    name = files.one_file()
    raw = {n: t for n, t in files.pickled(name).tensors.items() if not n.startswith(TIED)}
    is_tied = len(raw) < len(files.pickled(name).tensors)
    done: list[str] = []
    dictionary = _dictionary(cfg, raw, kind.startswith("RA"), done)
    weights = dictionary if is_tied else _encoder(raw, done)
    bias = _bias(raw, weights)
    logarithms = raw.pop("thresholds", None) if "Jump" in kind else None
    expect_keys(raw, set(), f"what is left of {name}")
    d_sae, d_in = dictionary.shape
    if weights.shape != dictionary.shape or len(bias) != d_sae:
        raise DictionaryFormatError(
            f"encoder and dictionary must have one shape, got {tuple(weights.shape)} and "
            f"{tuple(dictionary.shape)}"
        )
    stored = Weights(
        enc_rows=weights.float(),
        dec_rows=dictionary.float(),
        b_enc=bias.float(),
        b_dec=dictionary.new_zeros(d_in).float(),
        threshold=None if logarithms is None else _at_least(logarithms),
    )
    config = SAEConfig(d_in=d_in, d_sae=d_sae, activation=_activation(cfg, kind), b_in="none")
    return Reading(
        config=config, weights=in_memory(stored, files.latents), folds=tuple(done), site={}
    )


def _activation(cfg: Fields, kind: str) -> Activation:
    if "TopK" in kind:
        return TopK(k=cfg.whole("top_k"))
    return JumpReLU() if "Jump" in kind else ReLU()


def _dictionary(
    cfg: Fields, raw: dict[str, Tensor], is_archetypal: bool, done: list[str]
) -> Tensor:
    """D as the library fuses it for evaluation, times the exponential of its multiplier."""
    factor = _taken(raw, "dictionary.multiplier").exp()
    if is_archetypal:
        parts = [_taken(raw, f"dictionary.{part}") for part in ("W", "C", "Relax")]
        fused = _archetypal(*parts, delta=cfg.number("delta"))
        done.append("archetypal dictionary fused: W @ C + Relax")
        return fused * factor
    rows = _taken(raw, "dictionary._weights")
    kind = cfg.word("normalization", ("l2", "max_l2", "l1", "max_l1", "identity"))
    norms = rows.norm(p=1 if kind.endswith("1") else 2, dim=1, keepdim=True)
    if kind != "identity":
        rows = rows / (norms.max() if kind.startswith("max") else norms + EPS)
        done.append(f"dictionary normalised: {kind}")
    return rows * factor


def _archetypal(weights: Tensor, points: Tensor, relax: Tensor, *, delta: float) -> Tensor:
    """Rows as convex combinations of the points, and a deviation of at most delta."""
    weights = weights.relu()
    weights = weights / (weights.sum(dim=-1, keepdim=True) + EPS)
    factor = (delta / relax.norm(dim=-1, keepdim=True)).clamp(max=1)
    return weights @ points + relax * factor


def _encoder(raw: dict[str, Tensor], done: list[str]) -> Tensor:
    if any(name.startswith("encoder.mlp_blocks") for name in raw):
        raise DictionaryFormatError("the encoder must be linear, got one with hidden layers")
    name = f"{LINEAR}weight" if f"{LINEAR}weight" in raw else "encoder.weight"
    weights = _taken(raw, name)
    if f"{NORM}running_mean" in raw:
        done.append("batch normalisation, as in evaluation, folded into the encoder")
        weights = weights * _batch_norm_scale(raw)[:, None]
    return weights


def _bias(raw: dict[str, Tensor], weights: Tensor) -> Tensor:
    name = f"{LINEAR}bias" if f"{LINEAR}bias" in raw else "encoder.bias"
    bias = _taken(raw, name) if name in raw else weights.new_zeros(len(weights))
    if f"{NORM}running_mean" not in raw:
        return bias
    scale = _batch_norm_scale(raw)
    raw.pop(f"{NORM}num_batches_tracked", None)
    mean, shift = _taken(raw, f"{NORM}running_mean"), _taken(raw, f"{NORM}bias")
    del raw[f"{NORM}running_var"], raw[f"{NORM}weight"]
    return (bias - mean) * scale + shift


def _batch_norm_scale(raw: dict[str, Tensor]) -> Tensor:
    expect_keys(
        {n: t for n, t in raw.items() if n.startswith(NORM)},
        {f"{NORM}{part}" for part in ("weight", "bias", "running_mean", "running_var")},
        "the encoder's norm",
        frozenset({f"{NORM}num_batches_tracked"}),
    )
    variance = raw[f"{NORM}running_var"].double()
    return raw[f"{NORM}weight"].double() / (variance + BATCH_NORM_EPS).sqrt()


def _at_least(logarithms: Tensor) -> Tensor:
    """Thresholds for h >= theta by those for h > theta: the next smaller number."""
    theta = logarithms.double().exp().float()
    return torch.nextafter(theta, torch.zeros_like(theta))


def _taken(raw: dict[str, Tensor], name: str) -> Tensor:
    if name not in raw or not raw[name].is_floating_point():
        raise DictionaryFormatError(f"the file must hold {name}, got {sorted(raw)}")
    return raw.pop(name).double()
