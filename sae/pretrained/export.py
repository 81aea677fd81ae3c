"""Write a dictionary in the format of another library, exactly or not at all."""

import io as bytes_io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from activations_cache import io
from sae.architecture import Activation, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import catalogue, circuit_tracer, dictionary_learning, saelens, sparsify
from sae.pretrained.foreign import DictionaryFormatError
from sae.pretrained.hook_names import lens_name
from sae.pretrained.rewrite import Plain, centred_by, plain, with_thresholds, with_unit_rows

SAELENS_VERSION = "6.18.0"
"""Whose layout of cfg.json is written; 6.0 to 6.54 read it."""
NORMS = {norm: name for name, norm in saelens.NORMS.items()}


class Exported(NamedTuple):
    """What was written."""

    path: Path
    """The directory."""
    folds: tuple[str, ...]
    """What had to be folded for it."""


def export(
    dictionary: SparseAutoencoder,
    path: str | Path,
    to: str,
    site: Mapping[str, str] | None = None,
) -> Exported:
    """Write a dictionary directory of another format.

    Args:
        dictionary: What is written; x -> x_hat stays the same function.
        path: The directory.
        to: One of `TARGETS`.
        site: What is known of model and hook point; the keys that the format knows are written.

    Raises:
        DictionaryFormatError: If the format has no form for this dictionary.
    """
    if to not in TARGETS:
        raise DictionaryFormatError(f"the format must be one of {list(TARGETS)}, got {to!r}")
    state = dictionary.state_dict()
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise DictionaryFormatError("a dictionary must hold finite numbers to be written")
    files, done = TARGETS[to](plain(dictionary), dict(site or {}))
    path = Path(path)
    config = {path / name: data for name, data in files.items() if name.endswith(".json")}
    io.write_files({path / n: data for n, data in files.items() if path / n not in config})
    io.write_files(config)
    return Exported(path, done)


Written = tuple[dict[str, bytes], tuple[str, ...]]


