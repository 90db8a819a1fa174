"""Accelerators as their makers describe them, and the least time a program can take on one: its roofline.

Memory is what programs can use: the TPU compiler's message about a program that is too large names it, and it is a
little less than the nominal 16, 32 and 95 GB. Interconnect is what one chip sends and receives, over all links.
"""

import dataclasses

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip."""

    name: str
    memory: int  # bytes
    flops: float  # bf16, dense, a second
    bandwidth: float  # of main memory, bytes a second
    interconnect: float  # to other chips, bytes a second


# jax's device_kind begins with the key. The longest one that fits counts.
CHIPS = {
    "TPU v5 lite": Chip("v5e", int(15.75 * GIB), 197e12, 819 * GB, 200 * GB),
    "TPU v5": Chip("v5p", int(95.74 * GIB), 459e12, 2765 * GB, 600 * GB),
    "TPU v6 lite": Chip("v6e", int(31.25 * GIB), 918e12, 1640 * GB, 448 * GB),
    "NVIDIA A100-PCIE-40GB": Chip("A100 40GB", 40 * GB, 312e12, 1555 * GB, 300 * GB),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 40 * GB, 312e12, 1555 * GB, 300 * GB),
    "NVIDIA A100": Chip("A100", 80 * GB, 312e12, 2039 * GB, 300 * GB),
    "NVIDIA H100": Chip("H100", 80 * GB, 989e12, 3350 * GB, 450 * GB),
    "NVIDIA H200": Chip("H200", 141 * GB, 989e12, 4800 * GB, 450 * GB),
}


def find(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None for one that is not in the table, such as a CPU."""
    names = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource of a chip needs alone; with perfect overlap the largest is the time of the step."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """Which of them it is."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, *, flops: float, traffic: float, wire: float) -> Roofline:
    """The least time of a step from what one chip does in it: FLOPs, bytes of its memory, bytes to its neighbours."""
    return Roofline(flops / chip.flops, traffic / chip.bandwidth, wire / chip.interconnect)
