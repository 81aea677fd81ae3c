import pytest

from sae.steer.config import Ablate, Add, Clamp, Scale, SteerConfig


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (Clamp, {"latent": -1, "value": 1.0}, r"^latent must be at least 0, got -1$"),
        (Clamp, {"latent": 1, "value": float("nan")}, r"^value must be a finite number, got nan$"),
        (Add, {"latent": 1, "value": float("inf")}, r"^value must be a finite number, got inf$"),
        (Scale, {"latent": 1, "factor": float("nan")}, r"^factor must be a finite number"),
        (Ablate, {"latent": -3}, r"^latent must be at least 0, got -3$"),
        (SteerConfig, {"latent": -3}, r"^latent must be at least 0, got -3$"),
        (SteerConfig, {"prompt": ""}, r"^prompt must not be empty, got ''$"),
        (SteerConfig, {"max_new_tokens": 0}, r"^max_new_tokens must be at least 1, got 0$"),
        (SteerConfig, {"n_candidates": 0}, r"^n_candidates must be at least 1, got 0$"),
        (SteerConfig, {"strength": float("inf")}, r"^strength must be a finite number, got inf$"),
    ],
)
def test_a_wrong_value_is_refused_by_name(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_the_mode_decides_the_operation():
    clamp = SteerConfig(strength=3.0).operation(7)
    assert clamp == Clamp(latent=7, value=3.0, unit="max")
    add = SteerConfig(mode="add", strength=-3.0).operation(7)
    assert add == Add(latent=7, value=-3.0, unit="max")
