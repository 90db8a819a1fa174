"""What a program costs: FLOPs of its jaxpr, memory traffic and collectives of its compiled text.

XLA's own cost analysis counts the body of a loop once. A decoder is a loop over layers, in sampling inside a loop over
tokens, so everything here is multiplied by the trips of the loops around it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from jax.extend.core import Jaxpr

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
SCALAR = 64  # bytes: contexts and counters beside the arrays of an asynchronous operation
BITS = {"pred": 8, "token": 0, "bf16": 16}  # else the digits of the name, as in f32

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.\-]+) = ")
_TRIPS = re.compile(r"known_trip_count\D+(\d+)")


def flops(jaxpr: Jaxpr, trips: int) -> int:
    """Multiplications and additions of all matrix products and convolutions, over all devices.

    Args:
      jaxpr: of the whole program.
      trips: iterations of a `while` loop, whose number only the data know.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, p = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted = math.prod(equation.invars[0].aval.shape[i] for i in p["dimension_numbers"][0][0])
            total += 2 * equation.outvars[0].aval.size * contracted
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[p["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // outputs
        elif name == "cond":
            total += max(flops(branch.jaxpr, trips) for branch in p["branches"])
        else:
            times = {"scan": p.get("length", 1), "while": trips}.get(name, 1)
            total += times * sum(flops(inner, trips) for inner in _inside(p))
    return total


def _inside(parameters: dict) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in parameters.values():
        if hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices, all of its occurrences in a step."""

    kind: str
    count: int
    payload: int  # bytes of the whole arrays, a device
    wire: int  # bytes that leave a device on a ring


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, and for a constant its value

    def called(self, role: str) -> str:
        return re.search(role + r"=%([\w.\-]+)", self.rest).group(1)


class Compiled:
    """The text of a compiled program, `jax.stages.Compiled.as_text()`, as computations of instructions."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[_Instruction]] = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match.group(2), [])
                if match.group(1):
                    self.entry = match.group(2)
            elif match := _INSTRUCTION.match(line):
                current.append(_instruction(match.group(1), line[match.end() :]))

    def collectives(self) -> list[Collective]:
        """What devices exchange in a step, by kind."""
        found: dict[object, tuple[str, int, int, float]] = {}
        for times, i in self._executed(self.entry, 1, into_fusions=True):
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # An asynchronous one is cut in pieces that lie in several fusions and share its channel.
            channel = re.search(r"channel_id=(\d+)", i.rest)
            size = max(_sizes(i.shape), default=0) if i.opcode.endswith("-start") else sum(_sizes(i.shape))
            n = _group(i.rest)
            payload = size * n if kind == "reduce-scatter" else size
            key = channel.group(1) if channel else i.name
            if times > found.get(key, ("", 0))[1]:
                found[key] = kind, times, payload, _on_the_wire(kind, payload, n)
        return [
            Collective(
                kind,
                sum(t for k, t, _, _ in found.values() if k == kind),
                sum(t * p for k, t, p, _ in found.values() if k == kind),
                round(sum(t * w for k, t, _, w in found.values() if k == kind)),
            )
            for kind in COLLECTIVES
            if any(k == kind for k, _, _, _ in found.values())
        ]

    def traffic(self) -> int:
        """Bytes a device reads from and writes to its main memory: operands and results of what is executed."""
        total = 0
        for times, i in self._executed(self.entry, 1, into_fusions=False):
            if i.opcode not in FREE and not i.opcode.endswith("-done"):
                total += times * self._moved(i)
        return total

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(opcode, shape of a result) of every instruction."""
        for instructions in self.computations.values():
            for i in instructions:
                for _, dimensions, _ in _ARRAY.findall(i.shape):
                    yield i.opcode, tuple(int(n) for n in dimensions.split(",") if n)

    def _executed(self, name: str, times: int, *, into_fusions: bool) -> Iterator[tuple[int, _Instruction]]:
        for i in self.computations[name]:
            yield times, i
            inner = []
            if i.opcode == "while":
                inner = [(i.called("body"), self._trips(i)), (i.called("condition"), self._trips(i))]
            elif i.opcode == "conditional":
                names = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", i.rest)
                listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                inner = [(n, 1) for n in names + re.findall(r"%([\w.\-]+)", listed.group(1) if listed else "")]
            elif i.opcode == "call":
                inner = [(i.called("to_apply"), 1)]
            elif i.opcode in ("fusion", "async-start") and into_fusions:
                inner = [(i.called("calls"), 1)]
            for computation, n in inner:
                yield from self._executed(computation, times * n, into_fusions=into_fusions)

    def _trips(self, loop: _Instruction) -> int:
        """The number the condition compares with; for a loop that may end earlier, its limit."""
        if known := _TRIPS.search(loop.rest):
            return int(known.group(1))
        inside = list(self.computations[loop.called("condition")])
        for fused in [i for i in inside if i.opcode == "fusion"]:
            inside += self.computations[fused.called("calls")]
        limits = [i.rest for i in inside if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape)]
        return max((int(limit) for limit in limits if limit.isdigit()), default=1)

    def _moved(self, i: _Instruction) -> int:
        shapes = {other.name: other.shape for other in self._around(i)}
        results = sum(_sizes(i.shape, main_memory=True))
        operands = [sum(_sizes(shapes.get(name, ""), main_memory=True)) for name in i.operands]
        if i.opcode.endswith("-start"):  # of a copy or a slice: one end of it, not the array that is sliced
            return min((size for size in _sizes(i.shape) if size > SCALAR), default=0)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * results
        if i.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if i.opcode != "fusion":
            return results + sum(operands)
        body = self.computations[i.called("calls")]
        parameters = {int(p.rest): p.name for p in body if p.opcode == "parameter"}
        moved = [min(size, self._read(parameters[n], body, size)) for n, size in enumerate(operands)]
        updates = [u for u in body if u.opcode == "dynamic-update-slice"]
        if updates:  # written in place: only the slice moves, not the array around it
            inner = {b.name: b.shape for b in body}
            results = min(results, sum(sum(_sizes(inner[u.operands[1]])) for u in updates))
        return results + sum(moved)

    def _read(self, value: str, body: list[_Instruction], size: int) -> int:
        """Bytes of an operand that a fusion touches: of one that it only slices, the slices."""
        total = 0
        for i in (i for i in body if value in i.operands):
            if i.opcode == "bitcast":
                total += self._read(i.name, body, size)
            elif i.opcode == "fusion":  # one inside another
                inner = self.computations[i.called("calls")]
                names = {int(p.rest): p.name for p in inner if p.opcode == "parameter"}
                taken = [names[n] for n, name in enumerate(i.operands) if name == value]
                total += sum(self._read(name, inner, size) for name in taken)
                if any(_passes(name, inner) for name in taken):
                    total += self._read(i.name, body, size)
            elif i.opcode in ("dynamic-slice", "slice", "gather") and i.operands[0] == value:
                total += sum(_sizes(i.shape))
            elif i.opcode != "dynamic-update-slice" or i.operands[0] != value:
                return size
        return total

    def _around(self, wanted: _Instruction) -> list[_Instruction]:
        if not hasattr(self, "_home"):
            self._home = {id(i): inside for inside in self.computations.values() for i in inside}
        return self._home[id(wanted)]


def _passes(value: str, body: list[_Instruction]) -> bool:
    """Whether a fusion gives an operand back as it is, in another shape: whoever takes its result reads it."""
    shapes = {i.name: i.operands[0] for i in body if i.opcode == "bitcast"}
    name = body[-1].name  # the root
    while name in shapes:
        name = shapes[name]
    return name == value


def _instruction(name: str, text: str) -> _Instruction:
    """'f32[2]{0} add(%a, %b), attributes' taken apart; shapes of tuples have brackets in brackets."""
    end = _closing(text) + 1 if text[0] == "(" else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest) - 1
    inside = rest[:close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    literal = opcode in ("constant", "parameter")
    return _Instruction(name, text[:end], opcode, operands, inside if literal else rest[close + 1 :])


def _closing(text: str) -> int:
    """Where the bracket closes that a text begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _sizes(shape: str, *, main_memory: bool = False) -> list[int]:
    """Bytes of each array in a shape; with `main_memory` only of those that lie there, not in a memory space S(1)."""
    found = []
    for kind, dimensions, layout in _ARRAY.findall(shape):
        if main_memory and "S(" in layout:
            continue
        bits = BITS.get(kind) if kind in BITS else int(re.search(r"\d+", kind).group())
        found.append(math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8)
    return found


def _group(attributes: str) -> int:
    """Devices that take part in a collective together."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match.group(1))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match.group(1).count(",") + 1
    return 2  # collective-permute names pairs


def _on_the_wire(kind: str, payload: int, n: int) -> float:
    """Bytes a device sends on a ring of n, for an array of `payload` bytes."""
    if kind == "collective-permute":
        return payload
    return payload * (n - 1) / n * (2 if kind == "all-reduce" else 1)
