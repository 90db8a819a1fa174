"""The plan's figures against bytes and FLOPs counted by hand, on eight simulated devices."""

import dataclasses
import functools
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ambijax import ahead, chips, cost, plan, planned, programs, settings
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from ambijax.model import kernels
from tests import trained

GIB = 2**30


def _config(name: str, *keys: str):
    file = name if ".py" in name else f"{name}.py"
    return settings.parse(["plan", f"--config=configs/{file}", "--workdir=unused", *(f"--config.{k}" for k in keys)])[0]


def _published(algorithm: str, data: int, fsdp: int, tensor: int):
    """The published model on a mesh of simulated devices; nothing is compiled."""
    keys = (f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", "data.batch_size=8")
    shape = model_config.from_dict(plan.PUBLISHED)
    return programs.setting(_config(algorithm, *keys), shape, jax.devices())


def test_weights_of_the_published_model_by_hand():
    # 8,397,094,912 parameters (all tensors of the release) in bfloat16; matrices are split eight ways, the rest not.
    setting = _published("grpoz", 1, 4, 2)
    both = programs.variables(setting)
    assert sum(x.size for x in jax.tree.leaves(both["params"])) == 8_397_094_912
    found = programs.bytes_a_device(both["params"])
    np.testing.assert_allclose(found, 2 * 8_397_094_912 / 8, rtol=0.01)
    # LoRA of rank 8 on q k v o (4096 + 4096 each) and gate up down (4096 + 11008 each), 32 layers, float32.
    adapters = 32 * 8 * (4 * 8192 + 3 * 15104)
    assert sum(x.size for x in jax.tree.leaves(both["lora"])) == adapters
    whole, _, _ = programs.state(setting)
    moments = sum(x.size for x in jax.tree.leaves(whole.optimizer) if x.ndim)
    assert moments == 2 * adapters


def _by_hand(fsdp: int, tensor: int) -> dict[str, int]:
    """Bytes a chip from the published shape: width 4096, feed-forward 11008, 32 layers, 156,032 words; tower 1280,
    feed-forward 5120, 32 layers. Matrices are split by both axes; biases with their output; norms, convolutions and
    positions are whole on every chip."""
    both, d, f, e, g = fsdp * tensor, 4096, 11008, 1280, 5120
    matrices = 32 * (4 * d * d + 3 * d * f) + 2 * 156032 * d + 32 * (4 * e * e + 2 * e * g)
    by_tensor = 32 * (3 * d + 2 * e + g)  # biases of q, k, v; in the tower of q, v and fc1
    by_fsdp = 32 * (e + e) + e * d + d  # biases of out_proj and fc2; the projector, whose input is not split
    norms = (32 * 2 + 1) * d + (32 * 2 + 1) * 2 * e
    whole = norms + (128 * 3 * e + e) + (e * 3 * e + e) + 1500 * e
    # Rank 8: A [in, 8] follows the matrix's rows, B [8, out] its columns; o and down have heads and mlp as their rows.
    by_rows = 8 * 32 * (5 * d // fsdp + d // tensor + f // tensor)
    by_columns = 8 * 32 * (3 * d // tensor + d // fsdp + 2 * f // tensor + d // fsdp)
    return {
        "weights": 2 * (matrices // both + by_tensor // tensor + by_fsdp // fsdp + whole),
        "adapters": 4 * (by_rows + by_columns),
    }


@pytest.mark.parametrize("mesh", [(1, 1, 4), (3, 1, 2), (1, 4, 1), (1, 2, 2), (3, 2, 1), (1, 1, 1)])
def test_bytes_of_the_published_model_by_hand_on_meshes_of_fewer_chips(mesh):
    data, fsdp, tensor = mesh
    keys = (f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", "data.batch_size=12")
    devices = jax.devices()[: data * fsdp * tensor]
    setting = programs.setting(_config("grpoz", *keys), model_config.from_dict(plan.PUBLISHED), devices)
    whole, _, _ = programs.state(setting)
    both, hand = programs.variables(setting), _by_hand(fsdp, tensor)
    assert programs.bytes_a_device(both["params"]) == hand["weights"]
    assert programs.bytes_a_device(both["lora"]) == hand["adapters"]
    moments = [x for x in jax.tree.leaves(whole.optimizer) if x.ndim]
    assert programs.bytes_a_device(moments) == 2 * hand["adapters"]
    # Half a MiB a token: twelve prompts of 224 tokens, and eight completions of 256 to each.
    roll_out = next(p for p in programs.programs(setting, 512, 96) if p.name == "roll-out")
    assert programs.cache(setting, roll_out) == 12 * (224 + 8 * 256) * 2**19 // (data * fsdp * tensor)


def test_what_is_trained_lies_in_memory_in_float32_in_every_program():
    keys = ("optim.train=('params/.*',)", "grpo.beta_kl=0.0", "grpo.updates=2")
    setting = programs.setting(_config("grpoz", *keys), model_config.from_dict(plan.PUBLISHED), jax.devices()[:1])
    found = {p.name: p for p in programs.programs(setting, 512, 96)}
    assert found.keys() == {"encode", "roll-out", "old policy", "update", "evaluation"}
    for name in ("encode", "roll-out", "old policy", "evaluation"):
        assert programs.bytes_a_device(found[name].arguments[0]["params"]) == 4 * 8_397_094_912, name
    assert found["old policy"].completions == 9  # of what was sampled, and gold


@pytest.mark.parametrize(
    ("keys", "trips"),
    [((), 38), (("model.decoding=triton",), 112), (("model.dtype=float32",), 112), (("model.cache=int8",), 38)],
)
def test_a_roll_out_has_one_loop_where_attention_reads_what_is_written(keys, trips, monkeypatch):
    monkeypatch.setattr(kernels, "PLATFORMS", {})  # no GPU is needed to count
    shape = model_config.load(trained.TINY)
    setting = programs.setting(_config("grpoz.py:tiny", "model.dtype=bfloat16", *keys), shape, jax.devices()[:1])
    assert {p.trips for p in programs.programs(setting, 256, 64) if p.name in ("roll-out", "evaluation")} == {trips}


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2), (8, 1, 1)])
def test_chips_that_split_weights_share_them_in_proportion(mesh):
    both = programs.variables(_published("sft", *mesh))
    split = mesh[1] * mesh[2]
    np.testing.assert_allclose(programs.bytes_a_device(both["params"]), 2 * 8_397_094_912 / split, rtol=0.02)


def test_the_cache_of_a_roll_out_by_hand():
    # Half a MiB a token: 2 (k, v) x 32 layers x 32 heads x 128 x 2 bytes. Four prompts of 224 tokens, read once, and
    # eight completions of 256 to each.
    setting = _published("grpoz", 1, 1, 8)
    setting = dataclasses.replace(setting, config=_config("grpoz", "mesh.fsdp=1", "mesh.tensor=8"))
    roll_out = next(p for p in programs.programs(setting, 512, 96) if p.name == "roll-out")
    assert programs.cache(setting, roll_out) == 4 * (224 + 8 * 256) * 2**19 // 8


def test_flops_of_loops_are_multiplied():
    def layers(x, weights):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, weights)
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ weights[0]), (0, x))[1]

    jaxpr = jax.jit(layers).trace(jnp.zeros((2, 8)), jnp.zeros((5, 8, 8))).jaxpr
    assert cost.flops(jaxpr.jaxpr, trips=3) == (5 + 3) * 2 * 2 * 8 * 8


