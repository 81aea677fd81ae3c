"""How dictionaries are trained, as frozen configs; no torch here.

Where the figures of a training run go, as frozen configs; no torch here.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from monosema.checks import LATER, all_at_least, at_least, positive, require
from sae.architecture import Activation, Gated, SAEConfig, Slice, TopK
from sae.train.loss_config import (
    L0,
    L1,
    AuxK,
    Control,
    FixedPrefixes,
    KAnneal,
    Matryoshka,
    MultiTopK,
    NestedK,
    PAnneal,
    PreAct,
    Refine,
    Tanh,
)
from sae.train.loss_term import OwnLoss, Term
from sae.train.optim_config import (
    Adam,
    EndToEnd,
    Init,
    Optimizer,
    Resample,
    ScheduleFree,
    Tied,
    decay,
)


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases, beside CSV and TensorBoard; needs `pip install 'monosema[wandb]'`."""

    project: str
    """Where the run stands there."""
    name: str | None = None
    """How it is called there; the service's own choice when absent."""
    offline: bool = False
    """Write to `logs/wandb` and send nothing; `wandb sync` sends it later."""

    def __post_init__(self) -> None:
        """Check names."""
        require(bool(self.project), "project", "name a project", self.project)


__all__ = ["L0", "L1", "Adam", "AuxK", "DictionaryConfig", "TrainConfig"]


