"""dictionary_learning (Marks, Karvonen): config.json and a pickled ae.pt, six classes."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae.architecture import Activation, BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from sae.pretrained import rewrite
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "dictionary_learning"
CHECKED_AGAINST = "dictionary-learning 0.1 itself"
CONFIG = "config.json"
WEIGHTS = "ae.pt"
LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
PLAIN = {"W_enc", "b_enc", "W_dec", "b_dec"}
SITE = ("lm_name", "submodule_name", "layer")


def fits(files: Files) -> bool:
    """Whether the files are there."""
    return files.has(CONFIG) and files.has(WEIGHTS)


def read(files: Files) -> Reading:
    """Read a dictionary of dictionary_learning; its class is told by config and keys together.

    Raises:
        DictionaryFormatError: For a class that is not known, a backup of an unfinished run, whose
            norm is not folded, or a threshold that was never estimated.
    """
    whole = Fields(files.json(CONFIG), CONFIG)
    cfg = whole.part("trainer")
    kind = cfg.word("dict_class", READERS)
    content = files.pickled(WEIGHTS)
    if "norm_factor" in content.values or any(name.startswith("ae.") for name in content.tensors):
        raise DictionaryFormatError(
            f"{WEIGHTS} must be a finished dictionary, got a backup of an unfinished run, whose "
            "norm is not folded; finish the run"
        )
    values = {name: torch.tensor(v) for name, v in content.values.items() if name == "k"}
    raw = {**content.tensors, **values}
    if kind == "AutoEncoder" and "decoder.bias" in raw:
        kind = "AutoEncoderNew"  # trainers of the second write the name of the first
    d_in, d_sae = cfg.whole("activation_dim"), cfg.whole("dict_size")
    config, stored = READERS[kind](Given(cfg, raw, d_in, d_sae))
    weights = in_memory(stored, files.latents)
    done: list[str] = []
    if kind == "JumpReluAutoEncoder":
        weights = rewrite.threshold_of_relu(weights, done)
    site = cfg.texts(SITE) | whole.part("buffer", {}).texts(("io", "ctx_len", "d_submodule"))
    return Reading(
        config=config, weights=weights, folds=tuple(done), site={"dict_class": kind, **site}
    )


Read = tuple[SAEConfig, Weights]


class Given(NamedTuple):
    """What the reader of a class works from."""

    cfg: Fields
    raw: dict[str, Tensor]
    d_in: int
    d_sae: int

    def config(self, activation: Activation, b_in: Literal["none", "b_dec"]) -> SAEConfig:
        """The form of the dictionary."""
        return SAEConfig(d_in=self.d_in, d_sae=self.d_sae, activation=activation, b_in=b_in)


def _check_shapes(given: Given) -> None:
    raw, d_in, d_sae = given.raw, given.d_in, given.d_sae
    shapes = {
        "encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae),
        "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in),
        "bias": (d_in,), "decoder.bias": (d_in,), "decoder_bias": (d_in,), "b_dec": (d_in,),
    }  # fmt: skip
    for name, tensor in raw.items():
        if name in shapes:
            expect_shape(tensor, shapes[name], name)


def _linear(given: Given, b_dec: str) -> Weights:
    _check_shapes(given)
    raw = given.raw
    return Weights(
        enc_rows=raw["encoder.weight"],
        dec_rows=raw["decoder.weight"].T,
        b_enc=raw.get("encoder.bias"),
        b_dec=raw[b_dec],
    )


def _plain(given: Given) -> Weights:
    _check_shapes(given)
    raw = given.raw
    return Weights(
        enc_rows=raw["W_enc"].T, dec_rows=raw["W_dec"], b_enc=raw["b_enc"], b_dec=raw["b_dec"]
    )


def _auto_encoder(given: Given) -> Read:
    expect_keys(given.raw, LINEAR | {"bias"}, WEIGHTS)
    config = given.config(ReLU(), "b_dec")
    return config, _linear(given, "bias")


def _auto_encoder_new(given: Given) -> Read:
    expect_keys(given.raw, LINEAR | {"decoder.bias"}, WEIGHTS)
    config = given.config(ReLU(), "none")
    return config, _linear(given, "decoder.bias")


def _gated(given: Given) -> Read:
    vectors = {"r_mag", "gate_bias", "mag_bias"}
    weights_of = {"encoder.weight", "decoder.weight", "decoder_bias"}
    expect_keys(given.raw, weights_of | vectors, WEIGHTS)
    linear = _linear(given, "decoder_bias")
    weights = Weights(
        enc_rows=linear.enc_rows,
        dec_rows=linear.dec_rows,
        b_dec=linear.b_dec,
        b_gate=given.raw["gate_bias"],
        b_mag=given.raw["mag_bias"],
        r_mag=given.raw["r_mag"],
    )
    return given.config(Gated(), "b_dec"), weights


def _jump_relu(given: Given) -> Read:
    expect_keys(given.raw, PLAIN | {"threshold"}, WEIGHTS)
    weights = _with(_plain(given), given.raw["threshold"])
    return given.config(JumpReLU(), "none"), weights


def _top_k(given: Given) -> Read:
    # the threshold serves an inference mode that is off unless asked for; older files lack both
    expect_keys(given.raw, LINEAR | {"b_dec"}, WEIGHTS, frozenset({"k", "threshold"}))
    config = given.config(TopK(k=_k(given)), "b_dec")
    return config, _linear(given, "b_dec")


def _batch_top_k(given: Given) -> Read:
    expect_keys(given.raw, LINEAR | {"b_dec", "threshold"}, WEIGHTS, frozenset({"k"}))
    config = given.config(BatchTopK(k=_k(given)), "b_dec")
    return config, _with(_linear(given, "b_dec"), _threshold(given.raw))


def _matryoshka(given: Given) -> Read:
    expect_keys(given.raw, PLAIN | {"threshold"}, WEIGHTS, frozenset({"k", "group_sizes"}))
    sizes = given.raw.get("group_sizes")
    if sizes is not None and int(sizes.sum()) != given.d_sae:
        raise DictionaryFormatError(
            f"group_sizes must sum to dict_size={given.d_sae} in {WEIGHTS}, got {int(sizes.sum())}"
        )
    config = given.config(BatchTopK(k=_k(given)), "b_dec")
    return config, _with(_plain(given), _threshold(given.raw))


def _with(weights: Weights, threshold: Tensor) -> Weights:
    return Weights(**{**weights.tensors(), "threshold": threshold})


def _k(given: Given) -> int:
    """The k of config and file; where both have one, they agree."""
    cfg, raw = given.cfg, given.raw
    stored = None if "k" not in raw else int(raw["k"])
    k = cfg.whole("k", stored) if stored is not None else cfg.whole("k")
    if stored not in (None, k):
        raise DictionaryFormatError(f"k must be the same in both files, got {k} and {stored}")
    return k


def _threshold(raw: dict[str, Tensor]) -> Tensor:
    expect_shape(raw["threshold"], (), "threshold")
    if float(raw["threshold"]) < 0:
        raise DictionaryFormatError(
            f"threshold must be at least 0 in {WEIGHTS}, got {float(raw['threshold']):g}: it was "
            "never estimated, so that everything positive would pass"
        )
    return raw["threshold"]


READERS: dict[str, Callable[[Given], Read]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
"""dict_class -> how it is read."""
