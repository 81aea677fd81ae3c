"""What a GPU is spared, seen on a CPU: waits of the host, and what lies or is cut as a CPU's."""

import math
from collections.abc import Callable

import pytest
import torch

from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import L0, L1, Adam, AuxK, DictionaryConfig
from sae.train.cost import GPU_WORKSPACE
from sae.train.diagnostics import Watch
from sae.train.forward import run
from sae.train.forward.common import DeadBound
from sae.train.forward.sparse import Shadows
from sae.train.loss_config import Control, FixedPrefixes, PreAct, Refine
from sae.train.optim_config import Muon, ScheduleFree
from sae.train.ranks import connect
from sae.train.step import StepMetrics, TrainStep
from sae.train.throughput import Failures, StepGraph, cuda_graph
from sae_kernels import blocks, launch
from sae_kernels.blocks import WORKSPACE_BYTES
from tests.golden.recipes import rows
from tests.sae.train import gpu_branches, test_recipes

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


def counted_step(step: TrainStep, given: Callable, monkeypatch) -> gpu_branches.Counted:
    """What a step in the middle of a run launches and waits for, and what follows it."""
    step.looks = False
    step.watch, failures = Watch(step.autoencoder, step.ranks), Failures(("one",))
    data = [x[:7] for x in rows()[:3]]
    step.n_steps = step.total_steps // 2
    step(*given(data[0]))
    step.silent_rows[:5] = 1 << 40
    step.bound = DeadBound()
    step(*given(data[1]))
    with gpu_branches.counted(monkeypatch) as found:
        metrics = step(*given(data[2]))
        failures.see({"one": metrics}, step.n_steps)
    assert bool(metrics.finite)
    return found


SPARSE = ("topk", "batchtopk", "groupmax")
RECIPES = [
    pytest.param(
        config,
        id=name,
        marks=[pytest.mark.long]
        if config.activation.kind in SPARSE and name not in ("default:default",)
        else [],
    )
    for name, config in test_recipes.ENTRIES.items()
]


@pytest.mark.parametrize("config", RECIPES)
def test_the_host_waits_for_nothing_in_a_step(config, monkeypatch):
    gpu_branches.branches_of_a_gpu(monkeypatch)
    step = test_recipes.step_of(config)
    found = counted_step(step, lambda x: test_recipes.given(config, x), monkeypatch)
    assert dict(found.waits) == {}
    assert found.ops.total() < 600


@pytest.mark.parametrize("activation", [TopK(k=1), BatchTopK(k=1)], ids=["topk", "batchtopk"])
def test_the_host_waits_for_nothing_behind_a_gate(activation, monkeypatch):
    gpu_branches.branches_of_a_gpu(monkeypatch)
    monkeypatch.setattr(blocks, "gates", lambda *_: True)
    monkeypatch.setattr(blocks, "DIRECT_KEYS", 31)
    monkeypatch.setattr(blocks, "MAX_GROUP", 8)
    step = step_of(DictionaryConfig(d_sae=139, dead_after_tokens=1000, activation=activation))
    found = counted_step(step, lambda x: (x,), monkeypatch)
    assert dict(found.waits) == {}
    assert found.ops["triton _product_kernel"] == 2
    assert found.ops.total() < 250


FUSED = {
    "topk": {"activation": TopK(k=3), "auxk": AuxK()},
    "batchtopk": {"activation": BatchTopK(k=3)},
    "prefixes": {
        "activation": BatchTopK(k=3), "matryoshka": FixedPrefixes(ends=(5, 17), until=0.7),
        "refine": Refine(steps=2, rate=0.5, until=0.9, held_until=0.95), "auxk": AuxK(),
    },
    "frozen": {"activation": TopK(k=3), "frozen": "decoder", "accumulate": 2},
    "free": {"activation": TopK(k=3), "unit_norm": False, "b_in": "own"},
}  # fmt: skip


