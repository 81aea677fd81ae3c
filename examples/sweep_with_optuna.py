"""Search a learning rate and its decay with Optuna; each trial is a Trainer of Lightning.

    pip install optuna

On a cluster every task of an array job runs this file; a study with `storage`, `study_name` and
`load_if_exists=True` is then the same for all of them. Where Optuna is missing, the choices are
drawn at random.
"""

# %%
import logging
import warnings
from importlib.util import find_spec

import lightning
import numpy as np
import torch

from activations_cache.importing import import_array
from sae.architecture import TopK
from sae.train import ActivationDataModule, DictionaryConfig, SAEModule
from sae.train.config import Adam
from stand_ins import RandomStudy

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*many workers.*")

# %% Rows in which about 3 of 64 directions are present; a cache of your own does as well.
generator = torch.Generator().manual_seed(0)
truth = torch.nn.functional.normalize(torch.randn(64, 24, generator=generator), dim=1)
present = torch.rand(20_000, 64, generator=generator) < 3 / 64
np.save("rows.npy", ((present * 1.5) @ truth).numpy())
cache = import_array("rows.npy", "sweep_cache")


# %%
def fvu(trial) -> float:
    """What one choice loses, on the last batches of a training."""
    adam = Adam(
        lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        decay=trial.suggest_float("decay", 0.0, 0.9),
    )
    entry = DictionaryConfig(d_sae=64, activation=TopK(k=3), optimizer=adam)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(SAEModule(entry), ActivationDataModule(cache, batch=256))
    return float(trainer.callback_metrics["sae/fvu"])


# %%
if find_spec("optuna") is None:
    study = RandomStudy(seed=0)
else:
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(fvu, n_trials=8)
chosen = ", ".join(f"{name} {value:.3g}" for name, value in study.best_params.items())
print(f"best of {len(study.trials)} trials: FVU {study.best_value:.3f} with {chosen}")
