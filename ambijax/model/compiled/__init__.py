"""Kernels for one CPU device, compiled by numba; `ambijax.model.cpu_kernels` calls them from JAX."""

import hashlib
from pathlib import Path

_FILES = sorted(Path(__file__).parent.glob("*.py"))
SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in _FILES)
).hexdigest()  # what is kept of them depends on it