@pytest.mark.parametrize("fields", FUSED.values(), ids=FUSED)
def test_the_fused_pass_gives_what_the_one_by_autograd_gives(fields, monkeypatch):
    """Every gradient and figure of some steps, in float32, by the kernels in the interpreter."""
    config = DictionaryConfig(d_sae=D_SAE, dead_after_tokens=1000, **fields)
    seen = {}
    monkeypatch.setattr(Watch, "see", lambda self, found, *_: seen.update({self: found}))
    plain = step_of(config, total=4)
    with monkeypatch.context() as patch:
        gpu_branches.branches_of_a_gpu(patch)
        fused = step_of(config, total=4)
    fused.looks = False
    fused.silent_rows[:9] = 1000
    for x in (x[:7] for x in rows()[:2]):
        plain.load_state_dict(fused.state_dict())  # Adam magnifies what is rounded otherwise
        for step in (plain, fused):
            step.watch = Watch(step.autoencoder, step.ranks)
        expected = plain(x)
        with monkeypatch.context() as patch:
            gpu_branches.branches_of_a_gpu(patch)
            patch.setattr(run, "forward", None)
            got = fused(x)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)
        ours, right = seen[fused.watch], seen[plain.watch]
        assert torch.equal(ours.n_fired, right.n_fired)
        torch.testing.assert_close(ours.y, right.y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.threshold, right.threshold, rtol=1e-5, atol=1e-6)
        # of matrices Adam reads the gradients as they are, and clips them itself
        clip = min(1.0, 1 / (float(expected.grad_norm) + 1e-6))
        for name, parameter in plain.learned.items():
            ours, right = fused.learned[name].grad, parameter.grad
            ours = ours * clip if ours.dim() == 2 else ours
            assert (ours - right).norm() < 2e-5 * right.norm(), name
        for name, right in plain.state_dict().items():
            ours = fused.state_dict()[name].double()
            assert (ours - right).norm() <= 1e-3 * right.double().norm(), name


def test_copies_follow_whoever_changes_the_weights():
    matrix, shadows = torch.nn.Parameter(torch.ones(5, 3)), Shadows()
    assert shadows.to_write(matrix) is None
    first = shadows.of(matrix)
    assert shadows.of(matrix) is first is shadows.to_write(matrix)
    with torch.no_grad():
        matrix[2] = 7.0
    assert torch.equal(shadows.of(matrix), matrix.bfloat16())


def test_the_optimiser_writes_the_copies(monkeypatch):
    config = DictionaryConfig(d_sae=D_SAE, activation=TopK(k=3))
    monkeypatch.setattr(launch, "choose", lambda _, backend: backend or "triton")
    step = step_of(config)  # its matrices go by rows, as on a GPU, by torch's operations
    monkeypatch.undo()
    matrices = (step.autoencoder.enc_rows, step.autoencoder.dec_rows)
    before = [step.shadows.of(matrix) for matrix in matrices]
    step(torch.randn(BATCH, D_IN))
    for matrix, copy in zip(matrices, before, strict=True):
        assert step.shadows.of(matrix) is copy
        assert torch.equal(copy, matrix.bfloat16())


def test_a_wait_is_seen(monkeypatch):
    with gpu_branches.counted(monkeypatch) as found:
        bool(torch.ones(3).any())
        torch.ones(3)[torch.ones(3) > 0]
        torch.tensor([1, 2])
        torch.ones(3) + 1
    assert sum(found.waits.values()) == 3


D = {"d_sae": D_SAE, "dead_after_tokens": 3 * BATCH}
KINDS = {
    "topk": DictionaryConfig(activation=TopK(k=3), auxk=AuxK(), ema=0.9, **D),
    "frozen": DictionaryConfig(activation=TopK(k=3), frozen="soft_decoder", **D),
    "jumprelu": DictionaryConfig(
        activation=JumpReLU(threshold=0.1, bandwidth=0.3), l0=L0(coefficient=0.1),
        preact=PreAct(coefficient=0.01), **D,
    ),
    "control": DictionaryConfig(
        activation=ReLU(), l1=L1(coefficient=0.3), control=Control(target=4.0, rate=0.1),
        unit_norm=False, **D,
    ),
    "gated": DictionaryConfig(
        activation=Gated(), l1=L1(coefficient=0.3), auxk=AuxK(coefficient=0.5), **D
    ),
    **{
        getattr(optimizer, "states", optimizer.kind): DictionaryConfig(
            activation=TopK(k=3), optimizer=optimizer, **D
        )
        for optimizer in OPTIMISERS[1:]
    },
}  # fmt: skip


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_step_that_the_host_does_not_look_at_is_the_same(config):
    """Also after batches that are not finite, which change nothing but the count."""
    seeing, blind = step_of(config, total=12), step_of(config, total=12)
    blind.looks = False
    few_bits = getattr(config.optimizer, "states", "float32") != "float32"
    # a bound on the dead makes other products, which are rounded otherwise
    near = {"rtol": 1e-4, "atol": 1e-5} if config.auxk or config.preact else {"rtol": 0, "atol": 0}
    for number, x in enumerate(rows()[:12]):
        given = torch.full_like(x, math.nan) if number in (0, 5, 6) else x
        before = {name: value.clone() for name, value in blind.state_dict().items()}
        one, other = seeing(given), blind(given)
        assert float(other.finite) == float(one.finite) == float(number not in (0, 5, 6))
        if not float(one.finite):
            after = blind.state_dict()
            changed = [n for n, v in before.items() if not torch.equal(v, after[n])]
            assert changed == ["n_steps"]
        elif not few_bits:  # whose noise goes by the steps that were tried
            torch.testing.assert_close(other.loss, one.loss, **near)
    if not few_bits:
        torch.testing.assert_close(blind.state_dict(), seeing.state_dict(), **near)


