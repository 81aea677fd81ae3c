"""Correctness, then speed, of the kernels on a CUDA device: `python -m benchmarks.gpu_suite`."""
