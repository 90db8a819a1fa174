"""Every test runs on the CPU with eight simulated devices; nothing here needs a GPU, a key or a network."""

import gc
import importlib.metadata
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# The suite compiles far more than it computes: machine code as LLVM first writes it is there in half the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # The older way to emit fusions takes a third of the time; later versions end at a flag that they do not know.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# One cache of compiled programs for all processes of a session, the commands that tests start included.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="ambijax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)  # bytes; with a limit JAX locks the directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"  # smaller ones cost more to keep

# Of several test processes each keeps to cores of its own: XLA's threads would wait for one another on all of them.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _number, _of = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[_number::_of] or os.sched_getaffinity(0))

from collections.abc import Iterator
from pathlib import Path

import absl.logging
import pytest

# What tracing makes is mostly kept; looking through it time and again took 6 % of the files measured.
gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: begun last, it would leave all test processes but one without work."""
    items.sort(key=lambda item: item.path.name != "test_train.py")


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real vote tables, utterance ids, vocabulary and configs; absent on a user's machine."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def model():
    """The random model of tests/small.py."""
    from tests import small  # jax must not be imported before the lines above

    return small.model()


@pytest.fixture(scope="module")
def variables(model):
    from tests import small

    return small.variables(model)


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    """A command that is run inside a test may turn warnings off; the next test hears them again."""
    before = absl.logging.get_verbosity()
    yield
    absl.logging.set_verbosity(before)
