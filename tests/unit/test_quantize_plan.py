"""plan_quantize: exact sizes of every format, group sizes, names for loaders, and kernels that keep to the plan."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MOE, edit_json, make_dense, make_moe, packable, read_tensors, write_shards

from moeconv.errors import InputError, UsageError
from moeconv.families.measured import MEASURED, RUNTIMES, Finding
from moeconv.families.model import open_model
from moeconv.families.registry import tables
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.families.served import check_served
from moeconv.plan.build import count_params, whole
from moeconv.plan.execute import execute
from moeconv.plan.plan import Item, TensorSpec
from moeconv.plan.planned import planned_model
from moeconv.quantize.formats import FORMATS, choose_group, choose_scheme, fitting_groups
from moeconv.quantize.listing import formats
from moeconv.quantize.packing import Packing, _pattern
from moeconv.quantize.planner import plan_quantize
from moeconv.quantize.spec import Kernel, Scheme
from moeconv.quantize.targets import TARGETS, check_targets, loads_of
from tests.contract.stock import MOE_CASES, save_stock

IN_PLACE = [f for f in FORMATS.values() if f.takes(MIXTRAL) and f.shard is None]  # gguf has tests of its own
EVERY_SCHEME = pytest.mark.parametrize(("format", "scheme"), [(f.name, s.name) for f in IN_PLACE for s in f.schemes])


@pytest.fixture
def model(tmp_path):
    return open_model(make_moe(tmp_path / "m", hidden=64, intermediate=128))


@EVERY_SCHEME
@pytest.mark.parametrize("family", sorted(MOE))
def test_experts_are_packed_and_everything_else_is_carried(tmp_path, family, format, scheme):
    model = open_model(
        make_moe(tmp_path / "m", family, **packable(FORMATS[format].scheme(scheme), hidden=64, intermediate=128))
    )
    plan = plan_quantize(model, format=format, scheme=scheme)
    packed = {n for n, r in model.roles.items() if r.group == "expert"}
    copied = {s.name for i in plan.items() if i.kernel == "copy" and i.inputs[0].origin == "source" for s in i.outputs}
    assert copied == set(model.roles) - packed
    made = {i.inputs[0].tensor: i for i in plan.items() if i.kernel != "copy"}
    assert set(made) == packed
    again = planned_model(plan)
    for name, item in made.items():
        stem = name.removesuffix(".weight")
        assert again.family.only_served or all(s.name.startswith(stem + ".") for s in item.outputs)
        assert sum(s.params for s in item.outputs) == math.prod(model.checkpoint.tensors[name].shape)
    assert (plan.params_total, plan.params_active) == count_params(model)
    assert plan.promise == plan.changed
    assert plan.block["bits_by_layer"] == dict.fromkeys("01", FORMATS[format].scheme(scheme).bits)
    assert again.quantization and count_params(again) == count_params(model)


EVERY_KIND = pytest.mark.parametrize(
    ("format", "scheme", "double_quant"),
    [(f.name, s.name, nested) for f in IN_PLACE for s in f.schemes for nested in (False, True)[: 1 + s.nests]],
)


@EVERY_KIND
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_kernels_make_the_planned_bytes(tmp_path, format, scheme, double_quant, dtype):
    from moeconv.plan.kernels import load_kernel

    sizes = packable(FORMATS[format].scheme(scheme), hidden=96, intermediate=160)
    model = open_model(make_moe(tmp_path / "m", layers=1, dtype=dtype, **sizes))
    plan = plan_quantize(model, format=format, scheme=scheme, double_quant=double_quant)
    seen = set()
    for item in plan.items():
        if item.kernel == "copy" or (item.kernel, item.inputs[0].shape) in seen:
            continue
        seen.add((item.kernel, item.inputs[0].shape))
        read = [(ref, model.checkpoint.read(ref.tensor)) for ref in item.inputs]
        made = load_kernel(item.kernel)(read, item.outputs, item.params)
        assert [memoryview(m).nbytes for m in made] == [s.nbytes for s in item.outputs]
    assert len(seen) == 2  # gate and up have one shape, down the other


def test_int4_layout(model):
    plan = plan_quantize(model)
    assert (plan.block["format"], plan.block["scheme"], plan.block["group_size"]) == ("compressed-tensors", "int4", 64)
    down = next(i for i in plan.items() if i.inputs[0].tensor.endswith("experts.0.w2.weight"))
    assert [(s.name.rpartition(".")[2], s.dtype, s.shape) for s in down.outputs] == [
        ("weight_packed", "I32", (64, 16)), ("weight_scale", "BF16", (64, 2)), ("weight_shape", "I64", (2,)),
    ]  # fmt: skip
    group = plan.config["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == 4 and group["weights"]["group_size"] == 64


def test_bitsandbytes_layout(model):
    plan = plan_quantize(model, format="bitsandbytes")
    down = next(i for i in plan.items() if i.inputs[0].tensor.endswith("experts.0.w2.weight"))
    shapes = {s.name.partition("w2")[2]: (s.dtype, s.shape) for s in down.outputs}
    state = shapes.pop(".weight.quant_state.bitsandbytes__nf4")
    assert shapes == {
        ".weight": ("U8", (4096, 1)),
        ".weight.absmax": ("F32", (128,)),
        ".weight.quant_map": ("F32", (16,)),
    }
    text = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}
    assert state == ("U8", (len(json.dumps(text)),))
    eight = plan_quantize(model, format="bitsandbytes", bits=8)
    down = next(i for i in eight.items() if i.inputs[0].tensor.endswith("experts.0.w2.weight"))
    assert [(s.dtype, s.shape) for s in down.outputs] == [("I8", (64, 128)), ("F32", (64,))]


@pytest.mark.parametrize(
    ("format", "scheme"),
    [(f.name, s.name) for f in IN_PLACE if f.name != "mlx" for s in f.schemes],  # mlx-lm looks for scales
)
def test_loaders_are_told_what_stays_plain(tmp_path, format, scheme):
    model = open_model(
        make_moe(
            tmp_path / "m",
            "qwen2_moe",
            layers=3,
            mlp_only_layers=[1],
            **packable(FORMATS[format].scheme(scheme), hidden=64, intermediate=128),
        )
    )
    plan = plan_quantize(model, format=format, scheme=scheme)
    config = plan.config["quantization_config"]
    keys = ("ignore", "llm_int8_skip_modules", "modules_to_not_convert")
    ignored = set(next(config[key] for key in keys if key in config))
    plain = {
        n.removesuffix(".weight")
        for n, r in model.roles.items()
        if r.group != "expert" and n.endswith(".weight") and len(model.checkpoint.tensors[n].shape) == 2
    }
    assert ignored == plain - {"model.embed_tokens"}
    assert {
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_expert.up_proj",
        "model.layers.1.mlp.up_proj",
    } <= ignored


def test_a_tied_head_is_named_too(tmp_path):
    model = open_model(make_moe(tmp_path / "m", tied=True, hidden=64, intermediate=128))
    assert "lm_head" in plan_quantize(model).config["quantization_config"]["ignore"]


def test_dtype_reaches_what_stays_plain(model):
    plan = plan_quantize(model, format="bitsandbytes", dtype="float32")
    plain = {s.dtype for i in plan.items() if i.kernel in ("copy", "cast") for s in i.outputs}
    assert plain == {"F32"} and plan.config["dtype"] == "float32"
    assert plan.config["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen3_moe", {"scheme": "int4"}),
        ("qwen3_moe", {"scheme": "nvfp4", "rest": "fp8"}),
        ("qwen3_moe", {"format": "bitsandbytes", "scheme": "nf4"}),
        ("qwen3_moe", {"format": "mlx", "scheme": "affine4", "group_size": "32"}),
        ("gpt_oss", {"format": "bitsandbytes", "scheme": "int8"}),
    ],
)
def test_dtype_is_that_of_the_scales_as_if_the_source_were_cast_first(tmp_path, family, flags, dtype):
    """Each expert of a tensor of all experts is read and cast by itself."""
    if family in MOE:
        path = make_moe(tmp_path / "m", family, hidden=64, intermediate=64)
    else:
        path = save_stock(tmp_path / "m", *MOE_CASES[family], dtype=torch.bfloat16)
    shutil.copytree(path, tmp_path / "cast")
    for file in (tmp_path / "cast").glob("*.safetensors"):
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for source, more in ((path, {"dtype": dtype}), (tmp_path / "cast", {"dtype": dtype})):
        model = open_model(source)
        execute(plan_quantize(model, **flags, **more), source=model.checkpoint, out=tmp_path / f"{source.name}.out")
    one, other = (read_tensors(tmp_path / f"{name}.out") for name in ("m", "cast"))
    assert one == other
    plain = {"float16": "F16", "float32": "F32"}[dtype]
    assert not any(found == "BF16" for found, _, _ in one.values()) and any(d == plain for d, _, _ in one.values())


def test_a_weight_without_others_to_join_is_no_pattern_for_one_with_them(model):
    """Queries whose keys and values are not packed come first here; those of the next layer share a scale."""

    def attention(layer, parts):
        return [model.checkpoint.tensors[model.family.name(f"attention.{p}", layer=layer)] for p in parts]

    scheme = Scheme("nvfp4", 4, 16)
    weights = [*attention(0, "q"), *attention(1, "qkv")]
    packing = Packing(model, FORMATS["compressed-tensors"], scheme, {}, weights, "rtn", None)
    items = {item.inputs[0].tensor: item for item in packing.items() if item.kernel == "pack_nvfp4"}
    assert [len(items[ref.name].inputs) for ref in weights] == [1, 3, 3, 3]


def test_scope(tmp_path):
    path = make_moe(tmp_path / "m", "qwen2_moe", hidden=64, intermediate=128, layers=3, mlp_only_layers=[1])
    model = open_model(path)
    plain = {"norm", "embedding", "router"}
    for scope, groups in (
        ("experts", {"expert"}),
        ("experts+shared", {"expert", "shared"}),
        ("all-linear", {"expert", "shared", "attention", "ffn"}),
    ):
        plan = plan_quantize(model, scope=scope)
        assert set(plan.changed) == groups and plan.promise == plan.changed
        made = {i.inputs[0].tensor for i in plan.items() if i.kernel != "copy"}
        roles = [model.roles[name] for name in made]
        assert not any(r.key == "shared.router" or r.group in plain or r.key.endswith("_bias") for r in roles)
        ignored = set(plan.config["quantization_config"]["ignore"])
        assert not ignored & {name.removesuffix(".weight") for name in made}
        assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"} <= ignored
        assert ("model.layers.1.mlp.up_proj" in ignored) == (scope != "all-linear")


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"target": ("llama.cpp",)}, "llama.cpp cannot load compressed-tensors int4"),
        ({"target": ("transformers", "vllm"), "format": "bitsandbytes", "scheme": "int8"}, "vllm cannot load"),
        ({"target": ("transformers",), "format": "gguf"}, "transformers cannot load gguf q4_k"),
        ({"target": ("tgi",)}, "not a known runtime"),
        ({"double_quant": True}, "compressed-tensors int4 does not support --double-quant"),
        (
            {"double_quant": True, "format": "bitsandbytes", "bits": 8},
            "bitsandbytes int8 does not support --double-quant",
        ),
        ({"scope": "attention"}, "--scope attention"),
        ({"self_contained": True}, "--format compressed-tensors does not need --self-contained"),
    ],
)
def test_what_the_target_cannot_load(model, parameters, says):
    with pytest.raises(UsageError, match=says):
        plan_quantize(model, **parameters)


def test_targets_that_load_it_pass_and_unproven_ones_warn(model):
    assert not plan_quantize(model, target=("transformers",)).warnings
    assert "was not run" in plan_quantize(model, target=("transformers", "sglang")).warnings[0]
    assert "multiples of 128" in plan_quantize(model, target=("vllm",)).warnings[0]
    (warning,) = plan_quantize(model, format="bitsandbytes", target=("vllm", "transformers")).warnings
    assert "not proven" in warning and "GPU" in warning


def test_a_target_is_told_about_with_the_family_too(model, monkeypatch):
    """Not only whether an engine loads the format: also how it runs the family (families/measured.py)."""
    assert "sglang lists mixtral; it was not measured here" in plan_quantize(model, target=("sglang",)).warnings
    monkeypatch.setitem(MEASURED["vllm"], "mixtral", Finding("differs", "the cause"))
    warnings = plan_quantize(model, target=("vllm",)).warnings
    assert any("vllm lists mixtral, but when it was measured" in text and "the cause" in text for text in warnings)


# -- choices -----------------------------------------------------------------------------------------------------


GROUPED = pytest.mark.parametrize(
    ("format", "info"), [(f, info) for f in FORMATS.values() for info in f.schemes if info.groups]
)


@GROUPED
def test_group_sizes(format, info):
    sizes = [size for size in info.groups if size is not None]
    for i, size in enumerate(sizes):
        usual = info.usual if info.usual is not None and size % info.usual == 0 else size
        assert choose_group(format, info, "auto", [size, 3 * size]) == usual, "the largest that divides all"
        assert choose_group(format, info, str(size), [size]) == size
        assert fitting_groups(info, [size, 3 * size]) == sizes[i:]
    if None in info.groups:
        assert choose_group(format, info, "channel", [7]) is None
    else:
        with pytest.raises(UsageError, match="does not have --group-size channel"):
            choose_group(format, info, "channel", [sizes[0]])


@GROUPED
def test_group_sizes_that_do_not_fit(format, info):
    bad = [max(size for size in info.groups if size is not None) + 1, 80]
    for text, error in (
        ("auto", InputError), (str(info.groups[0]), InputError), ("48", UsageError), ("0", UsageError),
        ("x", UsageError), ("-1", UsageError), ("³²", UsageError),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            choose_group(format, info, text, bad)
        assert caught.value.hint or error is UsageError


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if not any(info.groups for info in f.schemes)])
def test_a_layout_with_groups_of_its_own_takes_no_group_size(format):
    for info in format.schemes:
        assert choose_group(format, info, "auto", [7]) is None and fitting_groups(info, [7]) == [None]
        with pytest.raises(UsageError, match=f"--format {format.name} does not use --group-size"):
            choose_group(format, info, "64", [64])


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_schemes(format):
    assert choose_scheme(format, scheme=None, bits=None) == next(
        (s for s in format.schemes if s.bits == 4), format.schemes[0]
    )
    for info in format.schemes:
        assert choose_scheme(format, scheme=info.name, bits=None) == info
        assert choose_scheme(format, scheme=info.name, bits=info.bits) == info
        assert choose_scheme(format, scheme=None, bits=info.bits) == next(
            s for s in format.schemes if s.bits == info.bits
        )
        other = next(bits for bits in (4, 8) if bits != info.bits)
        with pytest.raises(UsageError, match="contradicts"):
            choose_scheme(format, scheme=info.name, bits=other)


# the first format in the registry that packs in place, without some of its schemes
WIDE = replace(
    IN_PLACE[0],
    name="wide",
    schemes=tuple(s for s in IN_PLACE[0].schemes if s.bits == 8),
    mixes=(),
    among=(),
    merge=None,
)


def test_a_format_without_4_bits(model, monkeypatch):
    """What is usual is its first scheme; --bits 4 is refused with what it has."""
    monkeypatch.setattr(FORMATS, "_records", {**FORMATS, "wide": WIDE})
    assert choose_scheme(WIDE, scheme=None, bits=None) == WIDE.schemes[0]
    assert plan_quantize(model, format="wide").block["scheme"] == WIDE.schemes[0].name
    with pytest.raises(UsageError, match="--format wide has no scheme of 4 bits") as caught:
        plan_quantize(model, format="wide", bits=4)
    assert f"It has {WIDE.schemes[0].name} (8 bits)" in caught.value.hint and IN_PLACE[0].name in caught.value.hint


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.takes(MIXTRAL)], ids=lambda f: f.name)
@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_a_method_that_a_format_lacks_is_refused_with_what_it_has(tmp_path, format, method):
    model = open_model(make_moe(tmp_path / "m", hidden=128, intermediate=128))  # whole blocks of every scheme
    for info in format.schemes if method in format.methods else ():
        if method in format.methods_of(info):
            assert plan_quantize(model, format=format.name, scheme=info.name, method=method).promise
        else:
            said = f"--format {format.name} --scheme {info.name} does not support --method {method}"
            with pytest.raises(UsageError, match=said) as caught:
                plan_quantize(model, format=format.name, scheme=info.name, method=method)
            assert "or --scheme " in caught.value.hint
    if method in format.methods:
        return
    with pytest.raises(UsageError, match=f"--format {format.name} does not support --method {method}") as caught:
        plan_quantize(model, format=format.name, method=method)
    assert "--method " + " or ".join(format.methods) in caught.value.hint
    assert any(f"--format {f.name}" in caught.value.hint for f in FORMATS.values() if method in f.methods)


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_a_method_that_one_kernel_lacks_is_refused(model, monkeypatch, method):
    """A format whose kernels differ: the item's own kernel counts, and one that no record knows has no method."""
    base = next(f for f in IN_PLACE if method in f.methods)
    bare = replace(
        base,
        kernels=(*(replace(k, fits=False, grid="") for k in base.kernels), Kernel("other", True, "x:y")),
        schemes=tuple(replace(info, kernel="") for info in base.schemes),
    )
    monkeypatch.setattr(FORMATS, "_records", {**FORMATS, base.name: bare})
    with pytest.raises(UsageError, match=f"--format {base.name} does not support --method {method} for ") as caught:
        plan_quantize(model, format=base.name, method=method)
    assert caught.value.hint == "Use --method rtn."
    assert plan_quantize(model, format=base.name).promise


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"bits": 7}, "--bits 7 is not a width"), ({"bits": 8, "scheme": "int4"}, "contradicts"),
        ({"scheme": "nf4"}, "has no scheme nf4"), ({"scheme": "int5"}, "--scheme int5"),
        ({"scheme": "int4", "format": "bitsandbytes"}, "has no scheme int4"), ({"format": "awq"}, "--format awq"),
        ({"group_size": "channel"}, "but int8 does"), ({"group_size": "7"}, "--group-size 7"),
        ({"format": "bitsandbytes", "group_size": "64"}, "does not use --group-size"),
        ({"groupsize": "64"}, "unknown parameter"),
    ],
)  # fmt: skip
def test_contradictory_parameters(model, parameters, says):
    with pytest.raises(UsageError, match=says):
        plan_quantize(model, **parameters)


