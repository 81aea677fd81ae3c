"""MSAE (Matryoshka autoencoders of CLIP): one pickled file whose settings stand in its name.

`N_D_ACTIVATION[_K][_WEIGHTING]_TIED_NORMALIZE_CAP....pth`; rows are centred and scaled by numbers
that lie in the file.
"""

import re

import torch
from torch import Tensor

from sae.architecture import Activation, JumpReLU, ReLU, SAEConfig, TopK
from sae.pretrained import rewrite
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import Content, DictionaryFormatError, needs_name

FORMAT = "msae"
CHECKED_AGAINST = "MSAE's code, read"
NAME = re.compile(
    r"(?P<n>\d+)_(?P<d>\d+)_(?P<kind>[A-Za-z]+)(_(?P<k>\d+|[^_]*))?(_(UW|RW)[^_]*)?"
    r"_(?P<tied>True|False)_(?P<norm>True|False)_(?P<cap>-?\d+(\.\d+)?)(_.*)?\.(pt|pth)"
)
MODEL = "model."
TENSORS = {"encoder", "pre_bias", "latent_bias"}
THRESHOLD = "activation.log_threshold"
READ = ("ReLU", "JumpReLU", "TopK", "TopKReLU")


def fits(files: Files) -> bool:
    """Whether it is one pickled file with the format's tensors; it must be allowed to be read."""
    return {"model.pre_bias", "model.latent_bias"} <= files.pickled_names()


def read(files: Files) -> Reading:
    """Read one dictionary; encoder and decoder are stored as (d_in, d_sae) and (d_sae, d_in).

    Raises:
        DictionaryFormatError: If the name does not tell the settings, if something is missing or
            unknown, or for a form that is not read: capped latents, a norm of each row, absolute
            values, and a top-k of the batch.
    """
    name = files.one_file()
    said = NAME.fullmatch(name)
    if said is None:
        raise DictionaryFormatError(
            f"{name} must have the name that MSAE gave it, which tells its settings, got another"
        )
    _check_form(said)
    content = files.pickled(name)
    raw = {n[len(MODEL) :]: t for n, t in content.tensors.items() if n.startswith(MODEL)}
    raw.pop("latents_activation_frequency", None)
    is_tied, kind = said["tied"] == "True", said["kind"]
    extra = set() if is_tied else {"decoder"}
    expect_keys(raw, TENSORS | extra | ({THRESHOLD} if kind == "JumpReLU" else set()), name)
    d_sae, d_in = int(said["n"]), int(said["d"])
    shapes = {"encoder": (d_in, d_sae), "decoder": (d_sae, d_in), "pre_bias": (d_in,)}
    for key, tensor in raw.items():
        expect_shape(tensor, shapes.get(key, (d_sae,)), key)
    scale, mean = _scaling(content, d_in)
    stored = Weights(
        enc_rows=raw["encoder"].T,
        dec_rows=raw["encoder"].T if is_tied else raw["decoder"],
        b_enc=raw["latent_bias"],
        b_dec=(raw["pre_bias"].double() + scale * mean).float(),
        threshold=rewrite.exp(raw[THRESHOLD]) if kind == "JumpReLU" else None,
    )
    config = SAEConfig(
        d_in=d_in, d_sae=d_sae, activation=_activation(said, files.is_named), input_scale=scale
    )
    done = ("mean of the rows moved into b_dec",) if bool(mean.any()) else ()
    return Reading(config=config, weights=in_memory(stored, files.latents), folds=done)


def _check_form(said: re.Match[str]) -> None:
    if said["kind"] not in READ:
        raise DictionaryFormatError(f"the activation must be one of {READ}, got {said['kind']!r}")
    if said["norm"] == "True":
        raise DictionaryFormatError("normalize must be False in the name, got True: it is not read")
    if float(said["cap"]) > 0:
        raise DictionaryFormatError(
            f"the cap of the latents must not be positive, got {said['cap']}: tanh(a / cap) * cap "
            "has no form here"
        )


def _activation(said: re.Match[str], is_named: bool) -> Activation:
    if not said["kind"].startswith("TopK"):
        return JumpReLU() if said["kind"] == "JumpReLU" else ReLU()
    if not (said["k"] or "").isdecimal():
        raise DictionaryFormatError(f"k must stand in the name after {said['kind']}, got none")
    if said["kind"] == "TopK":
        needs_name(is_named, FORMAT)
    return TopK(k=int(said["k"]))


def _scaling(content: Content, d_in: int) -> tuple[float, Tensor]:
    """The factor and the mean of u = (x - mean) * factor, both required."""
    given: dict[str, object] = {**content.values, **content.tensors}
    scale, mean = given.get("scaling_factor"), given.get("mean_center")
    scale = float(scale) if isinstance(scale, int | float | Tensor) and _is_one(scale) else 0.0
    if scale <= 0 or not isinstance(mean, bool | int | float | Tensor):
        raise DictionaryFormatError(
            f"the file must hold mean_center and a positive scaling_factor, got {sorted(given)[:9]}"
        )
    mean = torch.as_tensor(mean, dtype=torch.float64).flatten()
    if mean.numel() not in (1, d_in):
        raise DictionaryFormatError(f"mean_center must have {d_in} numbers, got {mean.numel()}")
    return scale, mean.expand(d_in)


def _is_one(scale: object) -> bool:
    return not isinstance(scale, Tensor) or scale.numel() == 1
