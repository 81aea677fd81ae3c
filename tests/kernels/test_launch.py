import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_kernels import adam, blocks, dense, launch
from sae_kernels.launch import check_floating, check_indices, check_k, check_shape, choose

X = torch.zeros(5, 7)


@pytest.fixture
def in_fresh_process():
    """The error that Python code ends with in a process of its own."""

    def run(code, **environment):
        environment = {**os.environ, **environment}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=100, check=False
        ).stderr

    return run


def test_choose_takes_the_fast_path_by_default_and_what_is_forced():
    assert choose(X, None) == "torch"
    assert choose(X, "torch") == "torch"
    assert choose(X, "reference") == "reference"


def test_choose_refuses_a_backend_that_does_not_exist_and_names_those_that_do():
    message = (
        r"backend must be one of 'reference', 'torch', 'triton' on cpu, got 'cuda'; leave it out"
    )
    with pytest.raises(ValueError, match=message):
        choose(X, "cuda")


class _OnCuda:
    """What `choose` reads of a tensor that is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.fixture
def gpu(monkeypatch):
    """Lets the GPU be one of this maker and capability."""

    def made(cuda, capability):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        launch._has_kernels.cache_clear()

    yield made
    launch._has_kernels.cache_clear()


def test_a_gpu_without_kernels_takes_torchs_operations_and_that_is_said_once(shipped, gpu, caplog):
    bare, x = shipped(choose), _OnCuda(torch.float32)
    for cuda, capability, expected in (
        ("13.0", (7, 5), "torch"),
        (None, (9, 4), "torch"),  # another maker's numbers say something else
        ("13.0", (8, 0), "triton"),
        ("13.0", (10, 3), "triton"),
    ):
        gpu(cuda, capability)
        assert [bare(x, None), bare(x, None)] == [expected] * 2
    assert caplog.messages == [
        f"some GPU (cuda:0, compute capability {found}) must be an NVIDIA GPU of 8.0 or newer for "
        "the kernels; torch's operations take their place"
        for found in ("7.5", "9.4")
    ]


def test_choose_takes_triton_on_cuda_where_it_is_installed(shipped, gpu, monkeypatch):
    gpu("13.0", (9, 0))
    bare = shipped(choose)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert bare(_OnCuda(dtype), None) == "triton"
        assert bare(_OnCuda(dtype), "triton") == "triton"
    assert bare(_OnCuda(torch.float64), None) == "torch"
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert bare(_OnCuda(torch.float32), None) == "torch"
    with pytest.raises(ValueError, match="'triton' must have the package triton"):
        bare(_OnCuda(torch.float32), "triton")


def test_choose_lets_the_interpreter_run_on_the_cpu_and_nothing_else(shipped, monkeypatch):
    assert choose(X, "triton") == "triton"
    monkeypatch.setattr(launch, "_interprets", lambda: False)
    message = "must get CUDA tensors, got cpu; use backend='torch', or set TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=message):
        choose(X, "triton")
    monkeypatch.undo()
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="must get CUDA tensors"):
        choose(X, "triton")


def test_choose_refuses_triton_for_64_bits():
    with pytest.raises(
        ValueError, match=r"at most 32 bits, got torch\.float64; use backend='torch'"
    ):
        choose(X.double(), "triton")


def test_without_the_interpreter_triton_is_refused_on_the_cpu(in_fresh_process):
    code = "import torch; from sae_kernels.launch import choose; choose(torch.ones(3), 'triton')"
    assert "got cpu; use backend='torch'" in in_fresh_process(code, TRITON_INTERPRET="0")


@pytest.mark.parametrize("k", [-1, 0, 24])
def test_check_k_states_the_range(k):
    with pytest.raises(ValueError, match=f"k must lie between 1 and d_sae=23, got {k}"):
        check_k(k, 23)


@pytest.mark.parametrize("k", [1, 23])
def test_check_k_accepts_both_ends(k):
    check_k(k, 23)


def test_check_floating_refuses_integers_and_mixed_dtypes():
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        check_floating(x=X.long())
    message = r"b_enc must have the dtype of x, torch\.float32, got torch\.float16"
    with pytest.raises(TypeError, match=message):
        check_floating(x=X, b_in=None, b_enc=X.half())


def test_check_floating_refuses_two_devices():
    with pytest.raises(ValueError, match="b_enc must be on the device of x, cpu, got meta"):
        check_floating(x=X, b_enc=X.to("meta"))


@pytest.mark.parametrize("expected", [(5,), (5, 6), (7, 5), (5, 7, 1), (None, 5)])
def test_check_shape_states_both_shapes(expected):
    with pytest.raises(ValueError, match=r"x must have the shape \(.*\), got \(5, 7\)"):
        check_shape("x", X, *expected)


def test_check_shape_lets_none_stand_for_any_length_and_for_no_tensor():
    check_shape("x", X, None, 7)
    check_shape("x", None, 3)


def test_check_indices_refuses_what_names_no_latent():
    indices = torch.tensor([[0, 22], [3, 4]])
    check_indices(indices, 23)
    check_indices(indices[:0], 23)
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.21, got values from 0 to 22"):
        check_indices(indices, 22)
    with pytest.raises(ValueError, match=r"in 0\.\.22, got values from -1 to 21"):
        check_indices(indices - 1, 23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_check_indices_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=f"indices must be integers, got {dtype}"):
        check_indices(torch.zeros(5, 3, dtype=dtype), 23)


def test_a_kernel_runs_on_the_gpu_of_its_tensors_and_is_launched_in_no_other_way(monkeypatch):
    seen = []

    class Guard:
        def __init__(self, tensor):
            seen.append(("on", tensor))

        def __enter__(self):
            seen.append("in")

        def __exit__(self, *_):
            seen.append("out")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, args, options))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    blocks.launch(Kernel(), (3, 5), X, 7, BLOCK=16)
    ran = ((3, 5), (7,), {"BLOCK": 16, "enable_fp_fusion": True})
    assert seen == [("on", X), "in", ran, "out"]
    for path in Path(launch.__file__).parent.glob("*_triton.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [ast.unparse(f) for f in calls if isinstance(f, ast.Subscript)], path


def test_what_is_worked_on_at_a_time_is_a_cpus_on_a_cpu_alone():
    meta = torch.device("meta")  # any device that is no CPU
    assert launch.workspace(torch.device("cpu"), 123) == 123
    assert launch.workspace(meta, 123) == blocks.WORKSPACE_BYTES
    wide = torch.empty(8192, 131_072, device=meta)
    assert len(dense._chunks(wide)) == wide.nbytes // blocks.WORKSPACE_BYTES
    assert adam._rows_at_a_time(torch.empty(7, 4096, device=meta)) == (1 << 30) // 32 // 4096
    assert adam._rows_at_a_time(torch.empty(7, 4096)) == 64
