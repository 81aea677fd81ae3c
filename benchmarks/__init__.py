"""Benchmarks, as a package: pyarrow 17 installs one of this name, which hides a bare folder."""
