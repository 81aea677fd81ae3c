"""Run as a script: read IN.pt with weights_only, write its tensors to OUT.safetensors.

The one place where `torch.load` is used. Before it, the process gives up what an attack would
need: the kernel refuses every system call but those that read and write what is open already, ask
for memory, and end. Memory, time and output are bounded. It imports nothing of this project.
"""

import ctypes
import errno
import io
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import IO

import safetensors.torch
import torch

MAX_DEPTH = 4
GIB = 1 << 30

CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "sched_yield": (24, 124), "gettid": (186, 178), "futex": (202, 98), "clock_gettime": (228, 113),
    "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
"""What the process may ask of the kernel: name -> number on x86_64 and on aarch64."""

MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""Machine -> its column in `CALLS`, its AUDIT_ARCH, the number of seccomp()."""


def main(source_path: str, target_path: str, start: str) -> None:
    """Convert one file, or what follows its first `start` bytes.

    Raises:
        ValueError: If it holds something else than tensors and plain values.
    """
    with open(source_path, "rb") as source, open(target_path, "wb") as target:
        size = os.fstat(source.fileno()).st_size
        _warm_up()
        _confine(size)
        source.seek(int(start))
        target.write(convert(io.BytesIO(source.read()) if int(start) else source, size))


def convert(source: IO[bytes] | io.BytesIO, size: int) -> bytes:
    """Return the safetensors file of what a .pt file of `size` bytes holds."""
    content = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} instead of a dict of tensors")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, object] = {}
    _flatten(content, "", tensors, values)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > 2 * size:  # a tied matrix has two names; strides of 0 make any size from nothing
        raise ValueError(f"tensors of {total:,} bytes in a file of {size:,}")
    return safetensors.torch.save(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
        {"values": json.dumps(values)},
    )


def unpacked(metadata: Mapping[str, str]) -> dict[str, object]:
    """Return the values that `convert` put beside the tensors."""
    return json.loads(metadata["values"])


def _flatten(content: Mapping, prefix: str, tensors: dict, values: dict) -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_quantized:
                raise ValueError(f"{name!r} is not a plain tensor")
            tensors[name] = value
        elif isinstance(value, Mapping) and prefix.count(".") < MAX_DEPTH:
            _flatten(value, f"{name}.", tensors, values)
        elif value is None or isinstance(value, bool | int | float | str):
            values[name] = value
        else:
            values[name] = f"<{type(value).__name__}>"


def _warm_up() -> None:
    """Import all that reading and writing needs, while files can still be opened."""
    torch.set_num_threads(1)
    sample = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, sample)
    size = sample.tell()
    sample.seek(0)
    convert(sample, size)


def _confine(size: int) -> None:
    limits = {
        resource.RLIMIT_DATA: 4 * GIB + 4 * size,
        resource.RLIMIT_CPU: 120 + 60 * size // GIB,
        resource.RLIMIT_FSIZE: 2 * size + (1 << 20),
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    _forbid_calls()


def _forbid_calls() -> None:
    """Have the kernel refuse all but `CALLS`, in every thread, for good.

    Raises:
        OSError: If this kernel has no seccomp, or the machine is of another kind.
    """
    system, machine = platform.system(), platform.machine()
    machines = " or ".join(MACHINES)
    failed = OSError(
        f"a pickle must be read by a process that seccomp confines (Linux on {machines}), got "
        f"{system} on {machine} or a kernel without it; convert the file elsewhere"
    )
    if system != "Linux" or machine not in MACHINES:
        raise failed
    column, architecture, seccomp = MACHINES[machine]
    program = _filter(architecture, [numbers[column] for numbers in CALLS.values()])
    held = ctypes.create_string_buffer(program)
    request = struct.pack("HL", len(program) // 8, ctypes.addressof(held))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, all_threads = 38, 1, 1
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.syscall(
        seccomp, set_filter, all_threads, request
    ):
        raise failed


def _filter(architecture: int, allowed: list[int]) -> bytes:
    """A program of the kernel's packet filter: may this system call be made?"""
    load, equal, answer = 0x20, 0x15, 0x06
    permit, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    n = len(allowed)
    lines = [
        (load, 0, 0, 4),  # seccomp_data.arch: numbers of another kind mean other calls
        (equal, 0, n + 1, architecture),
        (load, 0, 0, 0),  # seccomp_data.nr
        *((equal, n - i, 0, number) for i, number in enumerate(allowed)),
        (answer, 0, 0, refuse),
        (answer, 0, 0, permit),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    sys.stderr.write(" ".join(f"{kind.__name__}: {error}".split())[:300] + "\n")


if __name__ == "__main__":
    sys.excepthook = _one_line
    main(*sys.argv[1:])