def test_the_bound_on_the_dead_holds_until_the_host_looks_again(monkeypatch):
    silent, bound, looks = torch.arange(0, 5300, 100), DeadBound(), []
    monkeypatch.setattr(torch.Tensor, "__int__", lambda t: looks.append(1) or t.item())
    for n_steps in range(130):
        most = bound.of(silent, 40_000, n_steps, 101)
        assert int((silent >= 40_000).sum().item()) <= most
        silent += 101
        silent[n_steps % 53] = 0
    assert len(looks) == 3
    assert bound.of(silent, 40_000, 130, 102) <= 53
    assert len(looks) == 4, "more rows in a step than were reckoned with"


def metrics_of(finite: float) -> StepMetrics:
    return StepMetrics(*torch.zeros(5), torch.tensor(finite))


@pytest.mark.parametrize("looks_at_once", [False, True])
def test_three_failures_in_a_row_are_told_when_the_host_looks(looks_at_once):
    failures = Failures(("one", "two"), looks_at_once=looks_at_once)
    for number, finite in enumerate([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], start=1):
        failures.see({"one": metrics_of(1.0), "two": metrics_of(finite)}, number)
    failures.require_few()
    failures.see({"one": metrics_of(1.0), "two": metrics_of(0.0)}, 7)
    if not looks_at_once:
        failures.see({"one": metrics_of(1.0), "two": metrics_of(1.0)}, 8)
    rule = "the loss of two must be finite, got three steps in a row that are not, up to step 7"
    with pytest.raises(FloatingPointError, match=rule):
        failures.require_few()


SPLIT = {
    "topk": DictionaryConfig(activation=TopK(k=3), auxk=AuxK(), **(D | {"d_sae": 62})),
    "batchtopk": DictionaryConfig(activation=BatchTopK(k=3), **(D | {"d_sae": 62})),
}


