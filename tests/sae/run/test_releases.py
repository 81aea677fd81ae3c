import numpy as np
import pytest

from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, TopK
from sae.pretrained import DictionaryFormatError
from sae.run.releases import equations_of, inspect

D, F = 7, 23


def lines_of(config):
    return [f"{left} = {right}" for left, right in equations_of(config)]


def test_what_is_said_of_a_foreign_dictionary(tmp_path):
    rng = np.random.default_rng(1)
    shapes = {"w_enc": (D, F), "w_dec": (F, D), "b_enc": F, "b_dec": D}
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    threshold = np.linspace(-0.5, 0.25, F, dtype=np.float32)
    np.savez(tmp_path / "params.npz", threshold=threshold, **arrays)
    rows = inspect(tmp_path).rows
    assert next(value for name, value in rows if name == "sha256").startswith("params.npz ")
    assert {
        ("format", "gemma_scope"),
        ("width", "7 -> 7"),
        ("threshold", "0 to 0.25"),
        ("u", "x"),
        ("h", "u @ W_enc + b_enc"),
        ("a", "h where above the latent's threshold, else 0"),
        ("folded", "thresholds below 0 raised to 0"),
    } <= set(rows)


def test_a_pickled_file_must_be_allowed(tmp_path):
    (tmp_path / "5.pt").write_bytes(b"")
    with pytest.raises(DictionaryFormatError, match="must not be a pickled file"):
        inspect(tmp_path / "5.pt", format="openai")


@pytest.mark.parametrize(
    ("form", "lines"),
    [
        (
            {"activation": TopK(k=3), "input_norm": "layer_norm"},
            [
                "u = layer_norm(x)",
                "h = (u - b_dec) @ W_enc + b_enc",
                "a = relu of the 3 largest of h",
                "y = a @ W_dec + b_dec",
                "x_hat = y * std(x) + mean(x)",
            ],
        ),
        (
            {"activation": JumpReLU(), "b_in": "none", "input_scale": 0.5, "output_scale": 2.0}
            | {"gate_by_decoder_norm": True, "skip": True},
            [
                "u = x * 0.5",
                "h = u @ W_enc + b_enc",
                "a = (h * |W_dec| where above the latent's threshold, else 0) / |W_dec|",
                "y = a @ W_dec + b_dec + u @ W_skip",
                "x_hat = y / 2",
            ],
        ),
        (
            {"activation": Gated(), "b_in": "own", "input_norm": "rms"},
            [
                "u = x / rms(x)",
                "h = (u - b_in) @ W_enc",
                "a = relu(h * exp(r_mag) + b_mag) where h + b_gate > 0, else 0",
                "y = a @ W_dec + b_dec",
                "x_hat = y * rms(x)",
            ],
        ),
    ],
)
def test_the_equations(form, lines):
    assert lines_of(SAEConfig(d_in=D, d_sae=F, **form)) == lines


@pytest.mark.parametrize(
    ("activation", "line"),
    [(ReLU(), "a = relu(h)"), (BatchTopK(k=3), "a = h where above one threshold, else 0")],
)
def test_other_activations(activation, line):
    assert line in lines_of(SAEConfig(d_in=D, d_sae=F, activation=activation))
