"""Results of benchmarks/compare.py as lines and as a Markdown page."""

import math

from benchmarks import shapes
from benchmarks.shapes import SQUARES, Shape, matrix_size, read_size

TITLES = {
    "matrix": "eight matrix products (the device's rate)",
    "products": "GRPOz' products with frozen weights, but for decoding",
    "attention": "GRPOz' attention of completions, but for decoding",
    "token": "a roll-out's products with frozen weights, a token at a time",
    "read": "reading memory (the device's bandwidth)",
    "logits": "all logits of 8 tokens in float32 (are they the same?)",
    "features": "log-mel",
    "tower": "audio tower and projector",
    "readout": "read-out without chain of thought, from log-mel",
    "sft": "LoRA SFT step",
    "sft_live": "LoRA SFT step, ours with the tower computed in every step",
    "sft_mixed": "LoRA SFT step, twice the clips, of 40 to 100 % of the length; ours packed",
    "sft_mixed_padded": "the same, ours padded",
    "dpo": "LoRA DPO step, pairs given",
    "rollout": "roll-out",
    "grpoz": "GRPOz step",
}
PER_STEP = {  # unit, and how many of it a step makes
    "features": ("clips/s", lambda s: s.feature_clips),
    "tower": ("clips/s", lambda s: s.clips),
    "readout": ("clips/s", lambda s: s.readout_clips),
    "sft": ("tokens/s", lambda s: s.clips * (s.prompt + s.completion)),
    "sft_live": ("tokens/s", lambda s: s.clips * (s.prompt + s.completion)),
    "sft_mixed": ("clips/s", lambda s: 2 * s.clips),
    "sft_mixed_padded": ("clips/s", lambda s: 2 * s.clips),
    "dpo": ("pairs/s", lambda s: s.clips),
    "rollout": ("tokens/s", lambda s: s.clips * s.samples * s.new_tokens),
    "grpoz": ("prompts/s", lambda s: s.clips),
}


def line(result: dict) -> str:
    """One row for the terminal."""
    ours, theirs, ratio = result["ours"], result["reference"], result["ratio"]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in ours["parts"].items())
    return (
        f"{result['row']:<9} {result['change'] or ''} ours {ours['median']:.3f} s  theirs {theirs['median']:.3f} s  "
        f"ratio {ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}] of {ratio['pairs']}  {parts}"
    )


def markdown(preset: str, results: list[dict]) -> str:
    """All results of a preset, a section for each machine, where those of the preset itself come first."""
    text = (
        f"# ambijax against transformers + PEFT, preset {preset}\n\n"
        f"`python benchmarks/compare.py --preset {preset}`; what is compared is in [README.md](README.md). "
        f"Commits are in `{preset}.json`.\n"
    )
    for device in sorted(set(map(machine, results))):
        text += _section(device, [r for r in results if machine(r) == device])
    return text


def machine(result: dict) -> str:
    """What a result was measured on."""
    about = result["hardware"]
    return about["gpu"] or f"{about['cores']} cores of {about['cpu']}"


