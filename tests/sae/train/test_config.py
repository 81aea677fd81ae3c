import re

import pytest

from sae.architecture import BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sae.config import ConfigError, from_dict
from sae.train.config import L0, L1, Adam, AuxK, DictionaryConfig, TrainConfig
from sae.train.loss_config import (
    Control,
    FixedPrefixes,
    KAnneal,
    MultiTopK,
    NestedK,
    PAnneal,
    PreAct,
    RandomPrefixes,
    Tanh,
)
from sae.train.optim_config import Resample


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
            lambda: DictionaryConfig(d_sae=5, activation=JumpReLU()),
            "l0 must be given, or tanh, for activation.kind 'jumprelu', got None",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=JumpReLU(), l0=L0(), tanh=Tanh()),
            "tanh must be absent beside l0",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=ReLU(), l0=L0()),
            "l0 must be absent for activation.kind 'relu'",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=Gated()),
            "l1 must be given for activation.kind 'gated', got None",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=5, activation=Gated(), l1=L1(), gate_by_decoder_norm=True
            ),
            "gate_by_decoder_norm must be false for activation.kind 'gated', got True",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=TopK(k=2), preact=PreAct()),
            "preact must be absent for activation.kind 'topk'",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=BatchTopK(k=2), multi_topk=MultiTopK()),
            "multi_topk must be absent for activation.kind 'batchtopk'",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=5,
                activation=Gated(),
                l1=L1(),
                matryoshka=FixedPrefixes(ends=(2,)),
            ),
            "matryoshka must be absent for activation.kind 'gated'",
        ),
        (
            lambda: DictionaryConfig(d_sae=7, activation=GroupMax(k=2)),
            "activation.k must divide d_sae=7 into equal groups, got 2",
        ),
        (
            lambda: DictionaryConfig(d_sae=7, activation=TopK(k=3), matryoshka=NestedK(ks=(2, 3))),
            "matryoshka.ks must be below activation.k=3, got 3",
        ),
        (lambda: NestedK(ks=(2, 2)), "ks must rise from at least 1, got (2, 2)"),
        (lambda: Control(target=0.0), "target must be a positive number"),
        (lambda: Control(target=3.0, first=0.5), "first must be at least 3.0, got 0.5"),
        (lambda: Control(target=3.0, until=1.1), "until must lie between 0 and 1, got 1.1"),
        (
            lambda: DictionaryConfig(
                d_sae=7, activation=Gated(), l1=L1(), control=Control(target=8.0)
            ),
            "control.target must be at most d_sae=7, got 8.0",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=7, activation=Gated(), l1=L1(), control=Control(target=3.0, first=8.0)
            ),
            "control.first must be at most d_sae=7, got 8.0",
        ),
        (
            lambda: DictionaryConfig(d_sae=7, activation=JumpReLU(), l0=L0(target=7.5)),
            "l0.target must be at most d_sae=7, got 7.5",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=7, activation=BatchTopK(k=3), matryoshka=NestedK(ks=(2,))
            ),
            "matryoshka.kind must not be 'nested_k' for activation.kind 'batchtopk'",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=7,
                activation=ReLU(),
                unit_norm=False,
                p_anneal=PAnneal(),
                control=Control(target=3.0),
            ),
            "control must be absent beside p_anneal",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=5, activation=TopK(k=2), matryoshka=FixedPrefixes(ends=(2, 5))
            ),
            "matryoshka.ends must be below d_sae=5, got 5",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=TopK(k=2), multi_topk=MultiTopK(times=3)),
            "multi_topk.times must leave times * k=2 at most d_sae=5, got 3",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=TopK(k=2), k_anneal=KAnneal(start=6)),
            "k_anneal.start must be at most d_sae=5, got 6",
        ),
        (
            lambda: DictionaryConfig(d_sae=5, activation=TopK(k=2), k_anneal=KAnneal(start=1)),
            "k_anneal.start must be at least activation.k=2, got 1",
        ),
        (lambda: FixedPrefixes(ends=(3,), until=-0.1), "until must be a positive number, got -0.1"),
        (lambda: FixedPrefixes(ends=()), "ends must rise from at least 1, got ()"),
        (lambda: FixedPrefixes(ends=(3, 3)), "ends must rise from at least 1, got (3, 3)"),
        (lambda: FixedPrefixes(ends=(0, 3)), "ends must rise from at least 1, got (0, 3)"),
        (lambda: RandomPrefixes(n=0), "n must be at least 1, got 0"),
        (lambda: RandomPrefixes(exponent=0.0), "exponent must be a positive number, got 0.0"),
        (lambda: MultiTopK(times=1), "times must be at least 2, got 1"),
        (lambda: Tanh(scale=0.0), "scale must be a positive number, got 0.0"),
        (lambda: Tanh(threshold_lr=-1.0), "threshold_lr must be a positive number"),
        (lambda: PreAct(coefficient=-2.0), "coefficient must be at least 0, got -2.0"),
        (lambda: PAnneal(p=0.0), "p must be above 0 and at most 1, got 0.0"),
        (
            lambda: DictionaryConfig(
                d_sae=5, activation=ReLU(), unit_norm=False, l1=L1(), p_anneal=PAnneal()
            ),
            "p_anneal must be absent beside l1",
        ),
        (lambda: KAnneal(start=3, until=1.5), "until must lie between 0 and 1, got 1.5"),
        (lambda: Adam(lr=0.0), "lr must be a positive number, got 0.0"),
        (lambda: Adam(lr=float("nan")), "lr must be a positive number, got nan"),
        (lambda: Adam(beta2=1.0), "beta2 must be at least 0 and below 1"),
        (lambda: Adam(warmup=0.9, decay=0.2), "decay must be at most 1 - warmup=0.9"),
        (lambda: AuxK(k=0), "k must be at least 1"),
        (lambda: L1(coefficient=-1.0), "coefficient must be at least 0"),
        (
            lambda: DictionaryConfig(d_sae=64, activation=BatchTopK(k=2), accumulate=2),
            "accumulate must be 1 beside activation.kind 'batchtopk', which looks at the whole",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=5, activation=JumpReLU(), l0=L0(target=2.0), accumulate=2
            ),
            "accumulate must be 1 beside l0.target",
        ),
        (
            lambda: DictionaryConfig(
                d_sae=5, activation=ReLU(), unit_norm=False, p_anneal=PAnneal(), accumulate=3
            ),
            "accumulate must be 1 beside p_anneal, which looks at the whole batch, got 3",
        ),
        (
            lambda: DictionaryConfig(d_sae=64, frozen="decoder", resample=Resample()),
            "resample must be absent beside frozen 'decoder', which it would move, got Resample",
        ),
        (
            lambda: DictionaryConfig(d_sae=64, init_from="runs/a", seed=3),
            "seed must be absent beside init_from, got 3",
        ),
        (lambda: DictionaryConfig(d_sae=64, ema=1.0), "ema must be at least 0 and below 1"),
        (lambda: DictionaryConfig(d_sae=64, seed=-1), "seed must be at least 0, got -1"),
        (lambda: DictionaryConfig(d_sae=64, init_from=""), "init_from must name a dictionary"),
        (lambda: Resample(n=-1), "n must be at least 1, got -1"),
        (lambda: Resample(until=0.0), "until must be a positive number, got 0.0"),
        (
            lambda: TrainConfig(saes={"a": DictionaryConfig(d_sae=64, accumulate=9)}, batch=8),
            "saes.a.accumulate must be at most batch=8, got 9",
        ),
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
    with pytest.raises(ValueError, match=re.escape(message)) as problem:
        make()
    assert str(problem.value).startswith(message.split()[0])


def test_a_file_tells_the_kinds_of_prefixes_apart_and_names_the_dotted_key():
    entry = {"d_sae": 53, "activation": {"kind": "topk", "k": 3}}
    made = from_dict(
        DictionaryConfig, {**entry, "matryoshka": {"kind": "fixed", "ends": [2, 7]}}, "f"
    )
    assert made.matryoshka == FixedPrefixes(ends=(2, 7))
    made = from_dict(DictionaryConfig, {**entry, "matryoshka": {"kind": "random", "n": 3}}, "f")
    assert made.matryoshka == RandomPrefixes(n=3)
    wrong = {"saes": {"a": {**entry, "matryoshka": {"kind": "fixed", "ends": [7, 60]}}}}
    with pytest.raises(ConfigError, match=r"f: saes\.a\.matryoshka\.ends must be below d_sae=53"):
        from_dict(TrainConfig, wrong, "f")
