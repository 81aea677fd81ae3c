"""The LightningModule: several TrainSteps over the same batches; no model in here.

It works in any Trainer beside an ActivationDataModule; `sae train` is one of them.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from monosema.checks import MonosemaError, Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.config import digest, to_dict
from sae.pretrained.monosema_format import save
from sae.train import checkpoint
from sae.train.checkpoint import Saver
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.cost import Needs, out_of_memory, require_room
from sae.train.data_module import ActivationDataModule, ahead, copies_to, reads
from sae.train.hook_points import hook_points_of
from sae.train.initialise import new_autoencoder
from sae.train.launch import PRECISIONS, count, go_on, require_flags
from sae.train.optim import OneOptimizer
from sae.train.ranks import Ranks, connect, of_latents, own_state, whole_state
from sae.train.step import StepMetrics, TrainStep
from sae.train.throughput import Failures, Meter, StepGraph

if TYPE_CHECKING:
    from activations_cache import ActivationCache

Finished = Mapping[str, tuple[SparseAutoencoder, dict[str, float]]]
"""Dictionaries whose training had another end, with its figures."""


class SAEModule(lightning.LightningModule):
    """Trains dictionaries side by side; the result of each is what it would be alone.

    Optimisation is manual, because a TrainStep owns its optimiser; Lightning's `global_step`
    counts the steps.
    """

    def __init__(
        self,
        config: DictionaryConfig | Mapping[str, DictionaryConfig] | TrainConfig,
        *,
        seed: int = 0,
        latent_shards: int = 1,
    ) -> None:
        """Take what is trained; dictionaries are made when the Trainer begins.

        Args:
            config: One dictionary, several by name, or those of a TrainConfig, whose seed and
                `latent_shards` count then; its rows have to be those of the data module.
            seed: Decides the first weights.
            latent_shards: Processes that hold one dictionary together.
        """
        super().__init__()
        self.automatic_optimization = False
        self.config = config if isinstance(config, TrainConfig) else None
        if isinstance(config, TrainConfig):
            config, seed, latent_shards = config.saes, config.seed, config.latent_shards
        self.saes = {"sae": config} if isinstance(config, DictionaryConfig) else dict(config)
        self.seed, self.latent_shards = seed, latent_shards
        self.steps: dict[str, TrainStep] = {}
        self.after_step: Saver | None = None
        self.n_steps = self.total_steps = 0

    def build(
        self,
        data: ActivationDataModule,
        total_steps: int,
        *,
        precision: str,
        ranks: Ranks,
        device: torch.device,
        log_every: int,
    ) -> None:
        """Make the dictionaries, and let `data` give their rows.

        Args:
            data: The rows; its cache's statistics say where dictionaries begin.
            total_steps: Length of the schedules.
            precision: "fp32", or "bf16" for the encoder's and the dense products.
            ranks: The processes that train together.
            device: Where they are trained.
            log_every: Steps between two that are logged.
        """
        if data.batch < ranks.rows.size:
            rule = f"be at least {ranks.rows.size}, a row for each process that shares it"
            raise MonosemaError(f"train.batch must {rule}, got {data.batch}; raise it")
        self.data, self.precision, self.ranks = data, precision, ranks
        self.total_steps = total_steps
        of = (data.cache, data.hook_points, data.batch, precision, ranks, device)
        self.needs = Needs(self.saes, *of)
        self.where = hook_points_of(self.saes, data.hook_points)
        self.steps = {
            name: TrainStep(
                new_autoencoder(data.cache, self.where[name], entry, self.seed).to(device),
                entry,
                total_steps,
                precision=precision,
                ranks=ranks,
            )
            for name, entry in self.saes.items()
        }
        self.begin_copy = copies_to(device) if device.type == "cuda" else None
        self.graphs = {name: StepGraph(step, name) for name, step in self.steps.items()}
        self.autoencoders = torch.nn.ModuleDict({n: s.autoencoder for n, s in self.steps.items()})
        is_cpu = device.type == "cpu"  # which is not waited for
        self.failures = Failures(tuple(self.steps), looks_at_once=is_cpu)
        self.meter = Meter(self.steps, data.batch, log_every, ranks)
        read = reads(self.where, {point: data.cache.d_model(point) for point in data.hook_points})
        self.columns = read.columns
        data.rows.hook_points, data.rows.meter = read.hook_points, self.meter
        data.rows.part, data.rows.as_stored = ranks.rows.share(data.batch), device.type != "cpu"

    @property
    def made_of(self) -> str:
        """A digest of what is trained on what; not by how many processes, nor how long."""
        data = self.data
        return digest({
            "cache": data.cache.fingerprint,
            "saes": {name: to_dict(entry, all_keys=False) for name, entry in self.saes.items()},
            "seeds": [self.seed, data.seed],
            "batch": data.batch,
            "precision": self.precision,
        })

    def configure_callbacks(self) -> list[lightning.Callback]:
        """None, but this is the first time that Lightning asks: flags that cannot work end here."""
        require_flags(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Make what `build` has not made yet."""
        if stage != "fit" or self.steps:
            return
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ActivationDataModule):
            raise MonosemaError(
                "SAEModule must be trained on an ActivationDataModule, got "
                f"{type(data).__name__}; call trainer.fit(module, ActivationDataModule(cache))"
            )
        precision = PRECISIONS[str(trainer.precision)]
        self._require_own(data, precision)
        ranks = connect(self.latent_shards, getattr(self, "_device_mesh", None))
        device = trainer.strategy.root_device
        of = (data.cache, data.hook_points, data.batch, precision, ranks, device)
        require_room(Needs(self.saes, *of))
        n_steps = trainer.estimated_stepping_batches
        if math.isinf(n_steps):
            raise MonosemaError(
                "max_steps must be given where max_epochs is -1, got neither; schedules need an end"
            )
        self.build(
            data,
            int(n_steps),
            precision=precision,
            ranks=ranks,
            device=device,
            log_every=vars(trainer)["log_every_n_steps"] or int(n_steps),
        )
        if isinstance(trainer.strategy, DDPStrategy):
            self._leave_gradients_alone()

    def configure_model(self) -> None:
        """Nothing: `setup` has made it. ModelParallelStrategy wants to be told."""

    def _require_own(self, data: ActivationDataModule, precision: str) -> None:
        """Refuse what a TrainConfig says otherwise than the Trainer and the data module."""
        for name, entry in self.saes.items():
            if entry.end_to_end is not None:
                raise MonosemaError(
                    f"saes.{name}.end_to_end must be absent in a Trainer of your own, got "
                    f"{entry.end_to_end}; `sae train` and sae.train.train have it"
                )
        if self.config is None:
            return
        used = {"batch": data.batch, "epochs": data.epochs, "seed": data.seed}
        used |= {"source": "cache" if data.rows.source is data.cache else "live"}
        used |= {"precision": precision}
        for name, value in used.items():
            wanted = getattr(self.config, name)
            if wanted not in (value, getattr(TrainConfig, name)):
                where = "the Trainer's" if name == "precision" else "that of the data module"
                raise MonosemaError(
                    f"train.{name} must be {where}, {value!r}, got {wanted!r}; give both the same"
                )

    def _leave_gradients_alone(self) -> None:
        """Let DistributedDataParallel hold and send nothing of ours: the steps do it.

        It wants one parameter for itself; its buckets would be as large as all gradients.
        """
        names = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
        shared = (n for n, p in self.named_parameters() if p.requires_grad and not of_latents(n, p))
        names.remove(next(shared))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def configure_optimizers(self) -> OneOptimizer:
        """The optimisers of all steps as one."""
        return OneOptimizer([step.optimizer for step in self.steps.values()])

    def on_fit_start(self) -> None:
        """Tell Lightning where it goes on, if the state is that of a checkpoint of ours."""
        if self.n_steps:
            go_on(self.trainer, self.n_steps, self.data.rows)

    def on_train_start(self) -> None:
        """Begin; of signals, Lightning has just begun to hear, and saves nothing of ours."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False
        self.data.rows.next = self.n_steps
        if self.after_step is not None:
            self.after_step.signals.listen()
        self.meter.start()

    def training_step(self, batch: Float[Tensor, "batch width"] | Iterator[Tensor]) -> None:
        """A step, or those of a turn."""
        if isinstance(batch, Tensor):
            figures = self.step(batch)
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.step()  # Lightning counts it
            if figures:
                self.log_dict(figures, logger=False, batch_size=len(batch))
            return
        # A pass that began in the middle has turns left when the last step is done.
        batches = itertools.islice(batch, self.total_steps - self.n_steps)
        for x in batches if self.begin_copy is None else ahead(batches, self.begin_copy):
            self.step(x.to(self.device, non_blocking=True))
        count(self.trainer, self.n_steps)

    def step(self, x: Float[Tensor, "batch width"]) -> dict[str, float]:
        """One step of every dictionary on the same rows, of each its own hook points.

        Returns:
            What was logged; nothing at most steps.
        """
        is_due = self.meter.before(self.n_steps + 1, self.total_steps)
        metrics, x = {}, x.float()  # to a GPU rows come as the cache holds them
        bf16 = self.precision == "bf16"  # the step knows best which products may have it
        try:
            with torch.autocast(x.device.type, enabled=False) if bf16 else contextlib.nullcontext():
                for name, step in self.graphs.items():
                    with self.meter.timed(name):
                        metrics[name] = step(*self.columns[name].pick(x))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.needs) from error
        self.n_steps += 1
        self.failures.see(metrics, self.n_steps)
        if is_due or self.failures.looks_at_once:
            self.failures.require_few()
        figures = self._log(metrics) if is_due else {}
        if self.after_step is not None:
            self.after_step(self.n_steps, self.total_steps, self.full_state)
        return figures

    def _log(self, metrics: dict[str, StepMetrics]) -> dict[str, float]:
        figures = self.meter.read(metrics, self.n_steps, self.total_steps)
        for logger in self.loggers:
            logger.log_metrics(figures, step=self.n_steps)
        if self.after_step is not None:
            self.after_step.lines = self.meter.lines
        return figures

    def full_state(self) -> dict[str, Tensor]:
        """The state of all dictionaries, flat, each name prefixed by its dictionary's.

        It does not depend on the number of processes; only the first one gets all of it.
        """
        whole = {n: whole_state(s.state_dict(), s.ranks) for n, s in self.steps.items()}
        return {f"{n}/{k}": v for n, state in whole.items() for k, v in state.items()}

    def load_full_state(self, n_steps: int, state: dict[str, Tensor]) -> None:
        """Go on from `full_state` after `n_steps` steps."""
        for name, step in self.steps.items():
            own = {
                k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")
            }
            step.load_state_dict(own_state(own, step.ranks))
        self.n_steps = n_steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put all that a resumed run needs into a checkpoint of Lightning."""
        state = self.full_state()
        checkpoint["sae"] = {"n_steps": self.n_steps, "made_of": self.made_of, "state": state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint of Lightning."""
        found = checkpoint.get("sae", {})
        if found.get("made_of") != self.made_of:
            raise MonosemaError(
                "ckpt_path must be a checkpoint of the same dictionaries, rows, seeds and "
                f"precision, {self.made_of[:12]}, got one of {str(found.get('made_of'))[:12]}; "
                "begin without it"
            )
        self.load_full_state(found["n_steps"], found["state"])
        checkpoint["state_dict"] = self.state_dict()  # the first process's latents are in the file

    def save(
        self, path: str | Path, finished: Finished | None = None, **more: Any
    ) -> dict[str, Path]:
        """Write every dictionary as `sae train` does; on several processes all of them call this.

        Args:
            path: Gets a directory for each dictionary.
            finished: Those whose training had another end.
            more: For the provenance.

        Returns:
            The directories by name.
        """
        cache = self.data.cache
        made_from = {
            "cache": cache.fingerprint,
            "model": _model_of(cache),
            "context": cache.manifest.plan.context,
            **more,
            "rows": self.n_steps * self.data.batch,
            "seed": self.seed,
            "precision": self.precision,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        if n_left_out := getattr(self.data.rows.source, "n_left_out", 0):
            made_from["rows_left_out"] = {"max_norm": self.data.max_norm, "n": n_left_out}
        for name, step in self.steps.items():
            whole, end = (finished or {}).get(name) or (step.whole(), None)
            if step.ranks.is_first:
                own = {"hook_points": self.where[name].inputs, "recipe": asdict(step.config)}
                own |= {} if end is None else {"end_to_end": end}
                save(whole, Path(path) / name, {**made_from, **own})
        self.ranks.require_same(self.n_steps, "the number of steps")  # and all is there on return
        return {name: Path(path) / name for name in self.steps}


def _model_of(cache: "ActivationCache") -> dict[str, Any]:
    """The model that made a cache: its hashes, its path and its dtype, as far as they are known."""
    known = [cache.identity.get("model"), cache.manifest.provenance.get("model")]
    return {key: value for part in known if isinstance(part, dict) for key, value in part.items()}


class Checkpoints(lightning.Callback):
    """The checkpoints of `sae train` in a Trainer: synced, read back, taken up by themselves.

    They stand beside those of Lightning; `Trainer.fit(ckpt_path=...)` comes before them. At SIGTERM
    and SIGUSR1 the run is saved and ends.
    """

    def __init__(
        self, path: str | Path, *, seconds: float = 60.0, progress: Progress = silent
    ) -> None:
        """Take the directory, how often it gets a checkpoint, and who is told of rows."""
        self.path, self.seconds, self.progress = Path(path), seconds, progress
        self.saver: Saver | None = None

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Go on from the newest checkpoint of the same dictionaries and rows, if there is one."""
        assert isinstance(pl_module, SAEModule)
        module, data = pl_module, pl_module.data
        config = TrainConfig(saes=module.saes, batch=data.batch, checkpoint_seconds=self.seconds)
        of = (self.path, module.made_of, config, module.ranks, self.progress)
        module.after_step = self.saver = Saver(*of)
        if trainer.ckpt_path is None:
            take_up(module, self.saver)

    def on_exception(self, *_: Any, **__: Any) -> None:
        """Finish what is being written."""
        if self.saver is not None:
            self.saver.close()

    def teardown(self, *_: Any, **__: Any) -> None:
        """See that the last one is written, or raise why it is not."""
        if self.saver is not None:
            self.saver.settle()
            self.saver.close()


def take_up(module: SAEModule, saver: Saver) -> None:
    """Go on from the newest checkpoint of a run, if there is one."""
    found = checkpoint.load_newest(saver.root, saver.identity)
    module.ranks.require_same(0 if found is None else found[0], "the newest checkpoint's step")
    if found is not None:
        module.load_full_state(*found)