_TOPK, _ADAM, _TIED = TopK(), Adam(), Tied()


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """One entry of `saes:`: its form, its losses, its optimiser."""

    d_sae: int
    """Number of latents."""
    inputs: tuple[str, ...] = ()
    """Hook points that are read, side by side; the cache's only one when empty."""
    outputs: tuple[str, ...] = ()
    """Hook points that are predicted; those that are read when empty."""
    skip: bool = False
    """A trained path from the input to the output beside the latents, where these are others."""
    cross_layer: bool = field(default=False, metadata=LATER)
    """Latents in a block per input: each reads one, and writes to its output and those after it."""
    activation: Activation = _TOPK
    """Which latents fire."""
    b_in: Literal["none", "b_dec", "own"] = "b_dec"
    """What is subtracted before the encoder."""
    input_norm: Literal["none", "layer_norm", "rms"] = "none"
    """What is done to each row first, and undone in the output; errors are those of normed rows."""
    gate_by_decoder_norm: bool = False
    """The activation sees h * |decoder row|, and what it gives is divided by that norm again."""
    l1: L1 | None = None
    """Sparsity penalty; gated needs it, relu needs it or p_anneal, the others refuse it."""
    p_anneal: PAnneal | None = None
    """Sparsity penalty; relu needs it or l1, the others refuse it."""
    l0: L0 | None = None
    """Sparsity penalty; jumprelu needs it or tanh, the others refuse it."""
    tanh: Tanh | None = None
    """Sparsity penalty; jumprelu needs it or l0, the others refuse it."""
    preact: PreAct | None = None
    """Care for dead latents, of jumprelu alone."""
    auxk: AuxK | None = None
    """Care for dead latents."""
    multi_topk: MultiTopK | None = None
    """A second reconstruction from more latents, of topk alone."""
    matryoshka: Matryoshka | None = None
    """Reconstructions by some of the latents, not of gated; `nested_k` of topk alone."""
    control: Control | None = None
    """Finds the weight of the penalty that gives an L0; of relu, jumprelu and gated alone."""
    k_anneal: KAnneal | None = None
    """A larger k at first, of topk and batchtopk alone."""
    refine: Refine | None = None
    """A decoder that is learned from iterated encodings, of topk and batchtopk alone."""
    losses: tuple[OwnLoss, ...] = field(default=(), metadata=LATER)
    """Losses of your own, added to the others."""
    dead_after_tokens: int = 100_000
    """A latent is dead when it was silent for so many rows."""
    decoder_norm: float = 1.0
    """Norm of the decoder rows at the start."""
    unit_norm: bool = True
    """Keep the decoder rows at norm 1 and take their parallel part out of the gradient."""
    frozen: Literal["none", "decoder", "soft_decoder", "encoder"] = "none"
    """Makes a baseline: what stays random, or, if soft, within a cosine of 0.8 of it."""
    optimizer: Optimizer = _ADAM
    """The optimiser and its schedule."""
    init: Init = _TIED
    """Where the weights begin."""
    end_to_end: EndToEnd | None = field(default=None, metadata=LATER)
    """A short end of the training by what the model predicts; not with a schedule of a loss."""
    resample: Resample | None = None
    """Dead latents begin again from rows that are reconstructed badly."""
    ema: float | None = None
    """Decay of a running mean of the weights, which is what is saved; none when absent."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, to save memory; one step for all."""
    init_from: str | None = None
    """A dictionary to start from: any that can be loaded and has this form."""
    seed: int | None = None
    """Decides the first weights; the run's when absent."""
    grid: dict[str, tuple[Any, ...]] | None = None
    """Lists of values by dotted key: a file's entry stands for one dictionary for each choice."""

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        self._check_terms()
        self.activation.check_width(self.d_sae)
        self._check_k(self.activation.per_row or self.d_sae)
        self._check_hook_points()
        self._check_refine()
        alone = self.control is None or self.p_anneal is None
        require(alone, "control", "be absent beside p_anneal, which scales too", self.control)
        rule = "be false beside l1, which has the decoder's norms in it"
        free = self.l1 is None or isinstance(self.activation, Gated)
        require(free or not self.unit_norm, "unit_norm", rule, self.unit_norm)
        gate, kind = self.gate_by_decoder_norm, self.activation.kind
        rule = f"be false for activation.kind {kind!r}"
        require(not gate or kind != "gated", "gate_by_decoder_norm", rule, gate)
        at_least("d_sae", self.d_sae, 1)
        at_least("dead_after_tokens", self.dead_after_tokens, 1)
        positive("decoder_norm", self.decoder_norm)
        self._check_loop()

    def _check_loop(self) -> None:
        """Check what is not of the form or the losses."""
        if self.ema is not None:
            decay("ema", self.ema)
            rule = "be absent beside optimizer.kind 'schedule_free', which averages by itself"
            require(not isinstance(self.optimizer, ScheduleFree), "ema", rule, self.ema)
        rule = "be absent outside of files, where each entry stands for itself"
        require(self.grid is None, "grid", rule, self.grid)
        at_least("accumulate", self.accumulate, 1)
        parts = {name: term.whole_batch for name, term in self.terms.items()}
        whole = [name + part for name, part in parts.items() if part is not None]
        if self.activation.facts.choice == "batch":
            whole.insert(0, f"activation.kind {self.activation.kind!r}")
        for what in whole:
            rule = f"be 1 beside {what}, which looks at the whole batch"
            require(self.accumulate == 1, "accumulate", rule, self.accumulate)
        if self.end_to_end is not None:
            for name in ("p_anneal", "control", "refine", "resample"):
                value = getattr(self, name)
                require(value is None, name, "be absent beside end_to_end", value)
        rule = f"be absent beside frozen {self.frozen!r}, which it would move"
        require(self.resample is None or self.frozen == "none", "resample", rule, self.resample)
        is_random = self.frozen == "none" or self.init.kind == "tied"
        require(is_random, "init.kind", "be 'tied' beside frozen: it stays random", self.init.kind)
        plain = self.input_norm == "none" or self.init.bias == "mean"
        require(plain, "init.bias", "be 'mean' beside input_norm", self.init.bias)
        if self.init_from is not None:
            require(self.init == _TIED, "init", "be absent beside init_from", self.init)
            require(bool(self.init_from), "init_from", "name a dictionary", self.init_from)
            require(self.seed is None, "seed", "be absent beside init_from", self.seed)
        if self.seed is not None:
            at_least("seed", self.seed, 0)

    @property
    def terms(self) -> dict[str, Term]:
        """The terms of the loss that are given, by the names of their fields."""
        given = {name: getattr(self, name) for name in term_classes()}
        return {name: term for name, term in given.items() if term is not None}

    @property
    def in_one_op(self) -> bool:
        """Whether one kernel has all terms of the loss of a dense dictionary."""
        return not self.losses and all(term.facts.in_one_op for term in self.terms.values())

    @property
    def threshold_lr(self) -> float | None:
        """The learning rate of the thresholds, where the penalty names one."""
        penalty = self.l0 or self.tanh
        return None if penalty is None else penalty.threshold_lr

    def _check_terms(self) -> None:
        """Refuse the terms of the loss that do not fit the activation, or are missing."""
        of, one_of = f"for activation.kind {self.activation.kind!r}", list[str]()
        for name, kinds in term_classes().items():
            fits = any(kind.suits(self.activation.facts) for kind in kinds)
            value = getattr(self, name)
            require(fits or value is None, name, f"be absent {of}", value)
            one_of += [name] if fits and kinds[0].facts.is_penalty else []
        given = [name for name in one_of if getattr(self, name) is not None]
        if one_of and not given:
            rule = "".join(f", or {name}," for name in one_of[1:])
            require(False, one_of[0], f"be given{rule} {of}", None)
        if len(given) > 1:
            require(False, given[1], f"be absent beside {given[0]}", getattr(self, given[1]))

    def _check_hook_points(self) -> None:
        """Check the hook points, and what is said of input and output, against each other."""
        for name in ("inputs", "outputs"):
            points = getattr(self, name)
            require(len({*points}) == len(points), name, "name each hook point once", points)
        other = bool(self.outputs)
        require(
            not other or self.outputs != self.inputs, "outputs", "differ from inputs", self.outputs
        )
        rule = "be false where what is read is predicted"
        require(other or not self.skip, "skip", rule, self.skip)
        rule = "be 'none' or 'own' beside outputs"
        require(not other or self.b_in != "b_dec", "b_in", rule, self.b_in)
        rule = "be 'none' beside outputs"
        require(not other or self.input_norm == "none", "input_norm", rule, self.input_norm)
        if self.cross_layer:
            self._check_cross_layer()

    def _check_cross_layer(self) -> None:
        """Check what follows from weights that are 0 and stay so."""
        n = len(self.inputs)
        rule = "name as many hook points as inputs, at least 2, for cross_layer"
        require(n > 1 and len(self.outputs) == n, "outputs", rule, self.outputs)
        rule = f"be a multiple of its {n} inputs for cross_layer"
        require(self.d_sae % n == 0, "d_sae", rule, self.d_sae)
        for name, allowed in (
            *(("skip", False), ("unit_norm", False), ("frozen", "none"), ("resample", None)),
            *(("init", _TIED), ("init_from", None), ("matryoshka", None)),
        ):
            value = getattr(self, name)
            require(value == allowed, name, f"be {allowed!r} beside cross_layer", value)
        kind = self.optimizer.kind
        require(kind != "muon", "optimizer.kind", "not be 'muon' beside cross_layer", kind)

    def _check_refine(self) -> None:
        """Refining needs what is read to be what is predicted, and one set of latents."""
        if self.refine is None:
            return
        for name in ("outputs", "multi_topk"):
            value = getattr(self, name)
            require(not value, "refine", f"be absent beside {name}", self.refine)

    def _check_k(self, k: int) -> None:
        """Check what counts latents against their number."""
        limit = f"be at most d_sae={self.d_sae}"
        for name, what in (("control", "target"), ("control", "first"), ("l0", "target")):
            aim = getattr(getattr(self, name), what, None)
            require(aim is None or aim <= self.d_sae, f"{name}.{what}", limit, aim)
        if self.k_anneal is not None:
            start = self.k_anneal.start
            require(start <= self.d_sae, "k_anneal.start", limit, start)
            require(start >= k, "k_anneal.start", f"be at least activation.k={k}", start)
        if self.refine is not None:
            rule = f"leave slack * k={k} at most d_sae={self.d_sae}"
            require(
                round(self.refine.slack * k) <= self.d_sae, "refine.slack", rule, self.refine.slack
            )
        if self.multi_topk is not None:
            times = self.multi_topk.times
            rule = f"leave times * k={k} at most d_sae={self.d_sae}"
            require(times * k <= self.d_sae, "multi_topk.times", rule, times)
        if isinstance(self.matryoshka, FixedPrefixes):
            last = self.matryoshka.ends[-1]
            require(last < self.d_sae, "matryoshka.ends", f"be below d_sae={self.d_sae}", last)
        if isinstance(self.matryoshka, NestedK):
            kind, last = self.activation.kind, self.matryoshka.ks[-1]
            rule = f"not be 'nested_k' for activation.kind {kind!r}"
            suits = self.matryoshka.suits(self.activation.facts)
            require(suits, "matryoshka.kind", rule, "nested_k")
            require(last < k, "matryoshka.ks", f"be below activation.k={k}", last)

    def architecture(
        self,
        d_in: int,
        input_scale: float = 1.0,
        *,
        d_out: int | None = None,
        output_scale: float | None = None,
        inputs: tuple[Slice, ...] = (),
        outputs: tuple[Slice, ...] = (),
    ) -> SAEConfig:
        """The autoencoder's own config, once the rows are known."""
        return SAEConfig(
            d_in=d_in,
            d_sae=self.d_sae,
            d_out=d_out,
            activation=self.activation,
            b_in=self.b_in,
            input_scale=input_scale,
            output_scale=output_scale,
            input_norm=self.input_norm,
            gate_by_decoder_norm=self.gate_by_decoder_norm,
            skip=self.skip,
            inputs=inputs,
            outputs=outputs,
        )


