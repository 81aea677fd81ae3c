"""ViT-Prisma: config.json and one pickled file of weights; autoencoders and transcoders of ViTs."""

from torch import Tensor

from sae.architecture import Activation, Gated, ReLU, SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "vit_prisma"
CHECKED_AGAINST = "ViT-Prisma's code, read"
CONFIG = "config.json"
MARKS = {"hook_point_layer", "activation_fn_str", "normalize_activations"}
BASE = {"W_enc", "W_dec", "b_enc", "b_dec"}
GATED = {"b_gate", "r_mag", "b_mag"}
NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "rms"}
SITE = (
    "model_name", "hook_point_layer", "layer_subtype", "hook_point_head_index", "cls_token_only",
    "use_patches_only", "out_hook_point_layer", "layer_out_subtype", "image_size",
)  # fmt: skip


def fits(files: Files) -> bool:
    """Whether there is a config with this library's words."""
    return files.has_sibling(CONFIG) and files.json(CONFIG).keys() >= MARKS


def read(files: Files) -> Reading:
    """Read a dictionary; rows are normed first and centred by b_dec then.

    Raises:
        DictionaryFormatError: If something is missing or unknown, or for a form that is not read:
            tanh-relu, a gated top-k, or a skip beside a norm.
    """
    cfg = Fields(files.json(CONFIG), CONFIG)
    name = files.one_file()
    raw = files.pickled(name).tensors
    architecture = cfg.word("architecture", ("standard", "gated"), "standard")
    is_transcoder = cfg.flag("is_transcoder", False)
    has_skip = is_transcoder and cfg.flag("transcoder_with_skip_connection")
    extra = {"b_dec_out"} if is_transcoder else set()
    extra |= ({"W_skip"} if has_skip else set()) | (GATED if architecture == "gated" else set())
    expect_keys(raw, BASE | extra, name)
    d_in = cfg.whole("d_in")
    d_sae = d_in * cfg.whole("expansion_factor")
    _check_shapes(cfg, raw, d_in, d_sae, is_transcoder)
    norm = NORMS.get(cfg.word("normalize_activations"), "none")
    if has_skip and norm != "none":
        raise DictionaryFormatError(
            "normalize_activations must be 'none' where there is a skip, which reads rows without "
            f"the norm, got {norm!r}"
        )
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=raw["W_dec"].shape[1] if is_transcoder else None,
        activation=_activation(cfg, architecture),
        b_in="own" if is_transcoder else "b_dec",
        input_norm=norm,  # pyright: ignore[reportArgumentType]
        skip=has_skip,
    )
    gated = architecture == "gated"
    stored = Weights(
        enc_rows=raw["W_enc"].T,
        dec_rows=raw["W_dec"],
        b_dec=raw["b_dec_out" if is_transcoder else "b_dec"],
        b_in=raw["b_dec"] if is_transcoder else None,
        b_enc=None if gated else raw["b_enc"],
        skip_rows=raw.get("W_skip"),
        b_gate=raw.get("b_gate"),
        b_mag=raw.get("b_mag"),
        r_mag=raw.get("r_mag"),
    )
    done = ("b_enc dropped, which its gated encoder does not use",) if gated else ()
    weights = in_memory(stored, files.latents)
    return Reading(config=config, weights=weights, folds=done, site=cfg.texts(SITE))


def _check_shapes(
    cfg: Fields, raw: dict[str, Tensor], d_in: int, d_sae: int, is_transcoder: bool
) -> None:
    d_out = cfg.whole("d_out") if is_transcoder else d_in
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_in,)}
    shapes |= {"b_dec_out": (d_out,), "W_skip": (d_in, d_in)}
    for name, tensor in raw.items():
        expect_shape(tensor, shapes.get(name, (d_sae,)), name)


def _activation(cfg: Fields, architecture: str) -> Activation:
    words = ("relu",) if architecture == "gated" else ("relu", "topk")
    if cfg.word("activation_fn_str", words) == "topk":
        return TopK(k=cfg.part("activation_fn_kwargs").whole("k"))
    return Gated() if architecture == "gated" else ReLU()