def test_flops_of_a_convolution():
    # [1, 16, 4] with a kernel of 3 to 6 channels: 16 outputs of 6 channels, 3 x 4 products each.
    one = jax.lax.conv_general_dilated
    jaxpr = jax.jit(lambda x, k: one(x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))).trace(
        jnp.zeros((1, 16, 4)), jnp.zeros((3, 4, 6))
    )
    assert cost.flops(jaxpr.jaxpr.jaxpr, trips=1) == 2 * 16 * 6 * 3 * 4


def test_collectives_are_counted_with_the_loop_around_them():
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    stacked = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def layers(x, weights):  # weights split by rows, gathered in every turn
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x = jax.ShapeDtypeStruct((512, 16), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=stacked)
    found = cost.Compiled(jax.jit(layers, out_shardings=rows).lower(x, weights).compile().as_text())
    (gathers,) = [c for c in found.collectives() if c.kind == "all-gather"]
    total = 5 * 16 * 16 * 4
    assert gathers.payload == total, "the whole of each layer once, however XLA cuts it"
    assert gathers.wire == total * 7 // 8
    assert found.traffic() > 5 * 16 * 16 * 4


# A TPU's text: memory spaces, asynchronous slices, a collective cut into fusions that share its channel.
TPU = """
%piece (p0: bf16[8,64]) -> bf16[64,64] {
  %p0 = bf16[8,64]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p0), channel_id=7, replica_groups=[1,8]<=[8]
}

%body (s: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %s = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)}) parameter(0)
  %x = bf16[8,64]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %slice-start = ((bf16[8,64]{1,0}), bf16[1,64]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:64]}
  %fusion.1 = bf16[64,64]{1,0:S(1)} fusion(%x), kind=kOutput, calls=%piece
  %fusion.2 = bf16[64,64]{1,0:S(1)} fusion(%x), kind=kOutput, calls=%piece
  ROOT %t = (s32[], bf16[8,64]) tuple(%i, %x)
}

%condition (s: (s32[], bf16[8,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  %s.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %a = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[], bf16[8,64]) while(%a), condition=%condition, body=%body
}
"""


