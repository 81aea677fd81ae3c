"""sparsify (EleutherAI): cfg.json and sae.safetensors; TopK, SAEs and skip transcoders."""

from sae.architecture import GroupMax, SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "sparsify"
CHECKED_AGAINST = "eai-sparsify 1.3 itself"
CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
TENSORS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
KEYS = {
    "d_in", "k", "num_latents", "expansion_factor", "normalize_decoder", "activation",
    "multi_topk", "skip_connection", "transcode", "signed",
}  # fmt: skip


def fits(files: Files) -> bool:
    """Whether the files are there."""
    return files.has(CONFIG) and files.has(WEIGHTS)


def readings(files: Files) -> dict[str, Reading]:
    """Both ways where a transcoder with a skip does not say that it is one."""
    if not _is_unsaid(Fields(files.json(CONFIG), CONFIG)):
        return {"as loaded": read(files)}
    return {"centred by b_dec": _read(files), "not centred": _read(files, is_transcoder=True)}


def read(files: Files) -> Reading:
    """Read a dictionary of sparsify.

    Raises:
        DictionaryFormatError: If something is missing or unknown, for signed dictionaries, which
            have no form here, or unless the format is named for a skip beside which nothing says
            whether rows are centred.
    """
    if _is_unsaid(Fields(files.json(CONFIG), CONFIG)) and not files.is_named:
        raise DictionaryFormatError(
            f"{CONFIG} must say transcode where skip_connection is true, got none: transcoders of "
            "sparsify are not centred, but what does not say so is read as centred; name the "
            "format by format='sparsify' to read it so, and `sae verify-release` to measure both"
        )
    return _read(files)


def _is_unsaid(cfg: Fields) -> bool:
    return cfg.flag("skip_connection", False) and "transcode" not in cfg


def _read(files: Files, is_transcoder: bool = False) -> Reading:
    cfg = Fields(files.json(CONFIG), CONFIG)
    cfg.only(KEYS)
    is_grouped = cfg.word("activation", ("topk", "groupmax"), "topk") == "groupmax"
    if cfg.flag("signed", False):
        raise DictionaryFormatError("signed must be false, got true: latents are never negative")
    d_in, k = cfg.whole("d_in"), cfg.whole("k")
    d_sae = cfg.whole("num_latents", 0, least=0) or d_in * cfg.whole("expansion_factor")
    is_transcoder = cfg.flag("transcode", is_transcoder)
    has_skip = cfg.flag("skip_connection", False)
    raw = files.tensors(WEIGHTS)
    expect_keys(raw, TENSORS | ({"W_skip"} if has_skip else set()), WEIGHTS)
    shapes = {"encoder.bias": (d_sae,), "b_dec": (d_in,), "W_skip": (d_in, d_in)}
    for name, tensor in raw.items():
        expect_shape(tensor, shapes.get(name, (d_sae, d_in)), name)
    stored = Weights(
        enc_rows=raw["encoder.weight"],
        dec_rows=raw["W_dec"],
        b_enc=raw["encoder.bias"],
        b_dec=raw["b_dec"],
        skip_rows=raw.get("W_skip"),
    )
    weights = in_memory(stored, files.latents)
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=GroupMax(k=k) if is_grouped else TopK(k=k),
        b_in="none" if is_transcoder else "b_dec",
        skip=has_skip,
    )
    site = {"hook_point": f"{files.root.name} of the base model"}
    if is_transcoder:
        site["reads"] = "the module's input; predicts its output"
    return Reading(config=config, weights=weights, site=site)
