"""Every test runs on the CPU with eight simulated devices; nothing here needs a GPU, a key or a network."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path

import absl.logging
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real vote tables, utterance ids, vocabulary and configs; absent on a user's machine."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    """A command that is run inside a test may turn warnings off; the next test hears them again."""
    before = absl.logging.get_verbosity()
    yield
    absl.logging.set_verbosity(before)
