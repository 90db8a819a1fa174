"""The processes of a run: how they find each other, which one writes, and how they stop together.

    one process                      a cluster of one, on a free port of the loopback
    SLURM, TPU VM, GKE, Open MPI     as `jax.distributed` detects them
    anything else                    JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0

Every process runs the same program on the same batch of tokens: it places the rows of its own devices, and hears only
the clips of those rows (features.py). What comes back from the devices is gathered, so that all decide alike. Process 0
writes files and prints. One that fails tells the others why, so that nobody waits in a collective for somebody who is
gone; one that falls silent is named by the others after a heartbeat.
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed  # the key-value store that every process sees has no public name
from jax.experimental import multihost_utils

from ambijax import errors, signals

ALONE = 10**8  # seconds: jax's heartbeat would end a process that was suspended, and alone nobody waits for it

PERIOD = 1.0  # seconds between signs of life, at most

PREEMPTED = "RECEIVED_PREEMPTION_NOTICE"  # the store's key for it, set by jax's preemption service

_polls = itertools.count()


@contextlib.contextmanager
def cluster(heartbeat: int, start: int) -> Iterator[None]:
    """Joins the processes of this run before any device is touched; inside, no failure leaves the others waiting.

    Args:
      heartbeat: seconds without a sign of life after which a process counts as dead.
      start: seconds to wait for all processes at the beginning.
    """
    connect(heartbeat, start)
    if distributed.global_state.num_processes == 1:
        yield
        return
    watch = _Watch(heartbeat)
    try:
        yield
    except errors.Preempted:  # all leave at the same step
        watch.done()
        raise
    except BaseException as error:
        if not isinstance(error, errors.AmbijaxError | KeyboardInterrupt):
            time.sleep(heartbeat + 2 * watch.period)  # another's death may be the reason: then the watch names it
        watch.leave(error)
    watch.done()


def connect(heartbeat: int, start: int) -> None:
    """`jax.distributed.initialize` with what the environment says, or as a cluster of one; a second call does nothing.

    Raises:
      ConfigError: the others are not there in time, or the description of the cluster is incomplete.
    """
    if jax.distributed.is_initialized():
        return
    # jax's own heartbeat aborts without a name, between half its time-out and all of it: ours comes before.
    common = {"heartbeat_timeout_seconds": 2 * heartbeat + 10, "initialization_timeout": start}
    jax.config.update("jax_check_proxy_envs", False)  # dealt with by _no_proxy
    try:
        if (place := _given()) is not None:
            _no_proxy(place["coordinator_address"])
            jax.distributed.initialize(**place, **common)
        else:
            _detect(common)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise errors.ConfigError(f"the processes of this run did not find each other in {start} s: {reason}") from None
    state = distributed.global_state
    if state.num_processes > 1:
        print(f"{_name()} of {state.num_processes} joined {state.coordinator_address}")
        return
    if jax.distributed.is_initialized():  # a job of one task, with a heartbeat
        jax.distributed.shutdown()
    address = f"127.0.0.1:{_free_port()}"
    _no_proxy(address)
    jax.config.update("jax_enable_preemption_service", False)  # `signals` acts at once, also while XLA compiles
    here = {"coordinator_bind_address": address, "cluster_detection_method": "deactivate"}
    jax.distributed.initialize(address, 1, 0, heartbeat_timeout_seconds=ALONE, **here)
    signals.catch()


def is_main() -> bool:
    """Whether this process writes files and prints: process 0."""
    return (distributed.global_state.process_id or 0) == 0


def leave_requested() -> bool:
    """Whether the run shall stop here; every process must ask equally often and hears yes at the same question.

    It becomes true after SIGTERM or Ctrl-C to any of them.
    """
    if distributed.global_state.num_processes == 1:
        return signals.wanted()
    if leave := multihost_utils.reached_preemption_sync_point(next(_polls)):
        signals.heard()
    return leave


def notes(workdir: Path) -> Path:
    """Where this process writes what everybody knows: `workdir` in process 0, elsewhere one that is thrown away."""
    return workdir if is_main() else _scratch()


@functools.cache
def _scratch() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="ambijax-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block alone, the others after it: they find done what it does there."""
    several = jax.process_count() > 1
    if several and not is_main():
        multihost_utils.sync_global_devices("main is done")
    yield
    if several and is_main():
        multihost_utils.sync_global_devices("main is done")


