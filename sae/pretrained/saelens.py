"""SAELens: cfg.json and sae_weights.safetensors, of version 6 and before."""

from dataclasses import replace

from torch import Tensor

from sae.architecture import Activation, BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from sae.pretrained import rewrite
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "saelens"
CHECKED_AGAINST = "sae-lens 6.54 itself"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"

BASE = {"W_enc", "W_dec", "b_enc", "b_dec"}
GATED = {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
TENSORS = {
    "standard": BASE,
    "topk": BASE,
    "jumprelu": BASE | {"threshold"},
    "gated": GATED,
    "transcoder": BASE,
    "skip_transcoder": BASE | {"W_skip"},
    "jumprelu_transcoder": BASE | {"threshold"},
    "jumprelu_skip_transcoder": BASE | {"threshold", "W_skip"},
    "batchtopk": BASE | {"topk_threshold"},
    "matryoshka_batchtopk": BASE | {"topk_threshold"},
}
"""Architecture -> its tensors."""
REFUSED = {
    "temporal": "its encoder attends to other positions",
    "matching_pursuit": "its encoder is a loop, not one product",
    "abstopk": "its latents have signs",
}
"""Architectures that have no form here, and why."""
LEGACY = ("standard", "topk", "jumprelu", "gated")
KEYS = {
    "architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input",
    "normalize_activations", "reshape_activations", "k", "rescale_acts_by_decoder_norm",
    "metadata", "sae_lens_version",
}  # fmt: skip
TRAINING_KEYS = {
    "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient",
    "l0_warm_up_steps", "jumprelu_init_threshold", "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "pre_act_loss_coefficient",
    "aux_loss_coefficient", "topk_threshold_lr", "matryoshka_widths", "use_sparse_activations",
    "use_matryoshka_aux_loss",
}  # fmt: skip
"""Keys of a checkpoint of training, which say nothing of how a dictionary is applied."""
SITE = (
    "model_name", "hook_name", "hook_point", "hook_name_out", "hook_head_index", "context_size",
    "prepend_bos", "exclude_special_tokens", "reshape_activations", "dataset_path",
    "training_tokens", "hook_point_out", "hf_hook_name", "hf_hook_name_out",
)  # fmt: skip
NORMS = {"none": "none", "constant_norm_rescale": "rms", "layer_norm": "layer_norm"}
EXPECTED = "expected_average_only_in"


def fits(files: Files) -> bool:
    """Whether the files are there."""
    return files.has(CONFIG) and files.has(WEIGHTS)


def read(files: Files) -> Reading:
    """Read a dictionary of SAELens.

    Raises:
        DictionaryFormatError: If something is missing, unknown, or could be read in two ways.
    """
    cfg = Fields(_corrected(files), CONFIG)
    is_legacy = _version(cfg) < 6
    cfg = Fields(_modern(cfg), CONFIG) if is_legacy else cfg
    if not is_legacy:
        cfg.only(KEYS | TRAINING_KEYS)
    if reason := REFUSED.get(cfg.word("architecture")):
        raise DictionaryFormatError(
            f"architecture must be one of {list(TENSORS)}, got {cfg.word('architecture')!r}: "
            f"{reason}"
        )
    architecture = cfg.word("architecture", TENSORS)
    if is_legacy and architecture not in LEGACY:
        raise DictionaryFormatError(
            f"architecture must be one of {list(LEGACY)} before SAELens 6, got {architecture!r}"
        )
    raw = files.tensors(WEIGHTS)
    done = _drop_unit_factor(raw) if is_legacy else []
    if "log_threshold" in raw and "threshold" not in raw:  # checkpoints of training before 6.48
        raw["threshold"] = raw.pop("log_threshold").double().exp()
        done.append("thresholds taken from their logarithms")
    expect_keys(raw, TENSORS[architecture], WEIGHTS)
    weights = in_memory(_weights(cfg, raw), files.latents)
    if files.stated.is_centred:
        weights = rewrite.for_rows_with_mean(weights, centred=_is_centred(cfg, architecture))
        done.append("encoder taken off the mean over dimensions, which it was trained without")
    scale = _input_scale(cfg, files)
    weights, activation = _activation(cfg, architecture, raw, weights, done)
    config = SAEConfig(
        d_in=weights.d_in,
        d_sae=cfg.whole("d_sae"),
        d_out=None if weights.d_out == weights.d_in else weights.d_out,
        activation=activation,
        b_in="b_dec" if _is_centred(cfg, architecture) else "none",
        input_scale=scale,
        input_norm=NORMS.get(_norm(cfg), "none"),  # pyright: ignore[reportArgumentType]
        undo_norm="transcoder" not in architecture or NORMS.get(_norm(cfg)) in (None, "none"),
        skip=weights.skip_rows is not None,
    )
    site = cfg.texts(SITE) | cfg.part("metadata", {}).texts(SITE)
    return Reading(config=config, weights=weights, folds=tuple(done), site=site)


def _corrected(files: Files) -> dict[str, object]:
    """The config, with what the list of releases has for it where the file has it wrong."""
    norm = files.stated.normalize_activations
    return files.json(CONFIG) | ({"normalize_activations": norm} if norm else {})


def _version(cfg: Fields) -> int:
    """The major version that wrote the file; 0 where it does not say so, as no file of 6 does."""
    metadata = cfg.part("metadata", {})
    said = cfg.word("sae_lens_version", default=metadata.word("sae_lens_version", default="0"))
    major = said.partition(".")[0]
    return int(major) if major.isdecimal() and len(major) < 5 else 0


def _modern(cfg: Fields) -> dict[str, object]:
    """The keys of version 6 for a file from before it; it has about 80 others, of training."""
    record = dict(cfg.record)
    record.setdefault("hook_name", record.get("hook_point"))
    activation = cfg.word("activation_fn", default=cfg.word("activation_fn_str", default="relu"))
    architecture = cfg.word("architecture", default="standard")
    if architecture == "topk" or (architecture, activation) == ("standard", "topk"):
        record["architecture"] = "topk"
        record["k"] = cfg.part("activation_fn_kwargs").whole("k")
    elif activation == "relu":
        record["architecture"] = architecture
    else:
        raise DictionaryFormatError(
            f"activation_fn must be 'relu', or 'topk' of a standard dictionary, in {CONFIG}, got "
            f"{activation!r} of {architecture!r}"
        )
    norm = record.get("normalize_activations")
    record["normalize_activations"] = {None: "none", False: "none", True: EXPECTED}.get(norm, norm)  # pyright: ignore[reportCallIssue, reportArgumentType]
    record.setdefault("apply_b_dec_to_input", True)
    return record


def _drop_unit_factor(raw: dict[str, Tensor]) -> list[str]:
    factor = raw.pop("scaling_factor", None)
    if factor is None:
        return []
    if not bool((factor == 1).all()):
        raise DictionaryFormatError(
            f"scaling_factor must be all ones in {WEIGHTS}, got others: whether they apply is "
            "not told apart reliably by such files"
        )
    return ["scaling_factor of ones dropped"]


def _weights(cfg: Fields, raw: dict[str, Tensor]) -> Weights:
    """The tensors in our orientation: W_enc is stored as (d_in, d_sae), W_skip as (d_out, d_in)."""
    d_in, d_sae = cfg.whole("d_in"), cfg.whole("d_sae")
    is_transcoder = "transcoder" in cfg.word("architecture")
    d_out = cfg.whole("d_out") if is_transcoder else cfg.whole("d_out", d_in)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, d_in), "topk_threshold": ()}
    for name, tensor in raw.items():
        expect_shape(tensor, shapes.get(name, (d_sae,)), name)
    same = {name: raw.get(name) for name in ("b_enc", "threshold", "b_gate", "b_mag", "r_mag")}
    return Weights(
        enc_rows=raw["W_enc"].T,
        dec_rows=raw["W_dec"],
        b_dec=raw["b_dec"],
        skip_rows=raw.get("W_skip"),
        **same,
    )


