"""Training: TrainStep is the step; Lightning and a bare loop call the same one."""

from importlib import import_module
from typing import TYPE_CHECKING

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

_HOME = {
    "ActivationDataModule": "sae.train.data_module",
    "Checkpoints": "sae.train.module",
    "SAEModule": "sae.train.module",
    "DictionaryConfig": "sae.train.config",
    "TrainConfig": "sae.train.config",
    "TrainStep": "sae.train.step",
    "train": "sae.train.fit",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.train' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
