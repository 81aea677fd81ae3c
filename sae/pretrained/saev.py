"""saev: one file, a line of JSON and after it pickled weights; autoencoders of ViTs."""

from sae.architecture import Activation, ReLU, SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import PICKLED, Files, expect_keys, expect_shape, parse_json
from sae.pretrained.foreign import DictionaryFormatError, Fields, needs_name

FORMAT = "saev"
CHECKED_AGAINST = "saev's code, read; of its first version saev 0.1 itself"
ACTIVATIONS = ("Relu", "TopK", "BatchTopK")


def fits(files: Files) -> bool:
    """Whether it is one file that begins with a line of JSON."""
    is_file = files.path.is_file() and files.path.suffix in PICKLED
    return is_file and files.first_line(files.path.name).startswith(b"{")


def read(files: Files) -> Reading:
    """Read one dictionary; W_enc is stored as (d_in, d_sae), W_dec as (d_sae, d_in).

    Raises:
        DictionaryFormatError: If something is missing or unknown; unless the format is named, for a
            file of the first version, which centred rows where later ones do not, and for a top-k
            that keeps negative values.
    """
    name = files.path.name
    line = files.first_line(name)
    header = Fields(parse_json(line, f"the first line of {name}"), "the first line")
    is_first = "schema" not in header
    if is_first and not files.is_named:
        raise DictionaryFormatError(
            f"{name} must say its schema, got none: saev 0.1, which wrote such files, centred rows "
            "by b_dec, and the present saev does not; name the format by format='saev' to read it "
            "as the version that wrote it"
        )
    cfg = header if is_first else header.part("cfg")
    d_in = cfg.whole("d_vit")
    d_sae = d_in * cfg.whole("exp_factor")
    activation = ReLU() if is_first else _activation(header, cfg)
    if isinstance(activation, TopK):
        needs_name(files.is_named, FORMAT)
    raw = files.pickled(name, start=len(line)).tensors
    expect_keys(raw, {"W_enc", "W_dec", "b_enc", "b_dec"}, name)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "b_enc": (d_sae,)}
    for key, tensor in raw.items():
        expect_shape(tensor, shapes[key], key)
    stored = Weights(
        enc_rows=raw["W_enc"].T, dec_rows=raw["W_dec"], b_enc=raw["b_enc"], b_dec=raw["b_dec"]
    )
    config = SAEConfig(
        d_in=d_in, d_sae=d_sae, activation=activation, b_in="b_dec" if is_first else "none"
    )
    site = {"schema": "none, of saev 0.1" if is_first else str(header.whole("schema"))}
    return Reading(config=config, weights=in_memory(stored, files.latents), site=site)


def _activation(header: Fields, cfg: Fields) -> Activation:
    """Schema 1 has two layouts; its BatchTopK picks k of each row, as TopK does."""
    schema = header.whole("schema")
    if schema not in (1, 2):
        raise DictionaryFormatError(f"schema must be 1 or 2, got {schema}; update monosema")
    if header.record.get("cls") in ACTIVATIONS:
        kind, given = header.word("cls"), cfg
    else:
        part = cfg.part("activation")
        kind, given = part.word("cls", ACTIVATIONS), part.part("params")
    return ReLU() if kind == "Relu" else TopK(k=given.whole("top_k"))