def test_what_cannot_be_quantized(tmp_path):
    with pytest.raises(InputError, match="has no experts to quantize"):
        plan_quantize(open_model(make_dense(tmp_path / "dense")))
    with pytest.raises(InputError, match="no Mixture-of-Experts layer"):
        plan_quantize(open_model(make_moe(tmp_path / "none", "qwen3_moe", mlp_only_layers=[0, 1])))
    with pytest.raises(InputError, match="is F64"):
        plan_quantize(open_model(make_moe(tmp_path / "f64", dtype="F64")))
    with pytest.raises(InputError, match="divides all of the widths"):
        plan_quantize(open_model(make_moe(tmp_path / "odd", hidden=36, intermediate=30)))
    with pytest.raises(InputError, match="do not fill 32-bit words"):
        plan_quantize(
            open_model(make_moe(tmp_path / "odd8", hidden=36, intermediate=30)), scheme="int8", group_size="channel"
        )
    left_over = make_moe(tmp_path / "left_over")  # a config of a quantized model, over weights that are not
    edit_json(left_over / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match="quantized already"):
        plan_quantize(open_model(left_over))
    flat = make_moe(tmp_path / "flat")
    tensors = read_tensors(flat)
    name = next(n for n in tensors if ".experts.0.w1" in n)
    tensors[name] = ("I8", tensors[name][1], bytes(math.prod(tensors[name][1])))
    write_shards(flat, tensors)
    with pytest.raises(InputError, match=r"is I8, but config.json has no quantization_config"):
        plan_quantize(open_model(flat))