@pytest.mark.parametrize(
    ("kind", "shards", "n_waits"),
    [("topk", 2, 0), ("batchtopk", 2, 0), ("topk", 1, 1), ("batchtopk", 1, 2)],
)
def test_several_processes_wait_as_seldom_as_they_can(kind, shards, n_waits, in_ranks):
    """Where rows are split, for how many they are, and BatchTopK for whether it has offered enough.

    What the host does not look at comes out as where it looks.
    """
    config = SPLIT[kind]

    def made() -> TrainStep:
        dictionary = SparseAutoencoder(config.architecture(D_IN))
        initialise(dictionary, torch.Generator().manual_seed(0))
        return TrainStep(dictionary, config, 40, ranks=connect(shards))

    def work():
        seeing, blind = made(), made()
        blind.looks = False
        part = seeing.ranks.rows.share
        for x in rows()[:7]:
            own = x[part(len(x))]
            torch.testing.assert_close(blind(own), seeing(own), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(blind.state_dict(), seeing.state_dict(), rtol=1e-4, atol=1e-5)
        with pytest.MonkeyPatch.context() as patch:
            gpu_branches.branches_of_a_gpu(patch)
            found = counted_step(made(), lambda x: (x[part(len(x))],), patch)
        waits = "\n".join(f"{n} {line}" for line, n in found.waits.items())
        assert found.waits.total() == n_waits, waits
        return {"dead": seeing.silent_rows}

    one, other = in_ranks(2, work)
    assert shards == 2 or torch.equal(one["dead"], other["dead"])


RECORDED = {
    "topk": {"activation": TopK(k=3), "auxk": AuxK(), "ema": 0.2},
    "batchtopk": {"activation": BatchTopK(k=3), "unit_norm": False, "frozen": "soft_decoder"},
    "prefixes": {
        "activation": BatchTopK(k=3), "matryoshka": FixedPrefixes(ends=(5, 11)),
        "refine": Refine(steps=1, rate=0.5, until=0.5, held_until=0.9),
    },
    "jumprelu": {
        "activation": JumpReLU(threshold=0.1, bandwidth=0.3), "preact": PreAct(coefficient=0.01),
        "l0": L0(coefficient=0.1, ramp=0.15, threshold_lr=3e-3),
    },
    "relu": {"activation": ReLU(), "l1": L1(coefficient=0.3), "unit_norm": False, "accumulate": 2},
    "gated": {"activation": Gated(), "l1": L1(coefficient=0.3), "auxk": AuxK(coefficient=0.5)},
}  # fmt: skip


def on_gpu_branches(config: DictionaryConfig, patch: pytest.MonkeyPatch) -> TrainStep:
    """A step as on a GPU, whose learning rates lie on the device."""
    gpu_branches.branches_of_a_gpu(patch)
    step = step_of(config, total=14)
    step.looks = False
    step.silent_rows[:9] = 1000
    for group in step.optimizer.param_groups:
        group["lr"] = torch.zeros(())
    return step


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=[pytest.mark.long] if name == "batchtopk" else [])
        for name, fields in RECORDED.items()
    ],
)
def test_a_replayed_step_is_the_step(fields, monkeypatch):
    """Whatever the host hands to an operation is what it was when the step was recorded."""
    config = DictionaryConfig(
        d_sae=17, dead_after_tokens=1000, optimizer=Adam(lr=1e-2, warmup=0.8), **fields
    )
    plain, step = (on_gpu_branches(config, monkeypatch) for _ in range(2))
    recorded: list[int] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(step.n_steps)
        return gpu_branches.tape(work, step.state_dict, monkeypatch)

    graph = StepGraph(step, record=record)
    n_steps = 14 if config.refine else 8  # the last one may move the decoder again
    for x in (x[:3] for x in rows()[:n_steps]):
        torch.testing.assert_close(graph(x), plain(x), rtol=0, atol=0)
    assert step.n_steps == plain.n_steps == n_steps
    assert recorded == ([5, 11] if config.refine else [5 + bool(config.ema)])
    for name, right in plain.state_dict().items():
        assert torch.equal(step.state_dict()[name], right), name


def test_what_cannot_be_recorded_is_launched_and_said_once(monkeypatch, caplog):
    def record(work: Callable[[], None]) -> Callable[[], None]:
        work()
        raise RuntimeError("no kernel may wait\nmore lines")

    config = DictionaryConfig(d_sae=17, activation=TopK(k=3))
    step = on_gpu_branches(config, monkeypatch)
    graph = StepGraph(step, "one", record)
    for x in rows()[:8]:
        graph(x[:2])
    said = "saes.one: no CUDA graph, its steps are launched: no kernel may wait"
    assert caplog.messages == [said]
    assert step.n_steps == 8
    assert step.sets_rates
    caplog.set_level("INFO")
    steered = step_of(KINDS["control"])  # its penalty's weight is made from one step to the next
    StepGraph(steered)(rows()[0])
    steered.looks = False
    again = StepGraph(steered, "two", record)
    again(rows()[1])
    again(rows()[2])
    assert caplog.messages[1:] == [
        "saes.two: no CUDA graph, its steps are launched: its kind of step is not recorded"
    ]


def test_a_recording_that_would_leave_no_room_for_a_step_is_refused(monkeypatch):
    for name, found in (("reserved", 7 << 20), ("allocated", 2 << 20)):
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda found=found: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 << 20, 1 << 30))
    with pytest.raises(RuntimeError, match="it takes 5 MiB, and 4 MiB are free"):
        cuda_graph(lambda: None)
