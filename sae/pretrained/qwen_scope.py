"""Qwen Scope: layerN.sae.pt, pickled; TopK whose k stands in the repository's name alone."""

import re

from sae.architecture import SAEConfig, TopK
from sae.pretrained.canonical import Reading, Weights
from sae.pretrained.errors import DictionaryFormatError
from sae.pretrained.files import Files, as_float32, expect_keys, expect_shape

FORMAT = "qwen_scope"
K_IN_NAME = re.compile(r"SAE-Res-.+-W\w+-L0_(\d+)")
NAME = re.compile(r"layer\d+\.sae\.pt")


def fits(files: Files) -> bool:
    """Whether it is one file with the release's name."""
    return not files.path.is_dir() and NAME.fullmatch(files.path.name) is not None


def read(files: Files) -> Reading:
    """Read one dictionary; W_enc is stored as (d_sae, d_in), W_dec as (d_in, d_sae).

    Raises:
        DictionaryFormatError: If something is missing or unknown, or if no directory above the file
            has the repository's name, which tells k.
    """
    name = files.one_file()
    found = [match for part in files.path.parts if (match := K_IN_NAME.search(part))]
    if not found:
        raise DictionaryFormatError(
            f"{files.path} must lie in a directory that has the repository's name, "
            "SAE-Res-MODEL-W..K-L0_<k>, got none: k stands nowhere else"
        )
    k = int(found[-1][1])
    raw = as_float32(files.pickled(name).tensors)
    expect_keys(raw, {"W_enc", "W_dec", "b_enc", "b_dec"}, name)
    d_sae, d_in = len(raw["b_enc"]), len(raw["b_dec"])
    expect_shape(raw["W_enc"], (d_sae, d_in), "W_enc")
    expect_shape(raw["W_dec"], (d_in, d_sae), "W_dec")
    if d_in == d_sae and not files.is_named:
        raise DictionaryFormatError(
            f"W_enc must show its orientation by its shape, got {(d_sae, d_in)}; name the format "
            f"by format={FORMAT!r} if its rows are latents"
        )
    weights = Weights(
        enc_rows=raw["W_enc"], dec_rows=raw["W_dec"].T, b_enc=raw["b_enc"], b_dec=raw["b_dec"]
    )
    config = SAEConfig(d_in=d_in, d_sae=d_sae, activation=TopK(k=k), b_in="none")
    return Reading(config=config, weights=weights, site={"layer": name.split(".")[0]})
