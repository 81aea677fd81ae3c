"""Training: TrainStep is the step; Lightning and a bare loop call the same one."""

from typing import TYPE_CHECKING

from monosema.facade import on_first_use

if TYPE_CHECKING:
    from sae.train.config import DictionaryConfig, TrainConfig
    from sae.train.data_module import ActivationDataModule
    from sae.train.fit import train
    from sae.train.module import Checkpoints, SAEModule
    from sae.train.step import TrainStep

__all__ = [
    "ActivationDataModule",
    "Checkpoints",
    "DictionaryConfig",
    "SAEModule",
    "TrainConfig",
    "TrainStep",
    "train",
]

__getattr__, __dir__ = on_first_use(__name__, __file__)