@pytest.mark.parametrize("format", IN_PLACE, ids=lambda f: f.name)
def test_equal_weights_are_planned_by_one_pattern(model, format):
    """Plans make the item of one weight, and those of equal weights by changing names: as if each had been made."""
    weights = [ref for name, ref in model.checkpoint.tensors.items() if ".experts." in name and ".w1." in name]
    for info in format.schemes:
        for ref in weights:
            scheme = Scheme(info.name, info.bits, 32 if info.groups else None, info.nests)
            pattern = _pattern(weights[0], [format.make(weights[0], scheme, "expert.gate")])
            assert pattern.of(ref) == format.make(ref, scheme, "expert.gate")
    elsewhere = Item((TensorSpec("packed.0", "U8", (1,), "expert.gate", 1),), "x", (whole(weights[0]),))
    assert _pattern(weights[0], [elsewhere]) is None


def test_every_scheme_says_who_loads_it():
    words = {"ok", "dequantized", "no", "unknown"}
    for format in FORMATS.values():
        kinds = [(scheme.loads, scheme.measured) for scheme in format.schemes] + [(format.mixed, format.mixed_measured)]
        for loads, measured in kinds:
            assert set(loads) <= set(TARGETS) and set(loads.values()) <= words
            assert set(measured) <= set(RUNTIMES)
            for runtime, families in measured.items():
                assert set(families) <= {*tables().families, *tables().wrapped}, runtime
                assert set(families.values()) <= {"same", "differs", "refused"}
        assert set(format.notes) <= set(TARGETS)
        assert bool(format.mixed) == bool(format.mixes), "who loads bits by layer is known where they can be chosen"