def test_a_tpus_text():
    found = cost.Compiled(TPU)
    assert found.collectives() == [cost.Collective("all-gather", 32, 32 * 8192, 32 * 8192 * 7 // 8)]
    # A turn reads a slice (128 bytes) and the operand of each fusion (1,024), whose results stay in S(1); its condition
    # compares two numbers.
    assert found.traffic() == 32 * (128 + 2 * 1024 + 9)


# A fusion inside a fusion takes one layer out of a stack of 32.
NESTED = """
%inner (i0: bf16[32,8,64], i1: s32[]) -> bf16[8,64] {
  %i0 = bf16[32,8,64]{2,1,0} parameter(0)
  %i1 = s32[] parameter(1)
  %slice = bf16[1,8,64]{2,1,0} dynamic-slice(%i0, %i1, %i1, %i1), dynamic_slice_sizes={1,8,64}
  ROOT %b = bf16[8,64]{1,0} bitcast(%slice)
}

%outer (o0: bf16[32,8,64], o1: s32[], o2: bf16[64,4]) -> bf16[8,4] {
  %o0 = bf16[32,8,64]{2,1,0} parameter(0)
  %o1 = s32[] parameter(1)
  %o2 = bf16[64,4]{1,0} parameter(2)
  %layer = bf16[8,64]{1,0} fusion(%o0, %o1), kind=kLoop, calls=%inner
  ROOT %dot = bf16[8,4]{1,0} dot(%layer, %o2)
}

ENTRY %main (a: bf16[32,8,64], n: s32[], w: bf16[64,4]) -> bf16[8,4] {
  %a = bf16[32,8,64]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %w = bf16[64,4]{1,0} parameter(2)
  ROOT %f = bf16[8,4]{1,0} fusion(%a, %n, %w), kind=kOutput, calls=%outer
}
"""


def test_of_a_stack_of_layers_only_the_layer_is_read():
    # The layer, the index, the matrix, the result.
    assert cost.Compiled(NESTED).traffic() == 2 * 8 * 64 + 4 + 2 * 64 * 4 + 2 * 8 * 4


# A fusion inside a fusion only gives its operand another shape; the product behind it reads all of it.
PASSED = """
%inner (i0: bf16[64,4]) -> bf16[64,4,1] {
  %i0 = bf16[64,4]{0,1} parameter(0)
  ROOT %b = bf16[64,4,1]{0,1,2} bitcast(%i0)
}

%outer (o0: bf16[8,64], o1: bf16[64,4]) -> bf16[8,4] {
  %o0 = bf16[8,64]{1,0} parameter(0)
  %o1 = bf16[64,4]{0,1} parameter(1)
  %weights = bf16[64,4,1]{0,1,2} fusion(%o1), kind=kLoop, calls=%inner
  ROOT %product = bf16[8,4]{1,0} convolution(%o0, %weights), window={size=1}, dim_labels=bf0_io0->bf0
}

ENTRY %main (x: bf16[8,64], w: bf16[64,4]) -> bf16[8,4] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[64,4]{0,1} parameter(1)
  ROOT %f = bf16[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%outer
}
"""


def test_weights_that_pass_through_an_inner_fusion_are_read():
    assert cost.Compiled(PASSED).traffic() == 2 * (8 * 64 + 64 * 4 + 8 * 4)


def _program(**changes) -> dict:
    base = dict.fromkeys(("weights", "adapters", "optimizer", "batch", "cache", "temporaries", "results"), 0)
    return {"name": "update", "prompts": 4, "completions": 8, "flops": 1, "model_flops": 1, **base, **changes}


def test_the_verdict_names_what_is_left_or_what_to_change():
    about = {"chip": dataclasses.asdict(chips.CHIPS["TPU v5 lite"])}
    assert planned.verdict(_program(weights=10 * GIB), about) == "fits with 5.8 GiB to spare"
    assert "mesh.fsdp x mesh.tensor" in planned.verdict(_program(weights=17 * GIB), about)
    assert "model.weights=int8" in planned.verdict(_program(weights=17 * GIB), about)
    said = planned.verdict(_program(temporaries=17 * GIB), about)
    assert said.index("optim.micro_batch") < said.index("grpo.samples")  # what changes no result comes first
    assert planned.verdict(_program(needs=20 * GIB), about).startswith("needs 4.2 GiB more")
    assert "not in the table" in planned.verdict(_program(), {"chip": None})


def test_the_roofline_is_the_slowest_resource():
    chip = chips.CHIPS["TPU v6 lite"]
    line = chips.roofline(chip, flops=918e12, traffic=2 * 1640e9, wire=0.5 * 448e9)
    assert (line.seconds, line.bound) == (2.0, "memory")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[plan.Case, dict]:
    keys = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2", "data.max_tokens=8", "grpo.samples=2", "eval.batch_size=4")
    config = _config("grpoz.py:tiny", *keys)
    case = plan.Case(config, "configs/grpoz.py:tiny", "", 256, 96, tmp_path_factory.mktemp("plan"))
    return case, plan.run(case)


@pytest.mark.slow
def test_every_step_kind_of_a_run_is_planned(tiny):
    _, result = tiny
    assert [p["name"] for p in result["programs"]] == ["encode", "roll-out", "reference", "update", "evaluation"]
    assert result["about"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    for program in result["programs"]:
        assert program["flops"] > 0
        assert program["traffic"] > 0
        assert program["weights"] > 0
    update = next(p for p in result["programs"] if p["name"] == "update")
    assert update["flops"] == update["model_flops"], "model.remat keeps every product: none is computed again"
    for text in (planned.text([result]), planned.markdown([result], "command", "jax 1")):
        assert "evaluation" in text
        assert "mesh data 1 x fsdp 4 x tensor 2" in text


@pytest.mark.slow
def test_a_plan_is_compiled_once(tiny, monkeypatch):
    case, result = tiny

    def compile_again(_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_again)
    assert plan.run(case) == result


@pytest.mark.slow
def test_no_program_gathers_logits_or_holds_whole_weights(tiny):
    case, _ = tiny
    rows = model_config.load(case.config.model.checkpoint).text.vocab_size
    for file in case.cache.glob("*.hlo.gz"):
        compiled = cost.Compiled(gzip.decompress(file.read_bytes()).decode())
        for opcode, shape in compiled.shapes():
            if opcode.startswith("all-gather"):
                assert rows not in shape[1:], f"{file.name}: {opcode} {shape}"  # [.., V]; the table [V, D] may be


def _memory(_, setting, program):
    """As if a roll-out took 2 GiB and 16 MiB for every thousand tokens that are written, an update half of that."""
    written = program.prompts * program.completions * setting.config.data.max_tokens // 1024
    size = {"roll-out": 2 * GIB + written * 2**24, "update": GIB + written * 2**23}.get(program.name, GIB)
    return {**_program(temporaries=size), "name": program.name}


def test_a_sweep_finds_the_largest_that_fits_and_compiles_little(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(plan, "measure", lambda *a: compiled.append((a[2].name, a[2].prompts)) or _memory(*a))
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["TPU v5 lite"])  # 15.75 GiB
    keys = ("mesh.data=4", "mesh.fsdp=2", "data.batch_size=8", "data.max_tokens=256", "eval.batch_size=8")
    case = plan.Case(_config("grpoz.py:tiny", *keys), "", "", 256, 96, tmp_path)
    start = plan.run(case)
    compiled.clear()
    # 8 x 8 x 256 tokens are 16 thousand; 13.75 GiB hold 880 thousand: 55 times as many, so 48 times fit and 56 do not.
    lines = list(plan.sweep(case, start))
    assert lines[0] == "data.batch_size up to 384: 448 needs 0.2 GiB more in roll-out"
    assert [line.split(":")[0] for line in lines[1:]] == ["grpo.samples up to 384", "data.max_tokens up to 12288"]
    three = ("roll-out", "reference", "update")
    ends = [("roll-out", 16), *((p, 256) for p in three), ("roll-out", 512), *((p, 384) for p in three)]
    assert compiled[:9] == [*ends, ("roll-out", 448)], "encoding and evaluation do not change with the batch"


def _updates(_, __, program) -> bool:
    return program.name == "update"


@pytest.mark.parametrize(("micro_batch", "fits"), [(0, 12), (8, 8)])
def test_a_sweep_tries_only_batches_that_can_be_split(monkeypatch, tmp_path, micro_batch, fits):
    monkeypatch.setattr(plan, "measure", lambda *a: {**_memory(*a), "temporaries": a[2].prompts * GIB * _updates(*a)})
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["TPU v5 lite"])
    keys = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "data.batch_size=8", "eval.batch_size=4")
    config = _config("sft.py:tiny", *keys, f"optim.micro_batch={micro_batch}")
    case = plan.Case(config, "", "", 256, 96, tmp_path)
    line = next(plan.sweep(case, plan.run(case)))
    assert line == f"data.batch_size up to {fits}: 16 needs 0.2 GiB more in update"


def test_a_sweep_compiles_no_program_that_has_room_to_spare(monkeypatch, tmp_path):
    compiled = []
    sizes = {"update": 1.0, "roll-out": 0.5, "reference": 0.1}  # GiB a prompt: 16 at most, for roll-outs 32
    monkeypatch.setattr(
        plan,
        "measure",
        lambda _, __, p: (
            compiled.append((p.name, p.prompts))
            or {**_program(temporaries=int(sizes.get(p.name, 0) * p.prompts * GIB)), "name": p.name}
        ),
    )
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["TPU v5 lite"])
    case = plan.Case(_config("grpoz.py:tiny", "data.batch_size=8"), "", "", 256, 96, tmp_path)
    start = plan.run(case)
    compiled.clear()
    # A roll-out of 8 takes 4 GiB: of 16 perhaps 16, if it grew with the square, and so it is compiled there.
    assert next(plan.sweep(case, start)) == "data.batch_size up to 8: 16 needs 0.2 GiB more in update"
    assert compiled == [("update", 16)] * 2  # kept after the first
    sizes["update"] = 0.9
    compiled.clear()
    assert next(plan.sweep(case, plan.run(case))).startswith("data.batch_size up to 16: 24 needs 5.")
    assert compiled[5:] == [("update", 16), ("update", 16), ("roll-out", 16), ("update", 32), ("update", 24)]