@functools.cache
def term_classes() -> dict[str, tuple[type[Term], ...]]:
    """The fields of a DictionaryConfig that are terms of the loss, with the classes of each."""
    found = {}
    for name, hint in get_type_hints(DictionaryConfig).items():
        members = [m for m in get_args(hint) if isinstance(m, type) and issubclass(m, Term)]
        if members and get_origin(hint) is not tuple:
            found[name] = tuple(members)
    return found


TAKEN = ("checkpoints", "logs")
"""Directories that lie beside those of the dictionaries."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Dictionaries that are trained side by side in one pass over the same rows."""

    saes: dict[str, DictionaryConfig]
    """The dictionaries by name; a frozen baseline is one of them."""
    batch: int = 1024
    """Rows per step."""
    epochs: int = 1
    """Passes over the rows."""
    seed: int = 0
    """Decides the order of the rows and the first weights."""
    source: Literal["cache", "live"] = field(default="cache", metadata=LATER)
    """Where rows come from: the cache, or the model at once, beside a small cache to measure on."""
    n_rows: int | None = field(default=None, metadata=LATER)
    """Rows of an epoch of a live source, none of them in the cache."""
    buffer_rows: int = field(default=131_072, metadata=LATER)
    """Rows of a live source in memory; a half is shuffled while the other fills."""
    max_norm: float | None = field(default=10.0, metadata=LATER)
    """Rows larger than so many times the median norm are left out; null keeps all."""
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """Format of the encoder's and the dense products; auto: bf16 where the device has it."""
    checkpoint_seconds: float = 60.0
    """A checkpoint is begun so often, or as seldom as keeps waiting for them at 1 % of the time."""
    log_every: int = 20
    """Steps between two points of the training curves."""
    wandb: Wandb | None = None
    """Log to Weights & Biases as well."""
    latent_shards: int = 1
    """Processes that hold one dictionary together, each a part of its latents."""
    rank_timeout_seconds: float = 300.0
    """A process that waits so long for another one gives up."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require(len(self.saes) > 0, "saes", "name at least one dictionary", self.saes)
        for name in self.saes:
            is_name = _NAME.fullmatch(name) is not None and name not in TAKEN
            rule = "have names of letters, digits, - and _, 100 at most, the first one no - or _"
            require(is_name, "saes", f"{rule}, and not {' or '.join(TAKEN)}", name)
        all_at_least(self, batch=1, epochs=1, log_every=1, latent_shards=1)
        for name, entry in self.saes.items():
            rule = f"be at most batch={self.batch}"
            parts = entry.accumulate
            require(parts <= self.batch, f"saes.{name}.accumulate", rule, parts)
        self._check_source()
        at_least("seed", self.seed, 0)
        if self.max_norm is not None:
            at_least("max_norm", self.max_norm, 1)
        positive("checkpoint_seconds", self.checkpoint_seconds)
        positive("rank_timeout_seconds", self.rank_timeout_seconds)

    def _check_source(self) -> None:
        """Check what is of a live source alone."""
        if self.source == "cache":
            rule = "be absent where train.source is not 'live'"
            require(self.n_rows is None, "n_rows", rule, self.n_rows)
            is_default = self.buffer_rows == TrainConfig.buffer_rows
            require(is_default, "buffer_rows", rule, self.buffer_rows)
            return
        rule = "be given beside source 'live'"
        require(self.n_rows is not None, "n_rows", rule, self.n_rows)
        at_least("n_rows", self.n_rows or 0, self.batch)
        at_least("buffer_rows", self.buffer_rows, 2 * self.batch)
        rule = "be 1 beside source 'live', where each process runs the model on its own examples"
        require(self.latent_shards == 1, "latent_shards", rule, self.latent_shards)
