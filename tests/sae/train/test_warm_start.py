import pytest
import torch

from sae import pretrained
from sae.train.initialise import start_from


@pytest.fixture
def trained(entry, step_of, planted, tmp_path):
    def made(kind: str, **fields):
        step = step_of(entry(kind, **fields))
        for x in planted(10):
            step(x)
        pretrained.save(step.autoencoder, tmp_path / kind)
        return step.autoencoder, tmp_path / kind

    return made


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_the_start_is_the_same_function_at_another_scale(kind, entry, trained, planted):
    old, path = trained(kind)
    form = entry(kind).architecture(13, 1.7)
    made = start_from(str(path), form, unit_norm=entry(kind).unit_norm)
    assert made.config == form
    x = planted(11)[-1]
    torch.testing.assert_close(made(x), old(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.W_dec, old.W_dec)
    fires = old.encode_dense(x) > 0
    assert int((fires != (made.encode_dense(x) > 0)).sum()) == 0


@pytest.mark.parametrize(
    ("fields", "d_in", "message"),
    [
        ({"d_sae": 59}, 13, "with d_sae=59, got 53 in "),
        ({"b_in": "own"}, 13, "with b_in='own', got 'b_dec' in "),
        ({"input_norm": "rms"}, 13, "with input_norm='rms', got 'none' in "),
        ({}, 11, "with d_in=11, got 13 in "),
    ],
)
def test_another_form_is_refused(fields, d_in, message, entry, trained):
    _, path = trained("topk")
    form = entry("topk", **fields).architecture(d_in, 1.0)
    with pytest.raises(ValueError, match=f"init_from must be a dictionary {message}") as caught:
        start_from(str(path), form, unit_norm=True)
    assert "\n" not in str(caught.value)


def test_another_kind_and_other_norms_are_refused(entry, trained):
    _, path = trained("relu")
    form = entry("topk").architecture(13, 1.0)
    with pytest.raises(ValueError, match=r"activation\.kind='topk', got 'relu'"):
        start_from(str(path), form, unit_norm=True)
    form = entry("relu").architecture(13, 1.0)
    with pytest.raises(ValueError, match="decoder rows have norm 1 beside unit_norm, got norms"):
        start_from(str(path), form, unit_norm=True)
    with pytest.raises(FileNotFoundError):
        start_from(str(path / "nothing"), form, unit_norm=False)
