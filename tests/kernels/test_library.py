"""`torch.compile` of the ops; the checks are in compiled_ops.py."""

import subprocess
import sys
from pathlib import Path


def test_compiled_ops_are_the_eager_ones():
    script = Path(__file__).with_name("compiled_ops.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_registered_by_an_import():
    code = "import torch, sae_kernels; raise SystemExit(hasattr(torch.ops.sae_kernels, 'encode'))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