def _activation(
    cfg: Fields, architecture: str, raw: dict[str, Tensor], weights: Weights, done: list[str]
) -> tuple[Weights, Activation]:
    if architecture not in ("topk", "batchtopk", "matryoshka_batchtopk"):
        if weights.threshold is not None:
            return rewrite.threshold_of_relu(weights, done), JumpReLU()
        return weights, Gated() if architecture == "gated" else ReLU()
    if cfg.flag("rescale_acts_by_decoder_norm", False):
        done.append("decoder norms, by which the activation gates, moved into the encoder")
        weights = rewrite.decoder_norm_gate(weights)
    if architecture == "topk":
        return weights, TopK(k=cfg.whole("k"))
    threshold = raw["topk_threshold"]
    if float(threshold) <= 0:
        raise DictionaryFormatError(
            f"topk_threshold must be above 0 in {WEIGHTS}, got {float(threshold):g}: it was never "
            "estimated; train on, or save the dictionary for inference"
        )
    # k may be a fraction: the mean number of latents per row; it plays no part after training
    k = max(round(cfg.number("k")), 1)
    return replace(weights, threshold=threshold.float()), BatchTopK(k=k)


def _is_centred(cfg: Fields, architecture: str) -> bool:
    return "transcoder" not in architecture and cfg.flag("apply_b_dec_to_input")


def _norm(cfg: Fields) -> str:
    return cfg.word("normalize_activations", (*NORMS, EXPECTED))


def _input_scale(cfg: Fields, files: Files) -> float:
    """The one number that a file still needs if its norm was not folded into it."""
    norm = cfg.word("normalize_activations")
    result = Fields(files.json(SCALER), SCALER) if files.has(SCALER) else Fields({}, SCALER)
    factor = result.number("scaling_factor") if "scaling_factor" in result else None
    if norm == EXPECTED and factor is None and files.stated.input_scale:
        return files.stated.input_scale
    if norm == EXPECTED and factor is None:
        raise DictionaryFormatError(
            f"{CONFIG} must come with {SCALER} where normalize_activations is {EXPECTED!r}, got "
            "none: the factor that was never folded into the weights is not known"
        )
    if norm != EXPECTED and factor is not None:
        raise DictionaryFormatError(
            f"{SCALER} must have no factor where normalize_activations is {norm!r}, got {factor}"
        )
    return 1.0 if factor is None else factor