def test_int4_in_vllm_is_proven_for_softmax_routers_alone():
    """Its CPU backend refuses INT4 of routers with sigmoid scores or a correction bias: measured."""
    format = FORMATS["compressed-tensors"]
    for name, word in (
        ("qwen3_moe", "ok"), ("mixtral", "ok"), ("olmoe", "ok"), ("glm4_moe", "unknown"), ("ernie4_5_moe", "unknown"),
        ("dots1", "unknown"), ("minimax_m2", "unknown"), ("deepseek_v3", "unknown"),
    ):  # fmt: skip
        family = tables().families[name]
        assert loads_of(format, "int4", family)["vllm"] == word
        warnings = check_targets(format, "int4", ["vllm"], family=family)
        assert [("router" in text) for text in warnings] == ([] if word == "ok" else [True])
    assert check_served("glm4_moe_lite", ["llama.cpp"]) == []


def test_target_says_of_every_format_what_was_not_run():
    def warnings(format: str, scheme: str, target: str, family: str = "qwen3_moe") -> list[str]:
        return check_targets(FORMATS[format], scheme, [target], family=tables().families[family])

    for format, scheme, target in (
        ("compressed-tensors", "int4", "vllm"), ("compressed-tensors", "int4", "transformers"),
        ("bitsandbytes", "nf4", "transformers"), ("gguf", "q4_k", "llama.cpp"),
    ):  # fmt: skip
        assert warnings(format, scheme, target) == []
    for format, scheme in (("compressed-tensors", "int4"), ("bitsandbytes", "nf4")):
        (text,) = warnings(format, scheme, "sglang")
        assert "was not run" in text
    assert "refused a small random glm4_moe" in warnings("compressed-tensors", "int4", "vllm", "glm4_moe")[0]
    assert "computes something different" in warnings("compressed-tensors", "int4", "vllm", "phimoe")[0]
    assert "flex_olmo was not run" in warnings("compressed-tensors", "int4", "vllm", "flex_olmo")[0]
    assert "refused a small random mixtral" in warnings("compressed-tensors", "int8", "vllm", "mixtral")[0]