def _to_saelens(given: Plain, site: dict[str, str]) -> Written:
    given = _without_negative_thresholds(with_thresholds(given), "saelens")
    is_transcoder = _is_transcoder(given, site)
    if is_transcoder or given.config.b_in == "own":
        given = centred_by(given, "none")
    config, weights = given.config, given.weights
    kind = _saelens_kind(given, is_transcoder)
    record = {
        "architecture": kind,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.b_in == "b_dec",
        "normalize_activations": NORMS[config.input_norm],
        "reshape_activations": site.get("reshape_activations", "none"),
        "metadata": _saelens_metadata(site),
    }
    record |= {"d_out": config.width_out} if is_transcoder else {}
    record |= {"k": config.activation.k} if isinstance(config.activation, TopK) else {}
    record |= {"rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    tensors = {"W_enc": weights.enc_rows.T, "W_dec": weights.dec_rows, "W_skip": weights.skip_rows}
    names = ("b_enc", "b_dec", "threshold", "b_gate", "b_mag", "r_mag")
    tensors |= {name: getattr(weights, name) for name in names}
    return _safetensors(saelens.CONFIG, record, saelens.WEIGHTS, tensors), given.done


def _saelens_metadata(site: Mapping[str, str]) -> dict[str, object]:
    """What is known of model, place and training, by SAELens' keys and as its types.

    A hook point of ours becomes TransformerLens' word, or the module's path where it has none, as
    SAELens' proxy has it; `hook_point` keeps ours.
    """
    results: dict[str, object] = {key: site[key] for key in saelens.SITE if key in site}
    family = catalogue.family_of_model(site.get("model_name", ""))
    for key, our_key in (("hook_name", "hook_point"), ("hook_name_out", "hook_point_out")):
        if ":" in (point := site.get(key, "")):
            module, _, side = point.rpartition(":")
            results[our_key] = point
            results[key] = lens_name(point, family) or (module if side == "out" else point)
    for key in ("context_size", "training_tokens"):
        if str(results.get(key, "")).isdecimal():
            results[key] = int(site[key])
    if "prepend_bos" in results:
        results["prepend_bos"] = site["prepend_bos"] == "True"
    if dtype := site.get("model_dtype"):
        results["model_from_pretrained_kwargs"] = {"dtype": dtype}
    return {**results, "sae_lens_version": SAELENS_VERSION}


def _is_transcoder(given: Plain, site: Mapping[str, str]) -> bool:
    """Whether it is written as a transcoder; for a top-k there is no such form."""
    config = given.config
    if config.skip or config.width_out != config.d_in or not config.undo_norm:
        return True
    return "hook_name_out" in site and isinstance(config.activation, ReLU | JumpReLU)


def _saelens_kind(given: Plain, is_transcoder: bool) -> str:
    kinds = {ReLU: "standard", TopK: "topk", JumpReLU: "jumprelu", Gated: "gated"}
    kind = _named(kinds, given, "saelens")
    if not is_transcoder:
        return kind
    config = given.config
    is_brought_back = config.input_norm != "none" and config.undo_norm
    if kind not in ("standard", "jumprelu") or is_brought_back:
        raise DictionaryFormatError(
            "a transcoder must be of ReLU or JumpReLU, its output not brought back by a norm, to "
            f"be written as saelens, got {kind} with input_norm={config.input_norm!r}"
        )
    name = "skip_transcoder" if given.config.skip else "transcoder"
    return name if kind == "standard" else f"jumprelu_{name}"


def _to_saebench(given: Plain, site: dict[str, str]) -> Written:
    """SAELens' layout with unit decoder rows, which SAEBench reads; it gives the model's dtype."""
    if given.config.skip or given.config.width_out != given.config.d_in:
        raise DictionaryFormatError("saebench must be given an autoencoder, got a transcoder")
    site = {key: value for key, value in site.items() if key != "model_dtype"}
    return _to_saelens(with_unit_rows(with_thresholds(given)), site)


def _to_circuit_tracer(given: Plain, site: dict[str, str]) -> Written:
    """One layer of a set of transcoders; the set is a directory with a file for every layer.

    Of a top-k there is no form: circuit-tracer 0.5.0 would read it as ReLU, without a word.
    """
    read, predicted = site.get("hook_name", ""), site.get("hook_name_out", "")
    layer = re.match(r"blocks\.(\d+)\.", read)
    if layer is None or not predicted.startswith(layer[0]):
        raise DictionaryFormatError(
            "circuit_tracer must be given a transcoder whose hook points TransformerLens has a "
            f"word for, in one block, got {read or 'none'!r} and {predicted or 'none'!r}"
        )
    config = given.config
    if config.width_out != config.d_in or (config.input_norm != "none"):
        raise DictionaryFormatError(
            "circuit_tracer must be given rows of one width without a norm, got "
            f"d_in={config.d_in}, d_out={config.width_out}, input_norm={config.input_norm!r}"
        )
    given = centred_by(
        _without_negative_thresholds(with_thresholds(given), "circuit_tracer"), "none"
    )
    _named({ReLU: "relu", JumpReLU: "jump_relu"}, given, "circuit_tracer")
    weights = given.weights
    tensors = {
        "W_enc": weights.enc_rows,
        "W_dec": weights.dec_rows,
        "b_enc": weights.b_enc,
        "b_dec": weights.b_dec,
        circuit_tracer.THRESHOLD: weights.threshold,
        "W_skip": weights.skip_rows,
    }
    settings = {
        "model_name": site.get("model_name", ""),
        "model_kind": "transcoder_set",
        "feature_input_hook": read.removeprefix(layer[0]),
        "feature_output_hook": predicted.removeprefix(layer[0]),
        "scan": site.get("model_name", ""),
    }
    results = {name: t.contiguous().clone() for name, t in tensors.items() if t is not None}
    return {
        circuit_tracer.CONFIGS[0]: _yaml(settings),
        f"layer_{layer[1]}.safetensors": to_safetensors(results),
    }, given.done


def _yaml(settings: Mapping[str, object]) -> bytes:
    """A flat mapping; JSON's texts and numbers are YAML's."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()).encode()


def _to_sparsify(given: Plain, site: dict[str, str]) -> Written:
    del site  # the directory's name is the hook point
    _require_plain(given, "sparsify", has_skip=True)
    config = given.config
    kind = _named({TopK: "topk", GroupMax: "groupmax"}, given, "sparsify")
    assert isinstance(config.activation, TopK | GroupMax)
    is_centred = config.b_in == "b_dec"
    given = given if is_centred else centred_by(given, "none")
    record = {
        "d_in": config.d_in,
        "k": config.activation.k,
        "num_latents": config.d_sae,
        "expansion_factor": max(config.d_sae // config.d_in, 1),
        "normalize_decoder": False,
        "activation": kind,
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": not is_centred,
    }
    weights = given.weights
    tensors = {
        "encoder.weight": weights.enc_rows,
        "encoder.bias": weights.b_enc,
        "W_dec": weights.dec_rows,
        "b_dec": weights.b_dec,
        "W_skip": weights.skip_rows,
    }
    return _safetensors(sparsify.CONFIG, record, sparsify.WEIGHTS, tensors), given.done


def _to_dictionary_learning(given: Plain, site: dict[str, str]) -> Written:
    _require_plain(given, "dictionary_learning")
    given = _without_negative_thresholds(given, "dictionary_learning")
    kind = _named(_DICT_CLASSES, given, "dictionary_learning")
    if isinstance(given.config.activation, ReLU):
        given = given if given.config.b_in == "b_dec" else centred_by(given, "none")
        kind = "AutoEncoder" if given.config.b_in == "b_dec" else "AutoEncoderNew"
    else:
        given = centred_by(given, "none" if kind == "JumpReluAutoEncoder" else "b_dec")
    config = given.config
    stream = bytes_io.BytesIO()
    torch.save(_state_of(given, kind), stream)
    trainer = {"dict_class": kind, "activation_dim": config.d_in, "dict_size": config.d_sae}
    if isinstance(config.activation, TopK | BatchTopK):
        trainer["k"] = config.activation.k
    trainer |= {key: site[key] for key in dictionary_learning.SITE if key in site}
    record = {"trainer": trainer, "buffer": {"io": site.get("io", "out")}}
    return {
        dictionary_learning.CONFIG: _json(record),
        dictionary_learning.WEIGHTS: stream.getvalue(),
    }, given.done


_DICT_CLASSES: dict[type[Activation], str] = {
    ReLU: "AutoEncoder",
    TopK: "AutoEncoderTopK",
    BatchTopK: "BatchTopKSAE",
    JumpReLU: "JumpReluAutoEncoder",
    Gated: "GatedAutoEncoder",
}


def _state_of(given: Plain, kind: str) -> dict[str, Tensor]:
    """The tensors by the names that the class has, contiguous."""
    w, k = given.weights, given.config.activation.per_row or 0
    linear = {"encoder.weight": w.enc_rows, "decoder.weight": w.dec_rows.T}
    estimated = torch.tensor(-1.0) if w.threshold is None else w.threshold
    counted = {"b_dec": w.b_dec, "k": torch.tensor(k, dtype=torch.int32), "threshold": estimated}
    named: dict[str, dict[str, Tensor | None]] = {
        "AutoEncoder": {**linear, "encoder.bias": w.b_enc, "bias": w.b_dec},
        "AutoEncoderNew": {**linear, "encoder.bias": w.b_enc, "decoder.bias": w.b_dec},
        "AutoEncoderTopK": {**linear, "encoder.bias": w.b_enc, **counted},
        "BatchTopKSAE": {**linear, "encoder.bias": w.b_enc, **counted},
        "JumpReluAutoEncoder": {
            "W_enc": w.enc_rows.T, "b_enc": w.b_enc, "W_dec": w.dec_rows, "b_dec": w.b_dec,
            "threshold": w.threshold,
        },
        "GatedAutoEncoder": {
            **linear, "decoder_bias": w.b_dec, "r_mag": w.r_mag, "gate_bias": w.b_gate,
            "mag_bias": w.b_mag,
        },
    }  # fmt: skip
    results = {name: tensor for name, tensor in named[kind].items() if tensor is not None}
    return {name: tensor.contiguous().clone() for name, tensor in results.items()}


def _named(names: Mapping[type[Activation], str], given: Plain, to: str) -> str:
    """The other library's name of an activation."""
    kind = type(given.config.activation)
    if kind not in names:
        raise DictionaryFormatError(
            f"the activation must be one of {[known.kind for known in names]} to be written as "
            f"{to}, got {kind.kind!r}"
        )
    return names[kind]


def _require_plain(given: Plain, to: str, has_skip: bool = False) -> None:
    config = given.config
    wrong = {
        "input_norm": config.input_norm != "none" and repr(config.input_norm),
        "skip": config.skip and not has_skip,
        "d_out": config.width_out != config.d_in and f"{config.width_out}, d_in={config.d_in}",
    }
    for name, value in wrong.items():
        if value:
            raise DictionaryFormatError(
                f"{to} must be given a form that it has, got {name}={value}"
            )


def _without_negative_thresholds(given: Plain, to: str) -> Plain:
    threshold = given.weights.threshold
    if threshold is not None and float(threshold.min()) < 0:
        raise DictionaryFormatError(
            f"thresholds must be at least 0 to be written as {to}, got {float(threshold.min()):g}: "
            "latents below 0 would be cut"
        )
    return given


def _safetensors(
    config: str, record: Mapping[str, object], weights: str, tensors: Mapping[str, Tensor | None]
) -> dict[str, bytes]:
    results = {name: t.contiguous().clone() for name, t in tensors.items() if t is not None}
    return {config: _json(record), weights: to_safetensors(results)}


def _json(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


TARGETS: dict[str, Callable[[Plain, dict[str, str]], Written]] = {
    "saelens": _to_saelens,
    "sparsify": _to_sparsify,
    "circuit_tracer": _to_circuit_tracer,
    "dictionary_learning": _to_dictionary_learning,
    "saebench": _to_saebench,
}
"""Format -> what makes its files and says what was folded."""
