"""Attention. An item is what a key-value head does with a prompt and its sequences.

Scores stay in the cache of the core that makes them, and keys that no query of a block sees are left out.

    B prompts   G sequences of one prompt   T new tokens   S keys of a segment   P prompt tokens   N slots of a sequence
    K key-value heads   R query heads to each   H = K R   D head width

z[8 i] is the address of a call's i-th buffer, z[8 i + 1 + axis] its size, 1 beyond its last axis. Segments' keys are
thought of side by side, each beginning with a whole vector: at `starts`. Of each, `seen` says from where to where.
"""

import math

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from ambijax.model.compiled.calls import address_of, alive, clear, compiled, floats, pointer
from ambijax.model.compiled.products import add_product
from ambijax.model.compiled.tiles import WIDTH, dots_tile

_BLOCK = 36  # queries whose scores are held at once
_MASKED = np.float32(-1e30)
_key_scores = dots_tile(1)
_LOG2E, _LN2 = np.float32(math.log2(math.e)), np.float32(math.log(2))


@intrinsic
def _as_float(typing, bits):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _as_bits(typing, x):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@compiled
def _in_order(bits):
    """A float's bits as a whole number, larger for a larger float, and such a number as bits again."""
    return np.int32(bits ^ (bits >> np.int32(31) & np.int32(0x7FFFFFFF)))


@compiled
def _largest(row):
    """At least _MASKED; NaN if one without its sign is. Whole numbers are compared in vectors, floats are not."""
    top = _in_order(_as_bits(_MASKED))
    for j in range(row.shape[0]):
        top = max(top, _in_order(_as_bits(row[j])))
    return _as_float(_in_order(top))


@compiled
def _exp(x):
    """Of x <= 0, within 2 units of the last place; 0 where that would not be a normal number, NaN of NaN. Made into
    vectors."""
    x = x * _LOG2E
    power = np.floor(max(x, np.float32(-126)) + np.float32(0.5))
    z = (x - power) * _LN2
    y = np.float32(1 / 5040)
    y = y * z + np.float32(1 / 720)
    y = y * z + np.float32(1 / 120)
    y = y * z + np.float32(1 / 24)
    y = y * z + np.float32(1 / 6)
    y = y * z + np.float32(1 / 2)
    y = y * z + np.float32(1)
    y = y * z + np.float32(1)
    y *= _as_float((np.int32(power) + np.int32(127)) << np.int32(23))
    return np.float32(0) if x <= np.float32(-126) else y


@compiled
def _keys(z, i, b, kv, g):
    """Where a head's keys or values of sequence g begin in [B, K, G or 1, S, D]."""
    kv_heads, groups, size, d = z[8 * i + 2], z[8 * i + 3], z[8 * i + 4], z[8 * i + 5]
    return z[8 * i] + 4 * ((b * kv_heads + kv) * groups + g % groups) * size * d


@compiled
def _mask(z, i, b, g, t, rows):
    """Of queries t, ... of sequence g: [rows or 1, S] of a mask [B, G or 1, T or 1, S]."""
    groups, steps, size = z[8 * i + 2], z[8 * i + 3], z[8 * i + 4]
    first = ((b * groups + g % groups) * steps + t % steps) * size
    return carray(pointer(z[8 * i] + first, types.uint8), (min(rows, steps), size))


