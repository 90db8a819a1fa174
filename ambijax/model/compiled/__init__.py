"""Kernels for one CPU device, compiled by numba; `ambijax.model.cpu_kernels` calls them from JAX."""