def test_the_list_of_formats_says_what_was_run():
    rows = {(row["format"], row["scheme"]): row for row in formats()["formats"]}
    assert rows["compressed-tensors", "int4"]["measured"]["vllm"] == RUNTIMES["vllm"]
    assert rows["compressed-tensors", "int4"]["measured"]["sglang"] is None
    assert rows["gguf", "q4_k"]["measured"]["llama.cpp"] == RUNTIMES["llama.cpp"]


def test_a_result_that_is_larger_than_its_source_is_warned_of(tmp_path, cli):
    source = make_moe(tmp_path / "moe", hidden=64, intermediate=128)
    rows, groups = tmp_path / "a scale for each row", tmp_path / "a scale for each 32"
    done = cli("quantize", source, rows, "--format", "bitsandbytes", "--scheme", "int8", "--no-check")
    assert done.code == 0, done.err
    finer = ("--scheme", "int8", "--group-size", 32, "--dry-run", "--json")
    planned = cli("quantize", rows, groups, "--requantize", *finer)
    assert planned.code == 0, planned.out
    (warning,) = [w for w in planned.json["warnings"] if "larger than its source" in w]
    assert "bitsandbytes already" in warning and planned.json["bytes"] > open_model(rows).checkpoint.nbytes
    usual = cli("quantize", source, groups, *finer).json
    assert not [w for w in usual["warnings"] if "larger" in w]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schemes": ()}, "it has no scheme"),
        ({"schemes": (IN_PLACE[0].schemes[0],) * 2}, "one name"),
        ({"make": None}, "neither make and config nor shard"),
        ({"mixes": ("int5",)}, "it mixes int5, which it does not have"),
        ({"merge": None}, "has neither merge nor mix"),
    ],
)
def test_a_record_that_no_command_could_use(change, says):
    base = next(f for f in IN_PLACE if f.mixes)
    with pytest.raises(ValueError, match=says):
        replace(base, **change)


