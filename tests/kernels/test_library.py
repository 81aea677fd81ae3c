"""`torch.compile` of the ops; the checks are in compiled_ops.py."""

import subprocess
import sys
from pathlib import Path


def test_compiled_ops_are_the_eager_ones():
    script = Path(__file__).with_name("compiled_ops.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_registers_the_operators_and_loads_no_compiler():
    code = (
        "import sys, torch, sae_kernels;"
        "assert hasattr(torch.ops.sae_kernels, 'encode');"
        "raise SystemExit(bool({'torch._dynamo', 'triton'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
