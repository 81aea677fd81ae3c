import pytest

from sae.architecture import ReLU, TopK
from sae.train.config import L1, Adam, AuxK, DictionaryConfig, TrainConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DictionaryConfig(d_sae=5, activation=TopK(k=6)),
            "activation.k must be at most d_sae=5, got 6",
        ),
        (lambda: DictionaryConfig(d_sae=5, activation=ReLU(), unit_norm=False), "l1 must be given"),
        (lambda: DictionaryConfig(d_sae=5, activation=TopK(k=2), l1=L1()), "l1 must be absent"),
        (lambda: DictionaryConfig(d_sae=5, activation=ReLU(), l1=L1()), "unit_norm must be false"),
        (
            lambda: DictionaryConfig(
                d_sae=5, activation=ReLU(), l1=L1(), unit_norm=False, auxk=AuxK()
            ),
            "auxk must be absent",
        ),
        (lambda: Adam(lr=0.0), "lr must be a positive number, got 0.0"),
        (lambda: Adam(lr=float("nan")), "lr must be a positive number, got nan"),
        (lambda: Adam(beta2=1.0), "beta2 must be at least 0 and below 1"),
        (lambda: Adam(warmup=0.9, decay=0.2), "decay must be at most 1 - warmup=0.9"),
        (lambda: AuxK(k=0), "k must be at least 1"),
        (lambda: L1(coefficient=-1.0), "coefficient must be at least 0"),
        (lambda: TrainConfig(saes={}), "saes must name at least one"),
        (
            lambda: TrainConfig(saes={"../x": DictionaryConfig(d_sae=64)}),
            "saes must have names of letters",
        ),
        (
            lambda: TrainConfig(saes={"a": DictionaryConfig(d_sae=64)}, batch=0),
            "batch must be at least 1",
        ),
    ],
)
def test_contradictions_are_refused_field_first(make, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as problem:
        make()
    assert str(problem.value).startswith(message.split()[0])
