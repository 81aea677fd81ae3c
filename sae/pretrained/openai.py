"""OpenAI's dictionaries of GPT-2 small: one pickled file each, ReLU, or TopK on normed rows."""

from torch import Tensor

from sae.architecture import ReLU, SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights, in_memory
from sae.pretrained.files import Files, expect_keys, expect_shape
from sae.pretrained.foreign import DictionaryFormatError, Fields

FORMAT = "openai"
CHECKED_AGAINST = "the published code"
TENSORS = {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight"}
STATISTICS = frozenset({
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
})
K_KEYS = ("activation_state_dict.k", "activation.k")
RELU_KEYS = ("activation_state_dict.postact_fn", "activation.postact_fn")


def fits(files: Files) -> bool:
    """Whether it is one pickled file with the format's tensors; it must be allowed to be read."""
    return "pre_bias" in files.pickled_names()


def read(files: Files) -> Reading:
    """Read one dictionary, such as `5.pt`.

    Raises:
        DictionaryFormatError: If something is missing or unknown.
    """
    name = files.one_file()
    content = files.pickled(name)
    raw = {n: t for n, t in content.tensors.items() if n not in K_KEYS and n not in STATISTICS}
    expect_keys(raw, TENSORS, name)
    d_sae, d_in = _sizes(raw)
    stored = {n: int(t) for n, t in content.tensors.items() if n in K_KEYS}
    activation = _activation(Fields({**content.values, **stored}, name))
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=activation,
        b_in="b_dec",
        input_norm="layer_norm" if isinstance(activation, TopK) else "none",
    )
    stored = Weights(
        enc_rows=raw["encoder.weight"],
        dec_rows=raw["decoder.weight"].T,
        b_enc=raw["latent_bias"],
        b_dec=raw["pre_bias"],
    )
    weights = in_memory(stored, files.latents)
    site = {"model": "gpt2", "layer": files.path.stem}
    return Reading(config=config, weights=weights, site=site)


def _sizes(raw: dict[str, Tensor]) -> tuple[int, int]:
    d_sae, d_in = len(raw["latent_bias"]), len(raw["pre_bias"])
    expect_shape(raw["encoder.weight"], (d_sae, d_in), "encoder.weight")
    expect_shape(raw["decoder.weight"], (d_in, d_sae), "decoder.weight")
    return d_sae, d_in


def _activation(values: Fields) -> ReLU | TopK:
    values.only({"activation", *K_KEYS, *RELU_KEYS, "activation_state_dict"})
    if values.word("activation", ("ReLU", "TopK"), "ReLU") == "ReLU":
        return ReLU()
    for key in RELU_KEYS:
        values.word(key, ("ReLU",), "ReLU")
    results = [key for key in K_KEYS if key in values]
    if not results:
        raise DictionaryFormatError(f"a TopK dictionary must have {K_KEYS[0]}, got none")
    return TopK(k=values.whole(results[0]))
