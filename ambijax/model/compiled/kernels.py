"""The kernels there are. Importing this compiles them, once on a machine."""

from collections.abc import Callable

from ambijax.model.compiled import attention, calls, products, tiles

FORWARD, BACKWARD, DECODE, PRODUCT, DOTS, OVER_ROWS = range(6)
CHUNK, COLUMNS, FEW = products.CHUNK, products.COLUMNS, tiles.FEW
call = calls.call


def _work(key: int) -> Callable:
    def work(record):
        """What each thread does in a call."""
        key  # noqa: B018  numba keeps machine code under it
        kind, buffers, segments = calls.begin(record)
        item = calls.take(record)
        while item >= 0:
            if kind == FORWARD:
                attention.forward(item, buffers, segments)
            elif kind == BACKWARD:
                attention.backward(item, buffers, segments)
            elif kind == DECODE:
                attention.decode(item, buffers)
            elif kind == PRODUCT:
                products.product(item, buffers)
            elif kind == DOTS:
                products.dots(item, buffers)
            else:
                products.over_rows(item, buffers)
            item = calls.take(record)
        calls.leave(record)
        return 0

    return work


calls.register(_work)
