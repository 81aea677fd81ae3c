import pytest

from sae.config import ConfigError, from_dict
from sae.train.config import TrainConfig

ENTRY = {"d_sae": 64, "activation": {"kind": "topk", "k": 2}}


def loaded(grid: object, **fields) -> TrainConfig:
    data = {"saes": {"a": {**ENTRY, "grid": grid, **fields}, "b": ENTRY}}
    return from_dict(TrainConfig, data, "FILE")


def test_a_grid_gives_an_entry_for_each_choice_with_a_readable_name():
    grid = {"activation.k": [2, 3], "optimizer.lr": [1e-3, 0.0025], "unit_norm": [False]}
    config = loaded(grid)
    assert list(config.saes) == [
        "a-k2-lr1e-3-unit_norm_false",
        "a-k2-lr25e-4-unit_norm_false",
        "a-k3-lr1e-3-unit_norm_false",
        "a-k3-lr25e-4-unit_norm_false",
        "b",
    ]
    made = config.saes["a-k3-lr25e-4-unit_norm_false"]
    assert (made.activation.k, made.optimizer.lr, made.unit_norm) == (3, 0.0025, False)
    assert made.d_sae == 64
    assert made.grid is None
    assert config.saes["b"].activation.k == 2


def test_names_of_other_values():
    activations = [{"kind": "topk", "k": 2}, {"kind": "batchtopk", "k": 3}]
    grid = {"activation": activations, "frozen": ["none", "decoder"], "auxk.coefficient": [2.0]}
    assert list(loaded(grid).saes)[:2] == [
        "a-activation_1-frozen_none-coefficient2",
        "a-activation_1-frozen_decoder-coefficient2",
    ]
    config = loaded({"auxk.k": [3], "activation.k": [5]})
    assert next(iter(config.saes)) == "a-auxk_k3-activation_k5"
    assert config.saes["a-auxk_k3-activation_k5"].auxk.k == 3


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"activation.k": [2, 65]}, ".activation.k must be at most d_sae=64, got 65"),
        ({"activation.k": [2, "many"]}, ".activation.k must be an integer, got 'many'"),
        ({"activation.kk": [2]}, ".activation.kk is not a key of topk; did you mean 'k'?"),
        ({"optimizer.lr": [0.0]}, ".optimizer.lr must be a positive number, got 0.0"),
        ({"activation.k": 3}, ".activation.k must be a list of at least one value, got 3"),
        ({"activation.k": []}, ".activation.k must be a list of at least one value, got a list"),
        ({"activation.k": [3, 3]}, ".activation.k must have no value twice, got a list of 2"),
        ({"d_sae.x": [3]}, ".d_sae.x must name a key inside mappings, and d_sae is none, got 64"),
        ([3], " must be a mapping of dotted keys to lists, got a list of 1"),
        ({}, " must be a mapping of dotted keys to lists, got a mapping"),
        ({"seed": list(range(257))}, " must give at most 256 dictionaries, got 257"),
    ],
)
def test_a_bad_grid_is_one_line_with_its_dotted_key(grid, message):
    with pytest.raises(ConfigError) as caught:
        loaded(grid)
    assert str(caught.value).startswith(f"FILE: saes.a.grid{message}")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_taken_is_refused_and_a_fault_beside_the_grid_keeps_its_key():
    data = {"saes": {"a": {**ENTRY, "grid": {"seed": [1]}}, "a-seed1": ENTRY}}
    with pytest.raises(ConfigError, match=r"saes\.a\.grid must make names of its own"):
        from_dict(TrainConfig, data, "FILE")
    with pytest.raises(ConfigError, match=r"^FILE: saes\.a\.ema must be at least 0 and below 1"):
        loaded({"seed": [1, 2]}, ema=2.0)
