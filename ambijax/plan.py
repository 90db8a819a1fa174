"""Does it fit, and how fast can it go? Every program of a run, compiled ahead of time for chips you need not have.

    python -m ambijax.plan --config configs/grpoz.py --topology v5e:2x4
    python -m ambijax.plan --config configs/grpoz.py --topology v5e:2x4 --sweep       largest batch, K, length that fit
    python -m ambijax.plan --config configs/sft.py configs/grpoz.py --topology v5e:2x4 v6e:2x2 --markdown
    python -m ambijax.plan --config configs/grpoz.py:tiny                             for the devices of this machine

A topology needs libtpu (`pip install 'ambijax[tpu]'`) and no TPU, and the plan needs no weights: of the checkpoint only
config.json is read, and where there is none the published shape of Qwen2-Audio-7B is taken. Memory is what the compiler
reports, time a lower bound: the slowest of arithmetic, memory and interconnect at their peak, the others hidden.
"""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from ambijax import ahead, chips, compilation, cost, errors, planned, programs, rules, settings, workdir
from ambijax.agent import Setting
from ambijax.errors import ConfigError
from ambijax.model import config as model_config

PUBLISHED = {  # Qwen2-Audio-7B-Instruct's config.json, as far as it differs from the defaults of its format
    "model_type": "qwen2_audio",
    "text_config": {"vocab_size": 156032, "intermediate_size": 11008, "rms_norm_eps": 1e-5},
}
TEXT = 96  # prompt tokens beside the audio: the longest prompt of CREMA-D with its instruction has 87
TEXT_MAX = 2**14  # no dialog is longer; XLA ends the process over arrays whose size it cannot count
SWEPT = {"sft": (), "dpo": ("dpo.samples",), "grpo": ("grpo.samples",), "grpoz": ("grpo.samples",)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration on a set of devices."""

    config: FrozenConfigDict
    name: str  # of the config file
    topology: str  # '' = the devices at hand
    window: int  # mel frames
    text: int  # prompt tokens beside the audio
    cache: Path
    only: tuple[str, ...] = ()  # names of programs; () = all


def run(case: Case) -> dict:
    """Compiles every program of a case, or reads what an earlier call found.

    Returns:
      JSON-ready: {"about": ..., "programs": [...]}, see `planned`.

    Raises:
      ConfigError: the mesh does not fit, the topology is unknown, libtpu is missing.
    """
    setting, about = _prepared(case)
    with jax.set_mesh(setting.mesh):
        found = [measure(case, setting, p) for p in _programs(case, setting)]
    return {"about": about, "programs": found}


def _programs(case: Case, setting: Setting) -> list[programs.Program]:
    every = list(programs.programs(setting, case.window, case.text))
    if case.only and not {p.name for p in every} & set(case.only):
        raise ConfigError(f"{case.name} has no {' and no '.join(case.only)}; it has {', '.join(p.name for p in every)}")
    return [p for p in every if p.name in (case.only or [p.name])]


def _prepared(case: Case) -> tuple[Setting, dict]:
    """A case's setting, and what a plan says about it."""
    devices = ahead.devices(case.topology)
    shape, model = _shape(case.config.model.checkpoint)
    setting = programs.setting(case.config, shape, devices)
    chip = chips.find(devices[0].device_kind)
    about = {
        "config": case.name,
        "topology": case.topology or "this machine",
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "chip": dataclasses.asdict(chip) if chip else None,
        "mesh": dict(setting.mesh.shape),
        "model": model,
        "seconds_of_sound": case.window / 100,
        "prompt_tokens": case.window // 4 + case.text,
        "completion_tokens": case.config.data.max_tokens,
        "parts": case.config.optim.accumulate,
        "updates": case.config.grpo.updates if case.config.algorithm in ("grpo", "grpoz") else 1,
    }
    return setting, about


def measure(case: Case, setting: Setting, program: programs.Program) -> dict:
    """What one program needs on a chip; compiled once for everything that its text, devices and versions fix."""
    traced, lowered = _lowered(setting, program)
    parts = (
        lowered.as_text(),
        setting.mesh.devices.flat[0].device_kind,
        str(setting.mesh),
        ahead.versions(),
        compilation.surroundings(),
    )
    key = f"{program.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"
    memory, text = _compiled(case, program.name, case.cache / key)
    found = {
        "name": program.name,
        "prompts": program.prompts,
        "completions": program.completions,
        **{name: sum(programs.bytes_a_device(tree) for tree in trees) for name, trees in _held(program).items()},
        "cache": programs.cache(setting, program) if program.name in ("roll-out", "evaluation") else 0,
        "flops": cost.flops(traced.jaxpr.jaxpr, program.trips) // setting.mesh.size,
        **memory,
    }
    found["model_flops"] = _without_remat(setting, program) // setting.mesh.size or found["flops"]
    if text:
        compiled = cost.Compiled(text)
        found |= {"traffic": compiled.traffic(), "collectives": [dataclasses.asdict(c) for c in compiled.collectives()]}
    return found


def _compiled(case: Case, name: str, path: Path) -> tuple[dict, str]:
    """Memory and text of a compiled program, kept at `path`; see `ahead.compiled`."""
    about, kept = path.with_suffix(".json"), path.with_suffix(".hlo.gz")
    if not about.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        memory, text = ahead.compiled(functools.partial(_lower, case, name), here=not case.topology)
        if text:
            kept.write_bytes(gzip.compress(text.encode(), mtime=0))
        workdir.replace(about, json.dumps(memory) + "\n")  # a file that is there is whole
        print(f"compiled {name} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return json.loads(about.read_text()), gzip.decompress(kept.read_bytes()).decode() if kept.is_file() else ""


def _lower(case: Case, name: str) -> jax.stages.Lowered:
    """A case's program by its name, ready for the compiler."""
    setting, _ = _prepared(case)
    with jax.set_mesh(setting.mesh):
        program = next(p for p in _programs(case, setting) if p.name == name)
        return _lowered(setting, program)[1]


def _lowered(setting: Setting, program: programs.Program) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
    traced = program.function.trace(*program.arguments)
    return traced, traced.lower(lowering_platforms=(setting.mesh.devices.flat[0].platform,))


def _held(program: programs.Program) -> dict[str, list]:
    """What lies in memory while a program runs, by what it is."""
    held = {"weights": [], "adapters": [], "optimizer": [], "batch": []}
    for tree in program.arguments:
        if isinstance(tree, dict):
            held["weights"].append(tree.get("params"))
            held["adapters"].append(tree.get("lora"))
        elif hasattr(tree, "optimizer"):
            held["weights"].append(tree.trained.get("params"))
            held["adapters"].append(tree.trained.get("lora"))
            held["optimizer"].append(tree.optimizer)
        else:
            held["batch"].append(tree)
    for name, tree in program.beside.items():
        held[name].append(tree)
    return held


def _without_remat(setting: Setting, program: programs.Program) -> int:
    """FLOPs of an update that recomputes nothing: what the mathematics needs. 0 for a program without gradients."""
    if program.name != "update":
        return 0
    plain = dataclasses.replace(setting, model=setting.model.clone(remat="everything_saveable"))
    again = programs.update_program(plain, program.arguments)
    return cost.flops(again.function.trace(*again.arguments).jaxpr.jaxpr, 1)


def _shape(checkpoint: str) -> tuple[model_config.Qwen2AudioConfig, str]:
    """The model's shape, and where it is from."""
    if Path(checkpoint).is_dir():
        return model_config.load(checkpoint), str(checkpoint)
    return model_config.from_dict(PUBLISHED), "Qwen2-Audio-7B as published"


def sweep(case: Case, start: dict) -> Iterator[str]:
    """For batch, K and completion length, one at a time: the largest that fits, and what the next larger one lacks.

    Memory is nearly linear in each. So the tightest program is compiled at twice the value, which foretells the last
    doubling that fits; it is compiled there, at the next one, which must not fit, and then halfway between the two
    until they are no more than a quarter apart. Of the others, those are compiled that could fail, see `_most`.

    Args:
      case: the configuration.
      start: what `run` found for it.

    Yields:
      one line a key.
    """
    tightest = min(start["programs"], key=lambda p: planned.spare(p, start["about"]))
    room = planned.spare(tightest, start["about"])
    if room < 0:
        yield f"the configuration itself does not fit: {planned.verdict(tightest, start['about'])}"
        return
    setting, _ = _prepared(case)
    programs_before = {p.name: p for p in _programs(case, setting)}
    before = {p["name"]: (programs_before[p["name"]], p) for p in start["programs"]}
    o = case.config.optim
    unit = o.accumulate * (o.micro_batch or setting.mesh.shape["data"] * setting.mesh.shape["fsdp"])
    for key in ("data.batch_size", *SWEPT[case.config.algorithm], "data.max_tokens"):
        spares = functools.partial(_spares, case, key, before, tightest["name"])
        fits, larger, lacks = _largest(case, key, unit if key == "data.batch_size" else 1, room, spares)
        yield f"{key} up to {fits}: {larger} {lacks}"


def _largest(
    case: Case, key: str, unit: int, room: float, spares: Callable[[int], Iterator[tuple[str, float]]]
) -> tuple[int, int, str]:
    """The largest value of a key that fits, the next one that was tried, and why that will not do.

    Args:
      case, key: what is changed.
      unit: values are multiples of it.
      room: bytes left in the tightest program as configured.
      spares: see `_spares`.
    """
    ends = functools.cache(functools.partial(_ends, key, spares))
    configured = _get(case.config, key)
    growth = room - next(spares(2 * configured))[1]
    fits = configured * 2 ** int(math.log2(1 + room / max(growth, 1)))
    while fits > configured and ends(fits):
        fits //= 2
    fails = 2 * fits
    while not ends(fails):
        fits, fails = fails, 2 * fails
    while fails - fits > fits // 4 and (half := (fails - fits) // 2 // unit * unit):
        fits, fails = (fits, fits + half) if ends(fits + half) else (fits + half, fails)
    return fits, fails, ends(fails)


def _ends(key: str, spares: Callable[[int], Iterator[tuple[str, float]]], value: int) -> str:
    """Why a key's value will not do; '' when it does."""
    if not rules.RULES[key].holds(value):
        return f"is not allowed: {key} must be {rules.RULES[key].what}"
    for name, spare in spares(value):
        if spare < 0:
            return f"needs {-spare / planned.GIB:.1f} GiB more in {name}"
    return ""


def _spares(
    case: Case, key: str, before: dict[str, tuple[programs.Program, dict]], tightest: str, value: int
) -> Iterator[tuple[str, float]]:
    """Bytes left in each program that a key's value could make too large, the tightest first."""
    changed = dataclasses.replace(case, config=_set(case.config, key, value))
    setting, about = _prepared(changed)
    with jax.set_mesh(setting.mesh):
        for program in sorted(_programs(changed, setting), key=lambda p: p.name != tightest):
            same, found = before[program.name]
            fits = _alike(program, same) or _most(found, value / _get(case.config, key)) < about["chip"]["memory"]
            if program.name == tightest or not fits:
                yield program.name, planned.spare(measure(changed, setting, program), about)


def _most(found: dict, times: float) -> float:
    """Bytes a chip, at most, when a key grows: nothing does so faster than attention's scores with the length."""
    held = found["weights"] + found["adapters"] + found["optimizer"]
    return held + (planned.total(found) - held) * times**2


def _alike(a: programs.Program, b: programs.Program) -> bool:
    return (a.trips, a.completions, a.arguments) == (b.trips, b.completions, b.arguments)


def _get(config: FrozenConfigDict, key: str) -> int:
    section, name = key.split(".")
    return config[section][name]


def _set(config: FrozenConfigDict, key: str, value: int) -> FrozenConfigDict:
    section, name = key.split(".")
    changed = ConfigDict(config.to_dict())
    changed[section][name] = value
    return FrozenConfigDict(changed)


def main() -> None:
    args, overrides = _parse()
    results = []
    for file in args.config:
        config, _ = settings.parse([sys.argv[0], f"--config={file}", "--workdir=unused", *overrides])
        window = args.window or max(config.data.windows)
        for topology in args.topology:
            case = Case(config, file, topology, window, args.text, args.cache, tuple(args.only))
            print(f"{file} on {topology or 'this machine'}", file=sys.stderr)
            results.append(run(case))
            if args.sweep:
                if results[-1]["about"]["chip"] is None:
                    raise ConfigError(f"--sweep needs a chip of known memory, not {results[-1]['about']['kind']}")
                results[-1]["sweep"] = list(sweep(case, results[-1]))
    command = " ".join(["python -m ambijax.plan", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version}" for name, version in ahead.versions().items() if version)
    print(planned.markdown(results, command, versions) if args.markdown else planned.text(results))


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m ambijax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", nargs="+", required=True, help="FILE[:VARIANT] ...; --config.KEY=VALUE changes keys"
    )
    parser.add_argument("--topology", nargs="+", default=[""], help="such as v5e:2x4; default: this machine's devices")
    parser.add_argument("--window", type=int, default=0, help="mel frames (10 ms) of the clips; default: the largest")
    parser.add_argument("--text", type=int, default=TEXT, help=f"prompt tokens beside the audio, default {TEXT}")
    parser.add_argument("--only", nargs="+", default=[], choices=list(planned.KEYS), help="programs; default: all")
    parser.add_argument("--sweep", action="store_true", help="the largest batch, K and length that fit")
    parser.add_argument("--markdown", action="store_true", help="print a document instead of plain tables")
    parser.add_argument("--cache", type=Path, default=Path("runs/plan"), help="where compiled figures are kept")
    overrides = [a for a in sys.argv[1:] if a.startswith("--config.")]
    args = parser.parse_args([a for a in sys.argv[1:] if not a.startswith("--config.")])
    if args.window and not rules.RULES["data.windows"].holds([args.window]):
        raise ConfigError(f"--window={args.window} must be an even number of mel frames up to 3000")
    if not 1 <= args.text <= TEXT_MAX:
        raise ConfigError(f"--text={args.text} must be a number of tokens from 1 to {TEXT_MAX}")
    return args, overrides


if __name__ == "__main__":
    errors.run(main)
