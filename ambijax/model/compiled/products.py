"""Products of float32 matrices in tiles that stay in registers.

A matrix is given by the address of its first number and by how many numbers lie between its rows, so that any part of
an array is one, and a transposed one too.
"""

import functools

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ambijax.model.compiled.calls import address_of, alive, clear, compiled, floats

_LONG = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
WIDTH = 16 if _LONG else 8  # numbers in a vector
CHUNK = 120  # rows of an item of `product`, a multiple of its tiles'
COLUMNS = 4 * WIDTH  # of an item of `over_rows`
FEW = 8  # columns of `dots`
_LATER = 8  # rows until a row is needed that is brought in now
_TOGETHER = 32  # rows of `over_rows` whose sum is made at once

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, WIDTH)


def _tile(rows: int, vectors: int, ahead: str):
    """C += A B for C [rows, vectors x WIDTH]; `ahead` brings in the next rows of "a" or a later row of "b"."""

    @intrinsic
    def tile(typing, a, a_row, a_column, b, b_row, c, c_row, k):
        def generate(context, builder, signature, args):
            _write_tile(builder, rows, vectors, ahead, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


def _write_tile(builder, rows, vectors, ahead, a, a_row, a_column, b, b_row, c, c_row, k):
    add, times, number = builder.add, builder.mul, functools.partial(ir.Constant, _I64)
    places = [(i, j * WIDTH) for i in range(rows) for j in range(vectors)]

    def at(base: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
        return builder.inttoptr(add(base, times(index, number(4))), kind.as_pointer())

    def load(base: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
        return builder.load(at(base, index, kind), align=4)

    targets = [at(c, add(times(number(i), c_row), number(j)), _VECTOR) for i, j in places]
    start, before = [builder.load(target, align=4) for target in targets], builder.block
    loop, after = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)

    builder.position_at_end(loop)
    step, sums = builder.phi(_I64), [builder.phi(_VECTOR) for _ in places]
    if ahead == "a":  # as they follow these: a line at every step brings all of them in
        _fetch(builder, at(a, times(number(rows), add(a_row, step)), ir.IntType(8)))
    if ahead == "b":
        later = times(add(step, number(_LATER)), b_row)
        for j in range(0, vectors * WIDTH, 16):
            _fetch(builder, at(b, add(later, number(j)), ir.IntType(8)))
    right = [load(b, add(times(step, b_row), number(j * WIDTH)), _VECTOR) for j in range(vectors)]
    left = [load(a, add(times(number(i), a_row), times(step, a_column)), _F32) for i in range(rows)]
    left = [_everywhere(builder, x) for x in left]
    new = [_multiply_add(builder, left[i], right[j // WIDTH], x) for (i, j), x in zip(places, sums, strict=True)]
    following = add(step, number(1))
    for phi, first, later in zip([step, *sums], [number(0), *start], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    builder.cbranch(builder.icmp_signed("<", following, k), loop, after)

    builder.position_at_end(after)
    for target, x in zip(targets, new, strict=True):
        builder.store(x, target, align=4)


@intrinsic
def _dots(typing, a, a_row, b, c, k):
    """C = A B^T for C [WIDTH / FEW, FEW], as many numbers as a vector has, and k a multiple of WIDTH.

    Vectors go along k, so that nothing is lost on columns which do not fill one. Brings in the rows that follow A's.
    """

    def generate(context, builder, signature, args):
        _write_dots(builder, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _write_dots(builder, a, a_row, b, c, k):
    add, times, number = builder.add, builder.mul, functools.partial(ir.Constant, _I64)
    rows = [times(number(i), a_row) for i in range(WIDTH // FEW)]
    following = times(number(len(rows)), a_row)

    def at(base: ir.Value, index: ir.Value, kind: ir.Type = _VECTOR) -> ir.Value:
        return builder.inttoptr(add(base, times(index, number(4))), kind.as_pointer())

    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)

    builder.position_at_end(loop)
    step, sums = builder.phi(_I64), [builder.phi(_VECTOR) for _ in range(WIDTH)]
    for row in rows:
        _fetch(builder, at(a, add(add(row, following), step), ir.IntType(8)))
    left = [builder.load(at(a, add(row, step)), align=4) for row in rows]
    right = [builder.load(at(b, add(times(number(j), k), step)), align=4) for j in range(FEW)]
    new = [_multiply_add(builder, left[i // FEW], right[i % FEW], x) for i, x in enumerate(sums)]
    later = add(step, number(WIDTH))
    for phi, first, last in zip([step, *sums], [number(0)] + [_zeros()] * WIDTH, [later, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, loop)
    builder.cbranch(builder.icmp_signed("<", later, k), loop, after)

    builder.position_at_end(after)
    builder.store(_sums(builder, new), at(c, number(0)), align=4)


def _zeros():
    return ir.Constant(_VECTOR, [0.0] * WIDTH)


def _sums(builder, vectors):
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


def _multiply_add(builder, x, y, z):
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{WIDTH}f32"), [x, y, z])


def _everywhere(builder, x):
    """A vector of one number."""
    nothing, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(builder.insert_element(nothing, x, ir.Constant(_I32, 0)), nothing, first)


def _fetch(builder, place):
    """Brings what lies at a place into the cache; nothing happens where there is no memory."""
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    to_read, for_long, as_data = (ir.Constant(_I32, n) for n in (0, 3, 1))
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [place, to_read, for_long, as_data])


def _band(rows: int, vectors: int, ahead: str = ""):
    """C [m, vectors x WIDTH] += A [m, k] B [k, vectors x WIDTH], k > 0."""
    many, one = _tile(rows, vectors, ahead), _tile(1, vectors, ahead)

    @compiled
    def band(m, k, a, a_row, a_column, b, b_row, c, c_row):
        i = 0
        while m - i >= rows:
            many(a + 4 * i * a_row, a_row, a_column, b, b_row, c + 4 * i * c_row, c_row, k)
            i += rows
        while i < m:
            one(a + 4 * i * a_row, a_row, a_column, b, b_row, c + 4 * i * c_row, c_row, k)
            i += 1

    return band


# Tiles take most of the 32 or 16 registers there are, and leave some for A and B.
_BROAD = 4 if _LONG else 2
_broad, _narrow = _band(6, _BROAD), _band(6, 1)
_two_ahead, _one_ahead = _band(10 if _LONG else 6, 2, ahead="a"), _band(12, 1, ahead="a")
_sum_broad, _sum_narrow = _band(4, _BROAD, ahead="b"), _band(4, 1, ahead="b")


@compiled
def add_product(m, n, k, a, a_row, a_column, b, b_row, c, c_row):
    """C [m, n] += A [m, k] B [k, n]; n a multiple of WIDTH."""
    j = 0
    while k > 0 and n - j >= _BROAD * WIDTH:
        _broad(m, k, a, a_row, a_column, b + 4 * j, b_row, c + 4 * j, c_row)
        j += _BROAD * WIDTH
    while k > 0 and j < n:
        _narrow(m, k, a, a_row, a_column, b + 4 * j, b_row, c + 4 * j, c_row)
        j += WIDTH


@compiled
def product(item, z):
    """CHUNK rows of W X. Buffers: W [N, D or more], X [D, a multiple of WIDTH]. Result: [N, as X].

    With few columns most of the time is that of bringing W in, and what a core fetches unasked ends with each row.
    """
    n, stride, k, columns = z[1], z[2], z[9], z[10]
    first, m = item * CHUNK, min(CHUNK, n - item * CHUNK)
    w, x, y = z[0] + 4 * first * stride, z[8], z[16] + 4 * first * columns
    clear(y, m * columns)
    j = 0
    while columns - j >= 2 * WIDTH:
        _two_ahead(m, k, w, stride, 1, x + 4 * j, columns, y + 4 * j, columns)
        j += 2 * WIDTH
    if j < columns:
        _one_ahead(m, k, w, stride, 1, x + 4 * j, columns, y + 4 * j, columns)


@compiled
def dots(item, z):
    """CHUNK rows of W X^T. Buffers: W [N, D], N even, and X [FEW, D], D a multiple of WIDTH. Result: [N, FEW]."""
    n, k = z[1], z[2]
    first = item * CHUNK
    for i in range(first, min(n, first + CHUNK), WIDTH // FEW):
        _dots(z[0] + 4 * i * k, k, z[8], z[16] + 4 * i * FEW, k)


@compiled
def over_rows(item, z):
    """COLUMNS of Y^T X, sums over many rows. Buffers: Y [N, r], X [N, D], D a multiple of WIDTH. Result: [r, D].

    Some rows at a time, whose sums are then added: one sum after another would round more the more rows there are.
    """
    n, r, d = z[1], z[2], z[10]
    first, count = item * COLUMNS, min(COLUMNS, d - item * COLUMNS)
    totals, sums = np.zeros((r, COLUMNS), np.float32), np.empty((r, COLUMNS), np.float32)
    to = address_of(sums)
    for row in range(0, n, _TOGETHER):
        clear(to, r * COLUMNS)
        y, x, k = z[0] + 4 * row * r, z[8] + 4 * (row * d + first), min(_TOGETHER, n - row)
        j = 0
        while count - j >= _BROAD * WIDTH:
            _sum_broad(r, k, y, 1, r, x + 4 * j, d, to + 4 * j, COLUMNS)
            j += _BROAD * WIDTH
        while j < count:
            _sum_narrow(r, k, y, 1, r, x + 4 * j, d, to + 4 * j, COLUMNS)
            j += WIDTH
        totals += sums
    out = floats(z[16] + 4 * first, r, d)
    for i in range(r):
        for c in range(count):
            out[i, c] = totals[i, c]
    alive(sums)