def _section(device: str, results: list[dict]) -> str:
    about = results[-1]["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    plain = [r for r in results if not r["change"]]
    changed = sorted((r for r in results if r["change"]), key=lambda r: (r["row"], str(r["change"])))
    text = f"\n## {device}\n\nPython {about['python']}; {versions}.\n"
    if plain:
        text += "\n" + _table(plain) + _split(plain) + _limits(plain)
    if changed:
        text += "\n### Other shapes\n\n" + _table(changed)
    return text + _grpoz_limits(plain + changed)


def _table(results: list[dict]) -> str:
    rows = [
        "| | ours | theirs | ratio [p10, p90] | peak memory, ours / theirs | compiled |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        shape, ours, theirs, ratio = Shape(**r["shape"]), r["ours"], r["reference"], r["ratio"]
        change = ", ".join(f"{name} {value}" for name, value in r["change"].items())
        kept = ", what the roll-out computed kept" if r["row"] == "grpoz" and shape.keep_activations else ""
        title = TITLES[r["row"]] + kept + (f" ({change})" if change else "")
        unit, count = PER_STEP.get(r["row"], ("", None))
        speeds = [
            f"{x['median']:.3f} s" + (f" = {count(shape) / x['median']:.4g} {unit}" if count else "")
            for x in (ours, theirs)
        ]
        memory = " / ".join(f"{(x['device_bytes'] or x['host_bytes']) / 2**30:.2f}" for x in (ours, theirs))
        made = f"{ours['compiles']} in {ours['compile_seconds']:.1f} s, then {ours['late_compiles']}"
        span = f"**{ratio['median']:.2f}**, one pair"
        if ratio["pairs"] > 1:
            span = f"**{ratio['median']:.2f}** [{ratio['p10']:.2f}, {ratio['p90']:.2f}], {ratio['pairs']} pairs"
        rows.append(f"| {title} | {speeds[0]} | {speeds[1]} | {span} | {memory} GiB | {made} |")
    return "\n".join(rows) + "\n"


def _split(results: list[dict]) -> str:
    """Where a step goes, for the rows that have parts."""
    text = ""
    for r in results:
        for side in ("ours", "reference"):
            if parts := r[side]["parts"]:
                spelled = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items())
                text += f"\n{TITLES[r['row']]}, {side}: {spelled}.\n"
    return text


def _limits(plain: list[dict]) -> str:
    """Distance from the device: matrix rate for training, bandwidth for sampling."""
    by_row = {r["row"]: r for r in plain}
    rate, bandwidth = _rate(by_row), _bandwidth(by_row)
    text = ""
    if rate and "sft" in by_row:
        for side in ("ours", "reference"):
            shape, seconds = Shape(**by_row["sft"]["shape"]), by_row["sft"][side]["median"]
            tokens = shape.clips * (shape.prompt + shape.completion)
            share = 4 * shape.matrix_parameters * tokens / seconds / rate
            text += (
                f"\nSFT, {side}: {tokens} real tokens x 4 N (N = {shape.matrix_parameters / 1e6:.1f} M, without "
                f"recomputation) at {100 * share:.0f} % of the measured {rate / 1e12:.3g} TFLOP/s.\n"
            )
    if bandwidth and "rollout" in by_row:
        limit = sum(_bytes_of_decoding(Shape(**by_row["rollout"]["shape"]))) / bandwidth
        taken = by_row["rollout"]["ours"]["parts"]["decode"]
        text += (
            f"\nDecoding: weights and written cache, read once a token at the measured {bandwidth / 1e9:.0f} GB/s, "
            f"would take {limit:.2f} s; it took {taken:.2f} s ({100 * limit / taken:.0f} %).\n"
        )
    return text


def _grpoz_limits(results: list[dict]) -> str:
    """How long GRPOz takes at the device's rates, in every shape that was measured; '' where the rates were not."""
    by_row = {r["row"]: r for r in results if not r["change"]}
    kept = lambda r: (str(r["change"]), Shape(**r["shape"]).keep_activations)  # noqa: E731
    alone = {(r["row"], *kept(r)): _faster(r) for r in results if r["row"] in ("products", "attention", "token")}
    steps = [r for r in results if r["row"] == "grpoz"]
    rate, bandwidth = _rate(by_row), _bandwidth(by_row)
    if not steps or not rate or not bandwidth:
        return ""
    rows = [
        "| GRPOz step | products in pre-fill, score, update | attention in score, update | decoding | together | "
        "of our step | ratio it would have |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in steps:
        shape = Shape(**r["shape"])
        sampled = shape.clips * shape.samples * shape.new_tokens
        operations = {
            "products": sum(2 * math.prod(size) * n for size, n in shapes.products(shape).items()),
            "attention": shapes.attention(shape),
        }
        seconds = {row: alone.get((row, *kept(r)), count / rate) for row, count in operations.items()}
        weights, cache = (z / bandwidth for z in _bytes_of_decoding(shape))
        token = alone.get(("token", *kept(r)))
        decoding = token + cache if token else max(weights + cache, 2 * shape.matrix_parameters * sampled / rate)
        limit = sum(seconds.values()) + decoding
        change = ", ".join(f"{name} {value}" for name, value in r["change"].items()) or "as in the preset"
        share, ratio = 100 * limit / r["ours"]["median"], r["reference"]["median"] / limit
        spelled = [f"{s:.2f} s{' alone' * ((row, *kept(r)) in alone)}" for row, s in seconds.items()]
        spelled.append(f"{decoding:.2f} s{' alone' * bool(token)}")
        rows.append(f"| {change} | {' | '.join(spelled)} | {limit:.2f} s | {share:.0f} % | {ratio:.2f} |")
    return (
        "\n### GRPOz at the device's rates\n\n"
        f"Products with frozen weights, and attention, at the measured {rate / 1e12:.3g} TFLOP/s, or, with the word "
        "alone, as the faster library does them when it does nothing else; decoding at that rate or at the measured "
        f"{bandwidth / 1e9:.0f} GB/s, whichever takes longer, or, with the word alone, its products likewise and then "
        "its cache at that bandwidth; no more.\n\n" + "\n".join(rows) + "\n"
    )


def _faster(result: dict) -> float:
    """Seconds of the faster side."""
    return min(result[side]["median"] for side in ("ours", "reference"))


def _rate(by_row: dict[str, dict]) -> float | None:
    """FLOP/s of a large product, the faster side's."""
    if "matrix" not in by_row:
        return None
    n = matrix_size(by_row["matrix"]["hardware"]["gpu"] is None)
    return 2 * SQUARES * n**3 / _faster(by_row["matrix"])


def _bandwidth(by_row: dict[str, dict]) -> float | None:
    """Bytes a second, the faster side's."""
    if "read" not in by_row:
        return None
    size = 4 * math.prod(read_size(by_row["read"]["hardware"]["gpu"] is None))
    return size / _faster(by_row["read"])


def _bytes_of_decoding(shape: Shape) -> tuple[float, float]:
    """Bytes of weights, and of keys and values written so far, each once a token."""
    bytes_each = {"float32": 4, "bfloat16": 2}[shape.dtype]
    token = 2 * shape.layers * shape.hidden * bytes_each  # keys and values of one token
    cache = shape.clips * (shape.prompt + shape.samples * shape.new_tokens / 2) * token
    return shape.new_tokens * shape.matrix_parameters * bytes_each, shape.new_tokens * cache
