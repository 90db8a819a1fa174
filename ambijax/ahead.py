"""Programs compiled ahead of time: for the devices at hand, or for a TPU topology that need not be there.

A topology's program is compiled in a child process, which is stopped when the compiler turns to machine code. By then
memory is assigned and the program's text final; machine code would take most of the time and tell a plan nothing.
"""

import functools
import importlib.metadata
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from ambijax.errors import ConfigError

# What XLA writes of a program, in this order.
_ASSIGNMENT = "*.after_optimizations-buffer-assignment.txt"
_TEXT = "*.after_optimizations.txt"
_LATER = "*.after_optimizations_after_buffer_assignment.txt"


def versions() -> dict[str, str | None]:
    """Of all that decides what the compiler makes; None for what is not installed."""
    return {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as 'v5e:2x4', or those of this machine.

    Raises:
      ConfigError: no such topology, or no libtpu.
    """
    if not topology:
        return jax.devices()
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the TPU of this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor lock it
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # nor ask a metadata server who its neighbours are
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # the topology's name is what counts
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever libtpu throws; its first line says what it wanted
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--topology={topology}: {reason}; names look like v5e:2x4, v6e:2x2, v5p:2x2x1, and need libtpu: "
            "pip install 'ambijax[tpu]'"
        ) from None


def compiled(lower: Callable[[], jax.stages.Lowered], *, here: bool) -> tuple[dict, str]:
    """Compiles what `lower` returns.

    Args:
      lower: makes the program; can be pickled unless `here`.
      here: for this machine's devices, and not a topology's.

    Returns:
      bytes a chip, {"temporaries", "results"}, and the program's text; {"needs"} and '' when it is too large.
    """
    if not here:
        return _in_a_child(lower)
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return {"needs": _too_large(str(error))}, ""
    sizes = program.memory_analysis()
    temporaries = sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {"temporaries": temporaries, "results": results}, program.as_text()


def _in_a_child(lower: Callable[[], jax.stages.Lowered]) -> tuple[dict, str]:
    with tempfile.TemporaryDirectory() as directory:
        dump = Path(directory)
        child = multiprocessing.get_context("spawn").Process(target=_compile, args=(lower, dump))
        child.start()
        try:
            while child.is_alive() and not any(dump.glob(_LATER)):
                time.sleep(0.2)
        finally:
            child.kill()
            child.join()
        if (dump / "error").is_file():
            return {"needs": _too_large((dump / "error").read_text())}, ""
        if not any(dump.glob(_LATER)):
            raise RuntimeError(f"the compiler's process ended with {child.exitcode}")
        (assignment,), (text,) = dump.glob(_ASSIGNMENT), dump.glob(_TEXT)
        return memory(assignment.read_text()), text.read_text()


def _compile(lower: Callable[[], jax.stages.Lowered], dump: Path) -> None:
    lowered = lower()
    try:
        lowered.compile(compiler_options={"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        (dump / "error").write_text(str(error))


def memory(assignment: str) -> dict[str, int]:
    """Bytes of main memory beside the arguments, from XLA's text of what it placed where."""
    found = {"temporaries": 0, "results": 0}
    for size, what in re.findall(r"^allocation \d+: size (\d+),(.*)", assignment, re.MULTILINE):
        if " parameter " not in what and not re.search(r"color [1-9]", what):  # colours are a chip's other memories
            found["results" if "maybe-live-out" in what else "temporaries"] += int(size)
    return found


def _too_large(message: str) -> int:
    """Bytes that the compiler says it would need."""
    match = re.search(r"(?:required for[^(]*\(|Used )([\d.]+)([KMG])", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        raise RuntimeError(message)
    return int(float(match.group(1)) * {"K": 2**10, "M": 2**20, "G": 2**30}[match.group(2)])