def test_a_kernel_that_is_not_there_is_named(model, monkeypatch, tmp_path):
    name, base = next((f.name, f) for f in IN_PLACE)

    def make(ref, scheme, role):
        return replace(base.make(ref, scheme, role), kernel="no_such_package.kernels:pack")

    monkeypatch.setattr(FORMATS, "_records", {**FORMATS, name: replace(base, make=make)})
    with pytest.raises(InputError, match=r"the kernel no_such_package.kernels:pack cannot be loaded: No module"):
        execute(plan_quantize(model, format=name), source=model.checkpoint, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_format_that_transformers_does_not_load_of_a_family_is_refused_as_its_target():
    family, format = tables().families["kimi_linear"], FORMATS["compressed-tensors"]
    assert loads_of(format, "int4", family)["transformers"] == "no"
    assert loads_of(format, "int4", tables().families["deepseek_v3"])["transformers"] == "dequantized"
    with pytest.raises(UsageError, match="--target transformers cannot load"):
        check_targets(format, "int4", ["transformers"], family=family)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--actorder", "none"), "--method rtn does not use --actorder"),
        (("--damping", 0.1), "--method rtn does not use --damping"),
        (("--split-size", "1GB"), "--format compressed-tensors does not use --split-size"),
        (("--format", "gguf", "--shard-size", "1GB"), "--format gguf does not use --shard-size"),
    ],
)
def test_an_option_that_nothing_uses_is_refused(tmp_path, cli, words, says):
    done = cli("quantize", make_moe(tmp_path / "moe"), tmp_path / "out", *words, "--dry-run", "--json")
    assert (done.code, done.json["error"]["message"]) == (2, says)
