"""How XLA calls what numba compiles, on XLA's own threads (xla/ffi/api/c_api.h; docs.jax.dev/en/latest/ffi.html).

A call has a record, its last result: how far it is, and where its buffers are. Each of XLA's threads takes items until
there are none, and the last one to leave says that the results are there. Nobody waits for anybody.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ambijax.model.compiled import SOURCES

# The name by which XLA knows them, another after every change: compiled programs are kept longer than one version.
_TARGET = f"ambijax_kernels_{SOURCES[:16]}"
_WORK = "ambijax_work"  # what a thread does
_BUFFERS = 32  # operands and results of a call, at most

# The record, in words of eight bytes. What threads share stands in cache lines of its own.
_NEXT, _RUNNING, _ITEMS, _KIND, _SEGMENTS, _DONE, _FUTURE, _FIRST = 0, 8, 16, 17, 18, 19, 20, 24
_RECORD = _FIRST + 8 * _BUFFERS

# Sums may be reordered, which vectors need; NaN and infinity stay what they are.
compiled = functools.partial(njit, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")


@intrinsic
def pointer(typing, address, dtype):
    """An address as a pointer to numbers of a type."""
    kind = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, dtype), generate


@intrinsic
def _call(typing, function, argument):
    """Calls a C function at an address with a pointer."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        return builder.call(builder.inttoptr(args[0], ir.FunctionType(word, [word]).as_pointer()), [args[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _fetch_add(typing, address, value):
    """Adds to a number that threads share; returns what it was."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], ir.IntType(64).as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _address_of_work(typing):
    """By name: an address of this process would be wrong in the next, which reads what numba kept."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        return builder.ptrtoint(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [word]), _WORK), word
        )

    return types.int64(), generate


@compiled
def _words(address, count):
    return carray(pointer(address, types.int64), (count,))


@compiled
def floats(address, rows, columns):
    """Float32 at an address as an array [rows, columns]."""
    return carray(pointer(address, types.float32), (rows, columns))


@compiled
def clear(address, count):
    """Float32 zeros."""
    x = pointer(address, types.float32)
    for i in range(count):
        x[i] = 0


@compiled
def address_of(x):
    """Of an array's first number; whoever takes it says until when the array is needed (`alive`)."""
    return np.int64(x.ctypes.data)


@compiled
def alive(*arrays):
    """Until here arrays keep their memory, which numba frees after the last line that names them."""
    return len(arrays)


@compiled
def begin(record):
    """What a thread that takes part must know: the kind of work, the buffers, the number of segments."""
    z = _words(record, _FIRST)
    return z[_KIND], pointer(record + 8 * _FIRST, types.int64), z[_SEGMENTS]


@compiled
def take(record):
    """The next item; -1 when there is none."""
    item = _fetch_add(record + 8 * _NEXT, 1)
    return item if item < _words(record, _FIRST)[_ITEMS] else -1


@compiled
def leave(record):
    """After the last thread the record is XLA's again."""
    if _fetch_add(record + 8 * _RUNNING, -1) == 1:
        z, asked = _words(record, _FIRST), np.zeros(3, np.int64)
        asked[0], asked[2] = 24, z[_FUTURE]
        _call(z[_DONE], address_of(asked))  # XLA_FFI_Future_SetAvailable
        alive(asked)


@compiled
def _fill_in(f, record):
    """The record of a call frame: eight words for each buffer, its address and its sizes; and the attributes."""
    z, attributes = _words(record, _RECORD), _words(f[20], 3)
    operands, results = _words(f[9], f[7]), _words(f[14], f[12])
    for i in range(f[7] + f[12] - 1):
        buffer = _words(operands[i] if i < f[7] else results[i - f[7]], 6)  # XLA_FFI_Buffer
        sizes = _words(buffer[5], buffer[4])
        z[_FIRST + 8 * i] = buffer[3]
        for axis in range(7):
            z[_FIRST + 8 * i + 1 + axis] = sizes[axis] if axis < buffer[4] else 1
    for i in range(3):  # items, kind, segments: attributes come in the order of their names
        z[_ITEMS + i] = carray(pointer(_words(attributes[i], 2)[1], types.int32), (1,))[0]


def _handle(key: int) -> Callable:
    def handle(frame):
        """XLA_FFI_Handler: shares a call out and takes part; what is not done when it returns is promised."""
        key  # noqa: B018  numba keeps machine code under it
        f = _words(frame, 22)  # XLA_FFI_CallFrame
        if f[1] != 0:  # XLA asks which version of its interface this was written for: 0.1
            version = carray(pointer(_words(f[1], 4)[3] + 24, types.int32), (2,))
            version[0], version[1] = 0, 1
            return 0
        record = _words(_words(f[14], f[12])[f[12] - 1], 6)[3]
        _fill_in(f, record)
        z, api = _words(record, _FIRST), _words(f[2], 22)
        asked, threads = np.zeros(5, np.int64), np.ones(1, np.int64)
        asked[0], asked[2], asked[3] = 32, f[3], address_of(threads)
        _call(api[18], address_of(asked))  # XLA_FFI_ThreadPool_NumThreads
        asked[0], asked[2] = 24, 0
        _call(api[19], address_of(asked))  # XLA_FFI_Future_Create
        f[21] = asked[2]
        z[_NEXT], z[_RUNNING], z[_DONE], z[_FUTURE] = 0, threads[0], api[20], asked[2]
        asked[0], asked[2], asked[3], asked[4] = 40, f[3], _address_of_work(), record
        for _ in range(threads[0] - 1):
            _call(api[17], address_of(asked))  # XLA_FFI_ThreadPool_Schedule
        alive(asked, threads)
        _call(_address_of_work(), record)
        return 0

    return handle


_entries = []  # machine code lives as long as what holds it


def _entry(make: Callable[[int], Callable]) -> int:
    """The address of a function for C, which takes an address. Machine code stays on disk until SOURCES changes."""
    function, signature = make(int(SOURCES[:15], 16)), types.int64(types.int64)
    try:
        entry = cfunc(signature, cache=True)(function)
    except RuntimeError:  # numba's "no locator available": it may write nowhere, and every process compiles anew
        entry = cfunc(signature)(function)
    _entries.append(entry)
    return entry.address


def register(work: Callable[[int], Callable]) -> None:
    """Makes `work(key)`, a function of a record's address, what each thread does in a call of `call`."""
    llvmlite.binding.add_symbol(_WORK, _entry(work))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_entry(_handle)), platform="cpu")


def call(
    kind: int,
    items: int,
    results: Iterable,
    operands: Sequence[jax.Array],
    segments: int = 0,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Runs a kernel under jit.

    Args:
      kind: one of kernels.py.
      items: the pieces into which it falls.
      results: arrays or structures of the results' shapes and dtypes.
      operands: arrays of at most seven axes.
      segments: of keys, for attention.
      aliases: operands' numbers to those of results that take their memory.
    """
    shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in results]
    if (buffers := len(shapes) + len(operands)) > _BUFFERS:
        raise ValueError(f"{buffers} operands and results, of {_BUFFERS} at most")
    record = jax.ShapeDtypeStruct((2 * _RECORD,), np.int32)
    run = jax.ffi.ffi_call(_TARGET, [*shapes, record], input_output_aliases=aliases)
    return run(*operands, items=np.int32(items), kind=np.int32(kind), segments=np.int32(segments))[:-1]
