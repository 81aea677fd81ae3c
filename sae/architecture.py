"""What an autoencoder is, as frozen configs; no torch here, so configs are checked at once.

u = input_norm(x) * input_scale;  h = (u - b_in) @ W_enc + b_enc;  a = activation(h);
y = a @ W_dec + b_dec (+ u @ W_skip);  x_hat = y / output_scale, with the input's norm undone.
Where x stands for several hook points side by side, norms and scales are each hook point's own.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

from monosema.checks import MonosemaError, at_least, positive, require


class Facts(NamedTuple):
    """What the rest of the project has to know of an activation beside its function."""

    trains: Literal["sparse", "dense", "gated"]
    """The file in sae/train/forward/ that trains it; `sparse` latents are few in every row."""
    products: float
    """Time of a training step in encoder products (`sae.run.pipeline`)."""
    equation: str
    """a as a function of h and k, for people."""
    threshold: Literal["none", "one", "per latent"] = "none"
    """Whether h must exceed a threshold: one that training estimates, or a parameter each."""
    choice: Literal["none", "row", "batch", "group"] = "none"
    """Where the k largest are chosen: nowhere, in each row, in the batch, or one in each group."""
    parameters: tuple[str, ...] = ("b_enc",)
    """The parameters, or the buffer, that have one value per latent."""
    opens: tuple[str, int] | None = None
    """The one that keeps a latent shut where nothing chooses, and in which sense it opens."""
    one_op: tuple[str, ...] = ()
    """The precisions in which one kernel does the whole step of a dense dictionary."""
    pieces: float = 1.0
    """Pieces of the workspace that this kernel holds (`sae.train.cost`)."""


class Kind:
    """What every activation answers; those that differ say so."""

    facts: ClassVar[Facts]

    @property
    def per_row(self) -> int | None:
        """How many latents fire in a row, on average, where the activation decides it."""
        return None

    @property
    def window(self) -> float:
        """Width of the window around a threshold in which it learns."""
        return 1.0

    @property
    def first_threshold(self) -> float:
        """The threshold of every latent at the start of training."""
        return 0.0

    def check_width(self, d_sae: int) -> None:
        """Check what counts latents against their number."""
        k = self.per_row
        require(k is None or k <= d_sae, "activation.k", f"be at most d_sae={d_sae}", k)


class _KLargest(Kind):
    """What the activations with a k share."""

    k: int

    @property
    def per_row(self) -> int | None:
        """The k of the config."""
        return self.k

    def __post_init__(self) -> None:
        """Check k, as far as it can be without d_sae."""
        at_least("k", self.k, 1)


@dataclass(frozen=True, kw_only=True)
class ReLU(Kind):
    """a = max(h, 0); how many latents fire is decided by the sparsity penalty."""

    kind: Literal["relu"] = "relu"
    """Tells the activations apart."""
    facts: ClassVar = Facts(
        "dense",
        6.5,
        "relu({h})",
        opens=("b_enc", 1),
        one_op=("fp32",),
    )


@dataclass(frozen=True, kw_only=True)
class TopK(_KLargest):
    """The k largest h of each row, cut at 0 (Gao et al. 2024, arXiv 2406.04093)."""

    kind: Literal["topk"] = "topk"
    """Tells the activations apart."""
    k: int = 32
    """Latents that may fire in one row."""
    facts: ClassVar = Facts(
        "sparse",
        2.5,
        "relu of the {k} largest of {h}",
        choice="row",
    )


@dataclass(frozen=True, kw_only=True)
class BatchTopK(_KLargest):
    """The k * batch largest h of a batch in training, else all above one threshold.

    The threshold is what separated the two in training, so that a row's latents do not depend on
    the rows beside it (Bussmann et al. 2024, arXiv 2412.06410).
    """

    kind: Literal["batchtopk"] = "batchtopk"
    """Tells the activations apart."""
    k: int = 32
    """Latents that may fire in one row on average."""
    facts: ClassVar = Facts(
        "sparse",
        2.5,
        "{h} where above one threshold, else 0",
        "one",
        choice="batch",
    )


@dataclass(frozen=True, kw_only=True)
class GroupMax(_KLargest):
    """The largest h of each of k groups of neighbours, cut at 0 (sparsify's `groupmax`)."""

    kind: Literal["groupmax"] = "groupmax"
    """Tells the activations apart."""
    k: int = 32
    """Groups, so latents that may fire in one row; it divides d_sae."""
    facts: ClassVar = Facts(
        "sparse",
        2.5,
        "relu of the largest {h} of each of {k} groups",
        choice="group",
    )

    def check_width(self, d_sae: int) -> None:
        """The groups are equal."""
        super().check_width(d_sae)
        divides = d_sae % self.k == 0
        require(divides, "activation.k", f"divide d_sae={d_sae} into equal groups", self.k)


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Kind):
    """a = h where h > threshold, else 0; a threshold per latent (arXiv 2407.14435)."""

    kind: Literal["jumprelu"] = "jumprelu"
    """Tells the activations apart."""
    threshold: float = 0.1
    """Thresholds at the start of training, in the dictionary's units."""
    bandwidth: float = 0.1
    """Width of the window around a threshold in which pre-activations move it, in these units.

    Before training they have a variance of 1, and a window of 1 sees enough of them."""
    facts: ClassVar = Facts(
        "dense",
        6.5,
        "{h} where above the latent's threshold, else 0",
        "per latent",
        parameters=("b_enc", "threshold"),
        opens=("threshold", -1),
        one_op=("fp32", "bf16"),
        pieces=4.0,
    )

    @property
    def window(self) -> float:
        """The bandwidth."""
        return self.bandwidth

    @property
    def first_threshold(self) -> float:
        """The threshold that the config names."""
        return self.threshold

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("threshold", self.threshold, 0)
        positive("bandwidth", self.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Gated(Kind):
    """One product decides what fires and, rescaled, how much (arXiv 2404.16014).

    pi = (u - b_in) @ W_enc;  a = max(pi * exp(r_mag) + b_mag, 0) where pi + b_gate > 0, else 0.
    """

    kind: Literal["gated"] = "gated"
    """Tells the activations apart."""
    facts: ClassVar = Facts(
        "gated",
        8.5,
        "relu(h * exp(r_mag) + b_mag) where h + b_gate > 0, else 0",
        parameters=("b_gate", "b_mag", "r_mag"),
        opens=("b_gate", 1),
    )


Activation = ReLU | TopK | BatchTopK | GroupMax | JumpReLU | Gated
KINDS: dict[str, type[Activation]] = {kind.kind: kind for kind in get_args(Activation)}
"""The activations by name."""


def with_k(activation: Activation, k: int) -> Activation:
    """The same activation with another k; itself where it has none."""
    return replace(activation, k=k) if isinstance(activation, _KLargest) else activation


B_IN = ("none", "b_dec", "own")
INPUT_NORMS = ("none", "layer_norm", "rms")

_TOPK = TopK()


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One hook point's part of the rows."""

    hook_point: str
    """Place in the model; empty where nobody recorded it."""
    width: int
    """Width of its rows."""
    scale: float = 1.0
    """A factor of its own beside input_scale or output_scale."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("width", self.width, 1)
        positive("scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape and the functional form of one dictionary."""

    d_in: int
    """Width of the rows that are read."""
    d_sae: int
    """Number of latents."""
    d_out: int | None = None
    """Width of the rows that are predicted; d_in when absent."""
    activation: Activation = _TOPK
    """Which latents fire."""
    b_in: Literal["none", "b_dec", "own"] = "b_dec"
    """What is subtracted before the encoder: nothing, the decoder's bias, or a bias of its own."""
    input_scale: float = 1.0
    """The factor that brings the model's rows, normed or not, to the dictionary's units."""
    output_scale: float | None = None
    """The factor between the predicted rows and the dictionary's units; input_scale when absent."""
    input_norm: Literal["none", "layer_norm", "rms"] = "none"
    """What is done to each row first, and undone in the output."""
    undo_norm: bool = True
    """Whether the norm brings the output back; if not, the skip too reads rows as they are."""
    gate_by_decoder_norm: bool = False
    """The activation sees h * |decoder row|, and what it gives is divided by that norm again."""
    skip: bool = False
    """A linear path from the input to the output beside the latents."""
    inputs: tuple[Slice, ...] = ()
    """The hook points that are read, side by side; not recorded when empty."""
    outputs: tuple[Slice, ...] = ()
    """The hook points that are predicted, where they are others than those that are read."""

    def __post_init__(self) -> None:
        """Check the sizes, and the fields against each other."""
        for name in ("d_in", "d_sae", "width_out"):
            at_least(name.replace("width_out", "d_out"), getattr(self, name), 1)
        self._check_slices()
        rule = f"not be 'b_dec' where d_out={self.d_out} differs from d_in={self.d_in}"
        require(self.b_in != "b_dec" or self.width_out == self.d_in, "b_in", rule, self.b_in)
        positive("input_scale", self.input_scale)
        positive("output_scale", self.scale_out)
        self._check_words()
        if self.input_norm == "layer_norm":
            at_least("d_in", min(part.width for part in self.slices_in), 2)
        self.activation.check_width(self.d_sae)
        if isinstance(self.activation, Gated):
            gate = self.gate_by_decoder_norm
            require(not gate, "gate_by_decoder_norm", "be false for activation.kind 'gated'", gate)

    def _check_words(self) -> None:
        """Check what has few values, for those who make a config from a file by themselves."""
        for name, words in (("b_in", B_IN), ("input_norm", INPUT_NORMS)):
            value = getattr(self, name)
            require(value in words, name, f"be one of {', '.join(map(repr, words))}", value)
        for name in ("gate_by_decoder_norm", "skip", "undo_norm"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, "be true or false", value)

    def _check_slices(self) -> None:
        """Check that the slices fill the rows, and that a norm can be undone."""
        for name, width in (("inputs", self.d_in), ("outputs", self.width_out)):
            widths = [part.width for part in getattr(self, name)]
            size = f"d_{name.removesuffix('puts')}={width}"
            require(not widths or sum(widths) == width, name, f"fill {size}", widths)
        undone = self.input_norm == "none" or len(self.slices_in) == 1 or not self.outputs
        rule = "be 'none' where several hook points predict others"
        require(undone, "input_norm", rule, self.input_norm)

    @property
    def slices_in(self) -> tuple[Slice, ...]:
        """The parts of d_in; all of it where no hook points are recorded."""
        return self.inputs or (Slice(hook_point="", width=self.d_in),)

    @property
    def slices_out(self) -> tuple[Slice, ...]:
        """The parts of d_out: the outputs, or the inputs where these are predicted."""
        if not self.outputs and self.width_out == self.d_in:
            return self.slices_in
        return self.outputs or (Slice(hook_point="", width=self.width_out),)

    def hook_points_or(self, default: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The hook points that are read and those that are predicted; the default if unrecorded."""
        read = tuple(part.hook_point for part in self.inputs) or (default,)
        return read, tuple(part.hook_point for part in self.outputs) or read

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The places in a model that are read, side by side; empty where nobody recorded them."""
        return tuple(part.hook_point for part in self.inputs if part.hook_point)

    @property
    def hook_point(self) -> str:
        """The one place that is read.

        Raises:
            ValueError: If there are several, or nobody said which.
        """
        if len(self.hook_points) != 1:
            known = ", ".join(self.hook_points) or "none"
            say = 'say which by .at("model.layers.7:out")'
            advice = "use hook_points" if self.hook_points else say
            raise MonosemaError(f"the dictionary must read one hook point, got {known}; {advice}")
        return self.hook_points[0]

    @property
    def hook_point_out(self) -> str:
        """The one place that is predicted: the one that is read, or a transcoder's other one.

        Raises:
            ValueError: If there are several, or nobody said which.
        """
        points = [part.hook_point for part in self.outputs]
        if len(points) > 1:
            raise MonosemaError(
                f"the dictionary must predict one hook point, got {', '.join(points)}"
            )
        if not points and self.width_out != self.d_in:
            raise MonosemaError(
                f"d_out must be d_in={self.d_in} for a dictionary that writes where it reads, got "
                f"{self.width_out}; say where a transcoder writes: .at(HERE, THERE)"
            )
        return points[0] if points else self.hook_point

    def at(self, hook_point: str, hook_point_out: str | None = None) -> "SAEConfig":
        """The same with its hook points; those that it knows already are only compared.

        Raises:
            ValueError: If it belongs elsewhere.
        """
        written = tuple(part.hook_point for part in self.outputs)
        for given, known in ((hook_point, self.hook_points), (hook_point_out, written)):
            if given and known and (given,) != known:
                place = " and ".join(known)
                raise MonosemaError(
                    f"hook_point must be {place}, where it was trained, got {given}"
                )
        config = self
        if not self.hook_points:
            [part] = self.inputs or (Slice(hook_point="", width=self.d_in),)
            config = replace(config, inputs=(replace(part, hook_point=hook_point),))
        if hook_point_out and hook_point_out != hook_point and not written:
            part = Slice(hook_point=hook_point_out, width=self.width_out)
            config = replace(config, d_out=self.width_out, outputs=(part,))
        return config

    @property
    def width_out(self) -> int:
        """d_out, or d_in where d_out is absent."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def scale_out(self) -> float:
        """output_scale, or input_scale where it is absent."""
        return self.input_scale if self.output_scale is None else self.output_scale

    @property
    def decode_needs_rows(self) -> bool:
        """Whether the latents alone do not decide the output."""
        return self.skip or (self.input_norm != "none" and self.undo_norm)
