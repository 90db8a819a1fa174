"""What the products of float32 matrices are made of: tiles of the result that stay in registers, written for LLVM.

A matrix is given by the address of its first number and by how many numbers lie between its rows, so that any part of
an array is one, and a transposed one too.
"""

import functools
from collections.abc import Callable, Sequence

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LONG = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
WIDTH = 16 if LONG else 8  # numbers in a vector
BROAD = 4 if LONG else 2  # vectors of a broad tile, of six rows: most of the 32 or 16 registers there are
FEW = 8  # columns of a product that are worth vectors along its inputs
_LATER = 8  # rows until a row is needed that is brought in now

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, WIDTH)
_number = functools.partial(ir.Constant, _I64)


def tile(rows: int, vectors: int, ahead: str = ""):
    """C += A B for C [rows, vectors x WIDTH]; `ahead` brings in the next rows of "a" or a later row of "b"."""

    @intrinsic
    def tile(typing, a, a_row, a_column, b, b_row, c, c_row, k):
        def generate(context, builder, signature, args):
            _write_tile(builder, rows, vectors, ahead, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


def _write_tile(builder, rows, vectors, ahead, a, a_row, a_column, b, b_row, c, c_row, k):
    def step(at: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        if ahead == "a":  # as they follow these: a line at every step brings all of them in
            _fetch(builder, a, builder.mul(_number(rows), builder.add(a_row, at)))
        row, later = builder.mul(at, b_row), builder.mul(builder.add(at, _number(_LATER)), b_row)
        if ahead == "b":
            for j in range(0, vectors * WIDTH, 16):
                _fetch(builder, b, builder.add(later, _number(j)))
        right = [_load(builder, b, builder.add(row, _number(j * WIDTH))) for j in range(vectors)]
        column = builder.mul(at, a_column)
        left = [builder.add(builder.mul(_number(i), a_row), column) for i in range(rows)]
        return _outer(builder, [_everywhere(builder, a, i) for i in left], right, sums)

    places = _places(builder, rows, vectors, c, c_row)
    start = [builder.load(place, align=4) for place in places]
    for place, x in zip(places, _loop(builder, 1, k, start, step), strict=True):
        builder.store(x, place, align=4)


def dots_tile(columns: int):
    """C = A B^T for C [rows, columns], as many numbers as a vector has, and k a multiple of WIDTH.

    Vectors go along k, so that nothing is lost on columns which do not fill one. Brings in the rows that follow A's.
    """

    @intrinsic
    def tile(typing, a, a_row, b, c, k):
        def generate(context, builder, signature, args):
            _write_dots(builder, columns, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return tile


def _write_dots(builder, columns, a, a_row, b, c, k):
    rows = [builder.mul(_number(i), a_row) for i in range(WIDTH // columns)]
    following = builder.mul(_number(len(rows)), a_row)

    def step(at: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        for row in rows:
            _fetch(builder, a, builder.add(builder.add(row, following), at))
        left = [_load(builder, a, builder.add(row, at)) for row in rows]
        right = [_load(builder, b, builder.add(builder.mul(_number(j), k), at)) for j in range(columns)]
        return _outer(builder, left, right, sums)

    sums = _loop(builder, WIDTH, k, [ir.Constant(_VECTOR, [0.0] * WIDTH)] * WIDTH, step)
    builder.store(_across(builder, sums), _at(builder, c, _number(0)), align=4)


def _loop(
    builder: ir.IRBuilder,
    size: int,
    k: ir.Value,
    start: Sequence[ir.Value],
    step: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """sums = step(at, sums) for at = 0, size, ... < k, at least once."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    at, sums = builder.phi(_I64), [builder.phi(_VECTOR) for _ in start]
    new = step(at, sums)
    following = builder.add(at, _number(size))
    for phi, first, later in zip([at, *sums], [_number(0), *start], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    builder.cbranch(builder.icmp_signed("<", following, k), loop, after)
    builder.position_at_end(after)
    return new


def _outer(builder, left, right, sums):
    """sums [left, right] + left right."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{WIDTH}f32")
    pairs = [(x, y) for x in left for y in right]
    return [builder.call(fma, [x, y, z]) for (x, y), z in zip(pairs, sums, strict=True)]


def _across(builder, vectors):
    """A vector of the sums of each of WIDTH vectors: two at a time become one, which has half of either's numbers."""
    apart = 1  # what both have summed already is that far from each other
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors, apart = [_halves(builder, x, y, apart) for x, y in pairs], 2 * apart
    return vectors[0]


def _halves(builder, x, y, apart):
    def mixed(flip: int) -> ir.Value:
        lanes = [(lane ^ flip) + (WIDTH if lane & apart else 0) for lane in range(WIDTH)]
        return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, WIDTH), lanes))

    return builder.fadd(mixed(0), mixed(apart))


def _places(builder, rows, vectors, c, c_row):
    starts = [(builder.mul(_number(i), c_row), _number(j * WIDTH)) for i in range(rows) for j in range(vectors)]
    return [_at(builder, c, builder.add(row, column)) for row, column in starts]


def _at(builder, base, index, kind=_VECTOR):
    return builder.inttoptr(builder.add(base, builder.mul(index, _number(4))), kind.as_pointer())


def _load(builder, base, index):
    return builder.load(_at(builder, base, index), align=4)


def _everywhere(builder, base, index):
    """A vector of one number."""
    nothing, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH)
    x = builder.load(_at(builder, base, index, _F32), align=4)
    return builder.shuffle_vector(builder.insert_element(nothing, x, ir.Constant(_I32, 0)), nothing, first)


def _fetch(builder, base, index):
    """Brings what lies at a place into the cache; nothing happens where there is no memory."""
    place = _at(builder, base, index, _I8)
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    to_read, for_long, as_data = (ir.Constant(_I32, n) for n in (0, 3, 1))
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [place, to_read, for_long, as_data])
