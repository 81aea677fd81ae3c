"""What a GPU is spared, seen on a CPU: waits of the host, and what lies or is cut as a CPU's."""

import pytest
import torch

from sae.architecture import TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import Adam, DictionaryConfig
from sae.train.memory import GPU_WORKSPACE
from sae.train.optim_config import Muon, ScheduleFree
from sae.train.step import TrainStep
from sae_kernels.blocks import WORKSPACE_BYTES

D_IN, D_SAE, BATCH = 13, 53, 101
OPTIMISERS = [Adam(), Adam(states="bfloat16"), Adam(states="int8"), Muon(), ScheduleFree()]


def step_of(config: DictionaryConfig, total: int = 40) -> TrainStep:
    dictionary = SparseAutoencoder(config.architecture(D_IN))
    initialise(dictionary, torch.Generator().manual_seed(0))
    return TrainStep(dictionary, config, total)


@pytest.mark.parametrize("optimizer", OPTIMISERS, ids=lambda o: getattr(o, "states", o.kind))
def test_a_resumed_state_lies_where_its_parameter_lies(optimizer):
    config = DictionaryConfig(d_sae=D_SAE, activation=TopK(k=3), optimizer=optimizer)
    first, second = step_of(config), step_of(config)
    first(torch.randn(BATCH, D_IN))
    second.autoencoder.to("meta")  # any device that is not the one of a checkpoint
    second.silent_rows = second.silent_rows.to("meta")
    second.load_state_dict({name: value.cpu() for name, value in first.state_dict().items()})
    assert len(second.optimizer.state) == 4
    for parameter, state in second.optimizer.state.items():
        assert {value.device for value in state.values()} == {parameter.device}
    for parameter, state in first.optimizer.state.items():  # so they do from the start
        assert {value.device for value in state.values()} == {parameter.device}


def test_the_estimate_counts_the_kernels_workspace():
    assert GPU_WORKSPACE == WORKSPACE_BYTES