@compiled
def _starts(z, segments):
    """Where each segment begins, and where the last one ends."""
    starts = np.zeros(segments + 1, np.int64)
    for s in range(segments):
        starts[s + 1] = starts[s] + -(-z[8 * (1 + 3 * s) + 4] // WIDTH) * WIDTH
    return starts


@compiled
def _turn(z, which, segments, starts, b, kv, g, columns):
    """Each segment's keys (`which` = 1) or values (2) by channel, [D, all keys]; shared ones change for g = 0 alone."""
    d = columns.shape[0]
    for s in range(segments):
        i = which + 3 * s
        size = z[8 * i + 4]
        if g > 0 and z[8 * i + 3] == 1:
            continue
        rows = floats(_keys(z, i, b, kv, g), size, d)
        for first in range(0, starts[s + 1] - starts[s], WIDTH):
            count = min(WIDTH, size - first)
            for c in range(d):
                to = columns[c, starts[s] + first : starts[s] + first + WIDTH]
                for j in range(count):
                    to[j] = rows[first + j, c]
                for j in range(count, WIDTH):
                    to[j] = 0


@compiled
def _width(starts):
    """From a row of scores to the next: an odd number of vectors, or rows would meet in a few lines of a cache."""
    return starts[-1] | WIDTH


@compiled
def _look(z, segments, starts, b, g, t, rows, seen):
    """Fills `seen` [segments, 2] in: the first key that any query of a block sees, or a few before it, and the last."""
    for s in range(segments):
        mask = _mask(z, 3 + 3 * s, b, g, t, rows)
        visible = np.zeros(mask.shape[1], np.uint8)
        for i in range(mask.shape[0]):
            for j in range(visible.shape[0]):
                visible[j] |= mask[i, j]
        first, last = 0, visible.shape[0]
        while first < last and not visible[first]:
            first += 1
        while last > first and not visible[last - 1]:
            last -= 1
        seen[s, 0], seen[s, 1] = starts[s] + first // WIDTH * WIDTH, starts[s] + last


@compiled
def _times(rows, x, x_row, columns, seen, y):
    """Y [rows, all keys] = X [rows, D] times `columns` [D, all keys], for the keys that are seen."""
    d, width = columns.shape
    for s in range(seen.shape[0]):
        at, count = seen[s, 0], -(-(seen[s, 1] - seen[s, 0]) // WIDTH) * WIDTH
        for i in range(rows):
            clear(address_of(y) + 4 * (i * width + at), count)
        add_product(rows, count, d, x, x_row, 1, address_of(columns) + 4 * at, width, address_of(y) + 4 * at, width)


@compiled
def _scale_and_mask(z, starts, seen, b, g, t, rows, scale, scores):
    for s in range(seen.shape[0]):
        mask, at, to = _mask(z, 3 + 3 * s, b, g, t, rows), seen[s, 0], seen[s, 1]
        for i in range(rows):
            row, may = scores[i, at:to], mask[i % mask.shape[0], at - starts[s] : to - starts[s]]
            for j in range(row.shape[0]):
                row[j] = row[j] * scale if may[j] else _MASKED


@compiled
def _exp_all(row, top):
    """exp(S - top) in place; returns the sum."""
    total = np.float32(0)
    for j in range(row.shape[0]):
        row[j] = _exp(row[j] - top)
        total += row[j]
    return total


@compiled
def _softmax(row, seen):
    """exp(S - max S) in place; returns the largest score and the sum, which is 1 at least."""
    top, total = _MASKED, np.float32(0)
    for s in range(seen.shape[0]):
        top = max(top, _largest(row[seen[s, 0] : seen[s, 1]]))
    for s in range(seen.shape[0]):
        total += _exp_all(row[seen[s, 0] : seen[s, 1]], top)
    return top, np.float32(1) if total < np.float32(1) else total  # of a query that sees nothing it would be 0


@compiled
def forward(item, z, segments):
    """Buffers: q [B, G, T, H, D]; each segment's k, v [B, K, G or 1, S, D] and mask [B, G or 1, T or 1, S].

    Results: out like q, and the logarithm of each query's sum of exponentials, [B, H, G, T].
    """
    sequences, steps, heads, d, kv_heads = z[2], z[3], z[4], z[5], z[10]
    b, kv, group, n = item // kv_heads, item % kv_heads, heads // kv_heads, 1 + 3 * segments
    scale, starts, seen = np.float32(1 / math.sqrt(d)), _starts(z, segments), np.empty((segments, 2), np.int64)
    width = _width(starts)
    keys, scores = np.empty((d, width), np.float32), np.empty((_BLOCK, width), np.float32)
    sums, totals = np.empty((_BLOCK, d), np.float32), np.empty(_BLOCK, np.float32)
    for g in range(sequences):
        _turn(z, 1, segments, starts, b, kv, g, keys)
        for t in range(0, steps, _BLOCK):
            rows = min(_BLOCK, steps - t)
            _look(z, segments, starts, b, g, t, rows, seen)
            for h in range(kv * group, (kv + 1) * group):
                at = 4 * d * (((b * sequences + g) * steps + t) * heads + h)
                _times(rows, z[0] + at, heads * d, keys, seen, scores)
                _scale_and_mask(z, starts, seen, b, g, t, rows, scale, scores)
                logs = floats(z[8 * (n + 1)] + 4 * (((b * heads + h) * sequences + g) * steps + t), 1, rows)
                for i in range(rows):
                    top, totals[i] = _softmax(scores[i], seen)
                    logs[0, i] = top + np.log(totals[i])
                clear(address_of(sums), rows * d)
                for s in range(segments):
                    low, count = seen[s, 0], seen[s, 1] - seen[s, 0]
                    values = _keys(z, 2 + 3 * s, b, kv, g) + 4 * (low - starts[s]) * d
                    add_product(rows, d, count, address_of(scores) + 4 * low, width, 1, values, d, address_of(sums), d)
                out = floats(z[8 * n] + at, rows, heads * d)
                for i in range(rows):
                    for c in range(d):
                        out[i, c] = sums[i, c] / totals[i]
    alive(keys, scores, sums)


@compiled
def backward(item, z, segments):
    """Buffers: those of `forward`, its results, and the gradient by out. Results: by q, by each segment's k and v.

    With P = softmax(S), S = Q K^T, O = P V:  dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q.
    """
    sequences, steps, heads, d, kv_heads = z[2], z[3], z[4], z[5], z[10]
    b, kv, group, n = item // kv_heads, item % kv_heads, heads // kv_heads, 1 + 3 * segments
    scale, starts, seen = np.float32(1 / math.sqrt(d)), _starts(z, segments), np.empty((segments, 2), np.int64)
    width, row = _width(starts), heads * d
    keys, values = np.empty((d, width), np.float32), np.empty((d, width), np.float32)
    weights, by_scores = np.empty((_BLOCK, width), np.float32), np.empty((_BLOCK, width), np.float32)
    for g in range(sequences):
        _turn(z, 1, segments, starts, b, kv, g, keys)
        _turn(z, 2, segments, starts, b, kv, g, values)
        for s in range(segments):
            if g == 0 or z[8 * (1 + 3 * s) + 3] > 1:
                for i in (n + 4 + 2 * s, n + 5 + 2 * s):
                    clear(_keys(z, i, b, kv, g), z[8 * i + 4] * d)
        for t in range(0, steps, _BLOCK):
            rows = min(_BLOCK, steps - t)
            _look(z, segments, starts, b, g, t, rows, seen)
            for h in range(kv * group, (kv + 1) * group):
                at = 4 * d * (((b * sequences + g) * steps + t) * heads + h)
                q, by_out, by_q = z[0] + at, z[8 * (n + 2)] + at, z[8 * (n + 3)] + at
                logs = floats(z[8 * (n + 1)] + 4 * (((b * heads + h) * sequences + g) * steps + t), 1, rows)[0]
                _times(rows, q, row, keys, seen, weights)
                _scale_and_mask(z, starts, seen, b, g, t, rows, scale, weights)
                _times(rows, by_out, row, values, seen, by_scores)
                outs, by_outs = floats(z[8 * n] + at, rows, row), floats(by_out, rows, row)
                for i in range(rows):
                    clear(by_q + 4 * i * row, d)
                    _by_scores(outs[i, :d], by_outs[i, :d], logs[i], scale, seen, weights[i], by_scores[i])
                for s in range(segments):
                    low, count = seen[s, 0], seen[s, 1] - seen[s, 0]
                    p, y = address_of(weights) + 4 * low, address_of(by_scores) + 4 * low
                    skip = 4 * (low - starts[s]) * d
                    k, by_k = _keys(z, 1 + 3 * s, b, kv, g) + skip, _keys(z, n + 4 + 2 * s, b, kv, g) + skip
                    by_v = _keys(z, n + 5 + 2 * s, b, kv, g) + skip
                    add_product(rows, d, count, y, width, 1, k, d, by_q, row)
                    add_product(count, d, rows, y, 1, width, q, row, by_k, d)
                    add_product(count, d, rows, p, 1, width, by_out, row, by_v, d)
    alive(keys, values, weights, by_scores)


@compiled
def _by_scores(out, by_out, log, scale, seen, weights, by_scores):
    """Of a query: scores to weights and gradients by weights to those by scores, in place."""
    center = np.float32(0)
    for c in range(out.shape[0]):
        center += by_out[c] * out[c]
    for s in range(seen.shape[0]):
        p, y = weights[seen[s, 0] : seen[s, 1]], by_scores[seen[s, 0] : seen[s, 1]]
        for j in range(p.shape[0]):
            p[j] = _exp(p[j] - log)
            y[j] = p[j] * (y[j] - center) * scale


@compiled
def decode(item, z):
    """One new token of every sequence. Buffers: qkv [K, R + 2, D, B, G], not rotated; cos and sin [B, D / 2]; of the
    prompt keys by channel [B, K, D, P], values [B, K, P, D] and mask [B, P]; own keys and values [B, K, G, N, D]; slot.

    Results: out [K, R, D, B, G]; own keys and values with the new token, in the same memory.
    """
    kv_heads, group, d, batch, sequences, size, slots = z[1], z[2] - 2, z[3], z[4], z[5], z[28], z[52]
    slot = carray(pointer(z[64], types.int32), (1,))[0]
    b, kv, rows = item // kv_heads, item % kv_heads, group * sequences
    new = floats(z[0] + 4 * kv * (group + 2) * d * batch * sequences, (group + 2) * d, batch * sequences)
    cos, sin = floats(z[8], batch, d // 2)[b], floats(z[16], batch, d // 2)[b]
    k_at, v_at = z[24] + 4 * item * d * size, z[32] + 4 * item * d * size
    exists = carray(pointer(z[40] + b * size, types.uint8), (size,))
    q, sums, totals = np.empty((rows, d), np.float32), np.zeros((rows, d), np.float32), np.empty(rows, np.float32)
    weights, own = np.zeros((rows, size), np.float32), np.empty(slot + 1, np.float32)
    for g in range(sequences):
        place = 4 * (item * sequences + g) * slots * d
        own_k, own_v = floats(z[80] + place, slots, d), floats(z[88] + place, slots, d)
        for r in range(group):
            _rotate(new, r * d, b * sequences + g, cos, sin, np.float32(1 / math.sqrt(d)), q[r * sequences + g])
        _rotate(new, group * d, b * sequences + g, cos, sin, np.float32(1), own_k[slot])
        for c in range(d):
            own_v[slot, c] = new[(group + 1) * d + c, b * sequences + g]
    add_product(rows, size // WIDTH * WIDTH, d, address_of(q), d, 1, k_at, size, address_of(weights), size)
    for i in range(rows):
        place, row = 4 * (item * sequences + i % sequences) * slots * d, weights[i]
        top = _prompt_scores(q[i], floats(k_at, d, size), exists, row)
        top = max(top, _own_scores(q[i], floats(z[80] + place, slots, d), own))
        totals[i] = _exp_all(row, top) + _exp_all(own, top)
        add_product(1, d, slot + 1, address_of(own), slot + 1, 1, z[88] + place, d, address_of(sums) + 4 * i * d, d)
    add_product(rows, d, size, address_of(weights), size, 1, v_at, d, address_of(sums), d)
    out = floats(z[72] + 4 * kv * group * d * batch * sequences, group * d, batch * sequences)
    for i in range(rows):
        for c in range(d):
            out[i // sequences * d + c, b * sequences + i % sequences] = sums[i, c] / totals[i]
    alive(q, sums, weights, own)


@compiled
def _rotate(new, first, column, cos, sin, scale, to):
    """`layers.rope` of the head [D] that begins at a row, times a number."""
    half = cos.shape[0]
    for c in range(half):
        low, high = new[first + c, column], new[first + c + half, column]
        to[c] = (low * cos[c] - high * sin[c]) * scale
        to[c + half] = (high * cos[c] + low * sin[c]) * scale


@compiled
def _prompt_scores(q, keys, exists, scores):
    """Masks the scores, makes those that are no whole vector, and returns the largest."""
    size = scores.shape[0]
    for j in range(size // WIDTH * WIDTH, size):
        for c in range(q.shape[0]):
            scores[j] += q[c] * keys[c, j]
    for j in range(size):
        scores[j] = scores[j] if exists[j] else _MASKED
    return _largest(scores)


@compiled
def _own_scores(q, keys, scores):
    """Of a sequence's own keys, one after another as they lie in memory; returns the largest."""
    size, d = scores.shape[0], q.shape[0]
    whole = size // WIDTH * WIDTH
    for j in range(0, whole, WIDTH):
        _key_scores(address_of(keys) + 4 * j * d, d, address_of(q), address_of(scores) + 4 * j, d)
    for j in range(whole, size):
        scores[j] = 0
        for c in range(d):
            scores[j] += keys[j, c] * q[c]
    return _largest(scores)