def from_main(value: object) -> object:
    """Process 0's JSON-ready value, in every process."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = text if is_main() else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def anywhere(flags: Sequence[bool]) -> np.ndarray:
    """Which of the flags, bool [N], are set in at least one process; every process must ask."""
    flags = np.array(flags, bool)
    return flags if jax.process_count() == 1 else multihost_utils.process_allgather(flags).any(axis=0)


class _Watch:
    """Says "I am alive" to the others and listens for them, in two threads of its own.

    The store under ambijax/: who/P names process P, beat/P changes while it lives, left/P says how it ended.
    """

    def __init__(self, heartbeat: float) -> None:
        state = distributed.global_state
        self._client, self._me, self._heartbeat = state.client, state.process_id, heartbeat
        self.period = min(PERIOD, heartbeat / 10)
        self._seen: dict[str, str] = {}  # the store, as last read
        self._heard = dict.fromkeys(range(state.num_processes), time.monotonic())
        self._write("who", _name())
        signals.share(linger=2 * self.period * is_main())  # the store lives in process 0
        self._over = threading.Event()
        jobs = (self._beat, self._judge)
        self._threads = [threading.Thread(target=job, name=f"watch{job.__name__}", daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()

    def done(self) -> None:
        """This process ends as it should: whoever is still busy must not miss it. Waits for them, watching."""
        self._write("left", "done")
        jax.distributed.shutdown()
        self._over.set()
        for thread in self._threads:  # Python aborts when it ends while one is inside the store's client
            thread.join()

    def leave(self, error: BaseException) -> None:
        """Tells the others, and ends this process without waiting for them. Does not return."""
        code = error.exit_code if isinstance(error, errors.AmbijaxError) else 1
        if isinstance(error, errors.AmbijaxError | KeyboardInterrupt):
            print(f"ambijax: {str(error) or 'interrupted'}", file=sys.stderr)
        else:
            traceback.print_exc()
        with contextlib.suppress(RuntimeError, ValueError):  # the coordinator may be gone
            self._write("left", json.dumps([code, " ".join(str(error).split()) or type(error).__name__]))
        self._exit(code)

    def _exit(self, code: int) -> None:
        if self._me == 0:  # the store lives here: the others must have read it
            time.sleep(2 * self.period)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no shutdown barrier: it would wait for those who are gone

    def _write(self, what: str, value: str) -> None:
        self._client.key_value_set(f"ambijax/{what}/{self._me}", value, allow_overwrite=True)

    def _beat(self) -> None:
        for beat in itertools.count():
            if beat and self._over.wait(self.period):
                return
            try:
                self._write("beat", str(beat))
                found = dict(self._client.key_value_dir_get("ambijax/"))
            except (RuntimeError, ValueError):  # the coordinator did not answer once, or is gone, which _judge says
                continue
            now = time.monotonic()
            for process in self._heard:
                key = f"ambijax/beat/{process}"
                if found.get(key) != self._seen.get(key) or found.get(f"ambijax/left/{process}") == "done":
                    self._heard[process] = now
            self._seen = found
            if not signals.wanted() and self._preempted():
                signals.ask()

    def _preempted(self) -> bool:
        try:
            return bool(self._client.key_value_try_get(PREEMPTED))
        except RuntimeError:  # no such key
            return False

    def _judge(self) -> None:
        while not self._over.wait(self.period):
            now, seen = time.monotonic(), self._seen
            for process in set(self._heard) - {self._me}:
                who = seen.get(f"ambijax/who/{process}", f"process {process}")
                left = seen.get(f"ambijax/left/{process}", "done")
                if left != "done":
                    code, reason = json.loads(left)
                    print(f"ambijax: {who} stopped: {reason}", file=sys.stderr)
                    self._exit(code)
            silent = [process for process, heard in self._heard.items() if now - heard > self._heartbeat]
            if silent:
                lost = [0] if self._me in silent else silent  # nothing heard of oneself: the store itself is silent
                who = ", ".join(seen.get(f"ambijax/who/{process}", f"process {process}") for process in lost)
                gone = f"{who}: no sign of life for {self._heartbeat:g} s"
                print(f"ambijax: {gone}; start the run again, it resumes from its last checkpoint", file=sys.stderr)
                self._exit(errors.Preempted.exit_code)


def _given() -> dict | None:
    """The cluster as the environment describes it, None where it says nothing."""
    names = {
        "coordinator_address": "JAX_COORDINATOR_ADDRESS",
        "num_processes": "JAX_NUM_PROCESSES",
        "process_id": "JAX_PROCESS_ID",
    }
    found = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    if "num_processes" not in found and "process_id" not in found:
        return None
    missing = [name for key, name in names.items() if key not in found]
    if missing:
        raise errors.ConfigError(
            f"{', '.join(missing)} is not set; a cluster by hand needs {', '.join(names.values())}"
        )
    try:
        numbers = {key: int(found[key]) for key in ("num_processes", "process_id")}
    except ValueError:
        raise errors.ConfigError("JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers") from None
    if not 0 <= numbers["process_id"] < numbers["num_processes"]:
        raise errors.ConfigError(
            f"JAX_PROCESS_ID={numbers['process_id']} must be from 0 to JAX_NUM_PROCESSES={numbers['num_processes']} - 1"
        )
    return {**found, **numbers, "cluster_detection_method": "deactivate"}


def _detect(common: dict) -> None:
    """Joins the cluster that jax detects, if it detects one."""
    try:
        jax.distributed.initialize(**common)
    except ValueError as error:
        if "should be defined" not in str(error) and "must be defined" not in str(error):
            raise


def _no_proxy(address: str) -> None:
    """gRPC would send even the loopback through an HTTP proxy, and wait for it."""
    host = address.rsplit(":", 1)[0]
    others = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112, gRPC's spelling
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (others, host)))  # noqa: SIM112


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _name() -> str:
    return f"process {distributed.global_state.process_id} (pid {os.getpid()} on {socket.gethostname()})"