def test_a_sweep_of_what_does_not_fit_names_the_key(monkeypatch, tmp_path):
    monkeypatch.setattr(
        plan, "measure", lambda _, __, program: {**_program(temporaries=17 * GIB), "name": program.name}
    )
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["TPU v5 lite"])
    case = plan.Case(_config("sft.py:tiny"), "", "", 256, 96, tmp_path)
    (line,) = plan.sweep(case, plan.run(case))
    assert line.startswith("the configuration itself does not fit: needs 1.2 GiB more: ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["mesh.data=3"], "mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 does not make 8 devices; try"),
        (["mesh.data=1", "mesh.fsdp=8"], "data.batch_size=4 is not a multiple of .* = 8; try 8"),
        (["mesh.data=2", "mesh.tensor=4"], "mesh.tensor=4 does not divide the model's 6 attention heads; try 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named_before_anything_is_compiled(keys, message, tmp_path):
    case = plan.Case(_config("grpoz.py:tiny", *keys), "", "", 256, 96, tmp_path)
    with pytest.raises(ConfigError, match=message):
        plan.run(case)


@pytest.mark.parametrize("sizes", ["--window=-2", "--window=255", "--window=3002", "--text=0", "--text=99999999"])
def test_sizes_that_no_prompt_has_are_named(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan", "--config", "configs/sft.py:tiny", f"--cache={tmp_path}", sizes])
    with pytest.raises(ConfigError, match=f"{sizes} must be"):
        plan.main()


ASSIGNMENT = """BufferAssignment:
allocation 0: size 131072, page 0, output shape is |bf16[128,512]|, maybe-live-out:
 value: <22 fusion @0> (size=131072,offset=0): bf16[128,512]{1,0:T(8,128)(2,1)}
allocation 1: size 4096, page 0, parameter 1, shape |bf16[128,16]| at ShapeIndex {}, maybe-live-out:
 value: <16 param.1 @0> (size=4096,offset=0): bf16[128,16]{1,0:T(8,128)(2,1)}
allocation 2: size 2048, page 0, parameter 0, shape |bf16[64,16]| at ShapeIndex {}:
 value: <18 param @0> (size=2048,offset=0): bf16[64,16]{1,0:T(8,128)(2,1)}
allocation 3: size 512, page 0, preallocated-temp:
 value: <19 copy-start{} @0> (size=512,offset=0): (bf16[128,512]{1,0}, bf16[128,512]{1,0}, u32[]{:S(2)})
allocation 4: size 655360, color 1, page 0, preallocated-temp:
 value: <17 all-gather.6 @1> (size=524288,offset=131072): bf16[512,512]{1,0:T(8,128)(2,1)S(1)}
"""


def test_memory_is_what_lies_in_main_memory_beside_the_arguments():
    # Parameter 1 is given back in place; colour 1 is the chip's own small memory.
    assert ahead.memory(ASSIGNMENT) == {"temporaries": 512, "results": 131072}


def _matrices(topology: str, size: int) -> jax.stages.Lowered:
    chips = np.array(ahead.devices(topology))
    where = NamedSharding(Mesh(chips, ("x",), axis_types=(AxisType.Auto,)), PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=where)
    return jax.jit(lambda a, b: jnp.tanh(a @ b) @ b.T).trace(x, x).lower(lowering_platforms=("tpu",))


@pytest.mark.slow
def test_a_topologys_program_is_compiled_up_to_machine_code():
    pytest.importorskip("libtpu")
    memory, text = ahead.compiled(functools.partial(_matrices, "v5e:2x2", 4096), here=False)
    assert memory["results"] == 4096 * 4096 * 2 // 4
    whole = ahead.compiled(functools.partial(_matrices, "v5e:2x2", 4096), here=True)
    assert memory["temporaries"] <= whole[0]["temporaries"] < memory["temporaries"] + 2**24, "but for machine code"
    assert cost.Compiled(text).collectives() == cost.Compiled(whole[1]).collectives()
    assert cost.Compiled(text).traffic() == cost.Compiled(whole[1]).traffic()
    memory, text = ahead.compiled(functools.partial(_matrices, "v5e:2x2", 2**17), here=False)
    assert (text, memory["needs"] > 16 * GIB) == ("", True)


@pytest.mark.slow
def test_a_topology_without_a_tpu(tmp_path):
    """The published model on eight v5e: fits, and without weights or a TPU. Ten minutes of compilation."""
    pytest.importorskip("libtpu")
    case = plan.Case(_config("grpoz"), "configs/grpoz.py", "v5e:2x4", 512, 96, tmp_path)
    result = plan.run(case)
    assert result["about"]["model"] == "Qwen2-Audio-7B as published"
    assert all(planned.spare(p, result["about"]) > 0 for p in result["programs"])
    # Each of 256 tokens meets every matrix of the decoder, the prompts' keys and values and the slots of the samples'.
    matrices = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 156032 * 4096)
    cached = 4 * (224 + 8 * 256) * 2**19
    roll_out = next(p for p in result["programs"] if p["name"] == "roll-out")
    assert 1 < roll_out["traffic"] / (256 * (matrices + cached) / 8) < 1.3
