"""Products of float32 matrices, which are given as tiles.py says."""

import numpy as np

from ambijax.model.compiled.calls import address_of, alive, clear, compiled, floats
from ambijax.model.compiled.tiles import BROAD, FEW, LONG, WIDTH, dots_tile, tile

CHUNK = 120  # rows of an item of `product`, a multiple of its tiles'
COLUMNS = 4 * WIDTH  # of an item of `over_rows`
_TOGETHER = 32  # rows of `over_rows` whose sum is made at once


def _band(rows: int, vectors: int, ahead: str = ""):
    """C [m, vectors x WIDTH] += A [m, k] B [k, vectors x WIDTH], k > 0."""
    many, one = tile(rows, vectors, ahead), tile(1, vectors, ahead)

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


_broad, _narrow = _band(6, BROAD), _band(6, 1)
_two_ahead, _one_ahead = _band(10 if LONG else 6, 2, ahead="a"), _band(12, 1, ahead="a")
_sum_broad, _sum_narrow = _band(4, BROAD, ahead="b"), _band(4, 1, ahead="b")
_dots = dots_tile(FEW)


@compiled
def add_product(m, n, k, a, a_row, a_column, b, b_row, c, c_row):
    """C [m, n] += A [m, k] B [k, n]; n a multiple of WIDTH."""
    j = 0
    while k > 0 and n - j >= BROAD * WIDTH:
        _broad(m, k, a, a_row, a_column, b + 4 * j, b_row, c + 4 * j, c_row)
        j += BROAD * WIDTH
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
        while count - j >= BROAD * WIDTH:
            _sum_broad(r, k, y, 1, r, x + 4 * j, d, to + 4 * j, COLUMNS)
            j += BROAD * WIDTH
        while j < count:
            _sum_narrow(r, k, y, 1, r, x + 4 * j, d, to + 4 * j, COLUMNS)
            j += WIDTH
        totals += sums
    out = floats(z[16] + 4 * first, r, d)
    for i in range(r):
        for c in range(count):
            out[i, c] = totals[i, c]
    alive(sums)
