"""Goodfire's dictionaries of Llama 3: one pickled file, ReLU, no centring, no norm."""

from sae.architecture import ReLU, SAEConfig
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape

FORMAT = "goodfire"
CHECKED_AGAINST = "the published description"
ENC, B_ENC = "encoder_linear.weight", "encoder_linear.bias"
DEC, B_DEC = "decoder_linear.weight", "decoder_linear.bias"


def fits(files: Files) -> bool:
    """Whether it is one pickled file with the format's tensors; it must be allowed to be read."""
    return ENC in files.pickled_names()


def read(files: Files) -> Reading:
    """Read one dictionary.

    Raises:
        DictionaryFormatError: If something is missing or unknown.
    """
    name = files.one_file()
    raw = files.pickled(name).tensors
    expect_keys(raw, {ENC, B_ENC, DEC, B_DEC}, name)
    d_sae, d_in = len(raw[B_ENC]), len(raw[B_DEC])
    expect_shape(raw[ENC], (d_sae, d_in), ENC)
    expect_shape(raw[DEC], (d_in, d_sae), DEC)
    stored = Weights(enc_rows=raw[ENC], dec_rows=raw[DEC].T, b_enc=raw[B_ENC], b_dec=raw[B_DEC])
    weights = in_memory(stored, files.latents)
    config = SAEConfig(d_in=d_in, d_sae=d_sae, activation=ReLU(), b_in="none")
    return Reading(config=config, weights=weights)
