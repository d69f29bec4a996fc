"""moeconv.hf: stock from_pretrained keeps experts packed, and computes what the stock model of decoded weights does."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import (
    EXPERT,
    FAMILIES,
    OTHERS,
    SCHEMES,
    experts_of,
    held_bytes,
    load,
    make,
    quantization_config,
    stacked,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

import moeconv.hf
from moeconv.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(family: str, scheme: str) -> tuple[Path, Path]:
        if (family, scheme) not in made:
            made[family, scheme] = make(tmp_path_factory.mktemp(f"{family}-{scheme}"), family, scheme)
        return made[family, scheme]

    return get


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_the_decoded_stock_model(checkpoints, family, scheme):
    packed, plain = checkpoints(family, scheme)
    for implementation in (None, "eager", "batched_mm"):
        options = {"experts_implementation": implementation} if implementation else {}
        ours, stock = load(packed, **options), load(plain, **options)
        assert ours.config._experts_implementation == stock.config._experts_implementation
        for ids in (tokens(3, 9), tokens(1, 1)):  # all experts hit; two of eight
            with torch.no_grad():
                mine, theirs = ours(ids).logits, stock(ids).logits
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, theirs), implementation
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mine, theirs = (m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (ours, stock))
    assert mine.shape[1] > 5
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_with_experts_by_name(family, tmp_path):
    widths = {"intermediate_size": 96, "moe_intermediate_size": 96, "num_key_value_heads": 4}
    packed, plain = make(tmp_path, family, "nf4", **widths, **OTHERS[family])
    ours, stock = load(packed), load(plain)
    assert all(isinstance(module, moeconv.hf.PackedExperts) for module in experts_of(ours))
    ids = tokens(2, 8)
    assert torch.equal(ours(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)


@pytest.mark.parametrize("scheme,limit", [("nf4", 0.30), ("fp4", 0.30), ("int8", 0.53), ("nf4-nested", 0.30)])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_stay_packed_and_the_rest_does_not(checkpoints, family, scheme, limit):
    packed, plain = checkpoints(family, scheme)
    ours, stock = load(packed), load(plain)
    pairs = list(zip(experts_of(ours), experts_of(stock), strict=True))
    assert len(pairs) == 2
    for mine, theirs in pairs:
        assert isinstance(mine, type(theirs))
        assert held_bytes(mine) <= limit * held_bytes(theirs)
        for name, parameter in mine.named_parameters():
            assert parameter.dtype == (torch.int8 if scheme == "int8" else torch.uint8), name
            assert not parameter.requires_grad
    left = {name: p for name, p in ours.named_parameters() if ".experts." not in name}
    assert left.keys() == {name for name, _ in stock.named_parameters() if ".experts." not in name}
    for name, parameter in left.items():
        assert torch.equal(parameter, stock.get_parameter(name)), name
    if family == "qwen2_moe":
        assert any("shared_expert.gate_proj" in name for name in left)


def test_config_comes_back_word_for_word(checkpoints, tmp_path):
    packed, _ = checkpoints("mixtral", "nf4")
    model = load(packed)
    model.config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["quantization_config"] == quantization_config("nf4")


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [*FAMILIES, "minimax_m2", "lfm2_moe"])
def test_saving_gives_back_the_tensors_that_were_loaded(tmp_path, family, scheme):
    changes = OTHERS.get(family, {}) | {"intermediate_size": 96, "moe_intermediate_size": 96}
    packed, _ = make(tmp_path, family, scheme, **changes)
    model = load(packed)
    model(tokens(1, 4))  # a forward must not change what is saved
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["quantization_config"] == quantization_config(scheme)
    ids = tokens(2, 6)
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_saving_where_layers_differ_and_blocks_are_short(tmp_path):
    schemes = ["nf4", None, "int8"]
    packed, _ = make(tmp_path / "a", "qwen3_moe", schemes.__getitem__, num_hidden_layers=3)
    sizes = {"hidden_size": 36, "intermediate_size": 20, "num_attention_heads": 2}
    short, _ = make(tmp_path / "b", "mixtral", "nf4-nested", **sizes)
    for folder in (packed, short):
        load(folder).save_pretrained(tmp_path / "again")
        before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(checkpoints, device_map):
    pytest.importorskip("accelerate")
    packed, plain = checkpoints("qwen3_moe", "nf4-nested")
    ids = tokens(2, 6)
    model = load(packed, device_map=device_map)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.equal(model(ids).logits, load(plain)(ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["auto", "cuda"])
def test_device_map_on_a_gpu(checkpoints, device, device_map):
    pytest.importorskip("accelerate")
    packed, plain = checkpoints("qwen3_moe", "nf4-nested")
    model, ids = load(packed, device_map=device_map), tokens(2, 6).to(device)
    assert model.device.type == device.type
    assert torch.equal(model(ids).logits, load(plain).to(device)(ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation_on_a_gpu(checkpoints, device, scheme):
    packed, plain = checkpoints("qwen3_moe", scheme)
    ids = tokens(2, 6).to(device)
    ours, stock = load(packed).to(device), load(plain).to(device)
    assert torch.equal(ours(ids).logits, stock(ids).logits)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, **greedy), stock.generate(ids, **greedy))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_layers_are_kept_packed_too(tmp_path, scheme):
    """--scope all-linear: attention, dense and shared FFNs beside the experts."""
    linear = re.compile(r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|shared_expert\.\w+_proj)\.weight$")
    changes = {"mlp_only_layers": [0], "num_hidden_layers": 2}
    packed, plain = make(tmp_path, "qwen2_moe", scheme, also=linear, **changes)
    fields = json.loads((packed / "config.json").read_text())
    fields["quantization_config"]["moeconv"]["scope"] = "all-linear"
    (packed / "config.json").write_text(json.dumps(fields))
    ours, stock = load(packed), load(plain)
    kept = [name for name, module in ours.named_modules() if isinstance(module, moeconv.hf.PackedLinear)]
    assert len(kept) == 2 * 4 + 3 + 3 and all(not ours.get_submodule(n).weight.is_floating_point() for n in kept)
    ids = tokens(2, 8)
    assert torch.equal(ours(ids).logits, stock(ids).logits)
    ours.save_pretrained(tmp_path / "again")
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


@pytest.mark.parametrize(
    "fields,expected",
    [({"load_in_4bit": True}, Bnb4BitHfQuantizer), ({"load_in_8bit": True}, Bnb8BitHfQuantizer)],
)
def test_ordinary_bitsandbytes_configs_still_reach_the_stock_quantizer(fields, expected):
    stored = {"quant_method": "bitsandbytes", **fields}
    from_args = BitsAndBytesConfig(**fields)
    assert type(AutoHfQuantizer.from_config(dict(stored))) is expected
    assert type(AutoHfQuantizer.from_config(from_args, pre_quantized=False)) is expected
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        merged = AutoHfQuantizer.merge_quantization_configs(dict(stored), from_args)
    assert type(merged) is BitsAndBytesConfig
    ours = AutoHfQuantizer.from_config({**quantization_config("nf4"), "load_in_4bit": False, **stored})
    assert type(ours) is moeconv.hf.PackedExpertsQuantizer


def test_registering_twice_changes_nothing():
    moeconv.hf.register()
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert type(AutoHfQuantizer.from_config(stored)) is Bnb4BitHfQuantizer


def test_schemes_may_differ_by_layer(tmp_path):
    schemes = ["nf4", None, "int8"]
    packed, plain = make(tmp_path, "qwen3_moe", schemes.__getitem__, num_hidden_layers=3)
    ours, stock = load(packed), load(plain)
    kinds = [module.gate_up_proj.dtype for module in experts_of(ours)]
    assert kinds == [torch.uint8, torch.bfloat16, torch.int8]
    ids = tokens(2, 8)
    assert torch.equal(ours(ids).logits, stock(ids).logits)


def test_dense_layers_and_tied_embeddings(tmp_path):
    packed, plain = make(tmp_path, "qwen2_moe", "nf4", mlp_only_layers=[0], tie_word_embeddings=True)
    ours, stock = load(packed), load(plain)
    assert len(experts_of(ours)) == 1
    ids = tokens(2, 8)
    assert torch.equal(ours(ids).logits, stock(ids).logits)


def test_projections_that_end_in_a_short_block(tmp_path):
    """20 * 36 weights are 11 blocks and a quarter: gate and up must not share a block.

    Eager, because grouped_mm takes only rows of a multiple of 16 bytes."""
    packed, plain = make(tmp_path, "mixtral", "nf4", hidden_size=36, intermediate_size=20, num_attention_heads=2)
    ours, stock = (load(folder, experts_implementation="eager") for folder in (packed, plain))
    ids = tokens(2, 8)
    assert torch.equal(ours(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_float16_and_float32_models(tmp_path, scheme):
    for dtype in (torch.float16, torch.float32):
        packed, plain = make(tmp_path / str(dtype), "olmoe", scheme, dtype=dtype)
        ids = tokens(2, 8)
        mine = load(packed)(ids).logits
        assert mine.dtype == dtype
        assert torch.equal(mine, load(plain)(ids).logits)


def test_shards_and_the_headless_model(checkpoints, tmp_path):
    packed, _ = checkpoints("qwen3_moe", "nf4")
    weights = load_file(packed / "model.safetensors")
    index: dict = {"metadata": {}, "weight_map": {}}
    for part in range(3):  # experts of one layer in several files
        names = sorted(weights)[part::3]
        file = f"model-0000{part + 1}-of-00003.safetensors"
        save_file({name: weights[name] for name in names}, tmp_path / file, metadata={"format": "pt"})
        index["weight_map"].update(dict.fromkeys(names, file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    ids = tokens(2, 8)
    whole = load(packed)
    assert torch.equal(load(tmp_path)(ids).logits, whole(ids).logits)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_casting_the_model_leaves_the_scales_exact(checkpoints):
    packed, _ = checkpoints("mixtral", "nf4")
    model = load(packed)
    before = experts_of(model)[0].gate_up_proj_absmax.clone()
    model.to(torch.float16)
    after = experts_of(model)[0].gate_up_proj_absmax
    assert after.dtype == torch.float32
    assert torch.equal(after, before)
    assert model(tokens(1, 4)).logits.dtype == torch.float16
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens(1, 4)).logits, model(tokens(1, 4)).logits)


def test_gradients_flow_through_packed_experts(checkpoints):
    packed, plain = checkpoints("olmoe", "nf4")
    ours, stock = (load(folder, dtype=torch.float32, experts_implementation="eager") for folder in (packed, plain))
    ids = tokens(2, 8)
    for model in (ours, stock):
        model(ids, labels=ids).loss.backward()
    gates = [name for name, _ in stock.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates
    for name in [*gates, "model.embed_tokens.weight"]:
        mine, theirs = ours.get_parameter(name).grad, stock.get_parameter(name).grad
        assert theirs.abs().max() > 0
        # The stock model rounds its decoded weights to bfloat16 on disk, ours decodes straight to float32.
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()
    assert all(parameter.grad is None for module in experts_of(ours) for parameter in module.parameters())


# --------------------------------------------------------------------------------------------- damaged checkpoints


def damaged(source: Path, target: Path, change) -> Path:
    weights = load_file(source / "model.safetensors")
    change(weights)
    target.mkdir(parents=True)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


@pytest.mark.slow
def test_whatever_is_missing_or_misshapen_raises(checkpoints, tmp_path):
    nf4, int8 = checkpoints("mixtral", "nf4")[0], checkpoints("mixtral", "int8")[0]
    one = "model.layers.1.block_sparse_moe.experts.3.w1"

    def without(*names):
        return lambda weights: [weights.pop(name) for name in names]

    def all_without(ending):
        return lambda weights: [weights.pop(name) for name in list(weights) if name.endswith(ending)]

    def of_one(weights):
        for name in [name for name in weights if name.startswith(one + ".")]:
            del weights[name]

    def of_layer(weights):
        for name in [name for name in weights if ".layers.1.block_sparse_moe.experts." in name]:
            del weights[name]

    def nested(weights):
        weights.update({f"{name}.nested_absmax": torch.ones(1) for name in list(weights) if EXPERT.search(name)})

    cases = [
        (nf4, without(f"{one}.weight.absmax"), "absmax is missing"),
        (nf4, all_without(".absmax"), "absmax is missing"),
        (nf4, without(f"{one}.weight.quant_map"), "quant_map is missing"),
        (nf4, without(f"{one}.weight.quant_state.bitsandbytes__nf4"), "quant_state.bitsandbytes__nf4 is missing"),
        (nf4, all_without("__nf4"), "quant_state.bitsandbytes__nf4"),
        (nf4, of_one, "7 of its 8 experts"),
        (nf4, of_layer, "the experts of this parameter are missing"),
        (nf4, lambda w: w.update({f"{one}.weight.absmax": torch.ones(7)}), "expected F32"),
        (nf4, lambda w: w.update({f"{one}.weight": torch.zeros(9, 1, dtype=torch.uint8)}), "expected U8"),
        (nf4, nested, "absmax is F32 [96], expected U8"),
        (nf4, lambda w: w.update({f"{one}.weight.unknown": torch.ones(1)}), None),
        (nf4, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.uint8)}), "nf4 (or fp4) is missing"),
        (nf4, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.uint8)}), "no experts and no"),
        (int8, without(f"{one}.SCB"), "SCB is missing"),
        (int8, all_without(".SCB"), "SCB is missing"),
        (int8, lambda w: w.update({f"{one}.SCB": torch.ones(7)}), "expected F32"),
        (int8, lambda w: [w.pop(n) for n in list(w) if "experts" in n], "no tensor of the checkpoint is"),
    ]
    for number, (source, change, words) in enumerate(cases):
        folder = damaged(source, tmp_path / str(number), change)
        if words is None:  # a foreign tensor beside a complete set is reported, as transformers does
            _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert info["unexpected_keys"], number
        else:
            with pytest.raises(InputError, match=re.escape(words)):
                AutoModelForCausalLM.from_pretrained(folder)


def test_states_that_contradict_the_tensors_raise(checkpoints, tmp_path):
    source = checkpoints("mixtral", "nf4")[0]
    stem = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    key = f"{stem}.quant_state.bitsandbytes__nf4"

    def state(**changes):
        fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 64], **changes}
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    same = damaged(source, tmp_path / "same", lambda w: w.update({key: state()}))
    load(same)
    for number, value in enumerate(
        [state(shape=[64, 96]), state(quant_type="fp4"), state(blocksize=32), state(nested_blocksize=256)]
    ):
        folder = damaged(source, tmp_path / str(number), lambda w, value=value: w.update({key: value}))
        with pytest.raises(RuntimeError, match="issues during automatic conversion"):
            AutoModelForCausalLM.from_pretrained(folder)
    other_map = damaged(source, tmp_path / "map", lambda w: w.update({f"{stem}.quant_map": torch.ones(16)}))
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        AutoModelForCausalLM.from_pretrained(other_map)


def test_a_config_of_a_later_version_is_refused(checkpoints, tmp_path):
    source = checkpoints("mixtral", "nf4")[0]
    folder = damaged(source, tmp_path / "later", lambda _w: None)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["moeconv"]["scope"] = "all"
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="one of the scopes experts"):
        AutoModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------- self-contained

WITHOUT_MOECONV = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moeconv":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype="auto", output_loading_info=True
)
assert not any(info.values()), info
torch.save(model(torch.arange(3, 11)[None]).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_self_contained_loads_without_moeconv(tmp_path):
    from tiny import make_moe

    from moeconv.families.model import open_model
    from moeconv.plan.execute import execute
    from moeconv.quantize.planner import plan_quantize

    source = open_model(make_moe(tmp_path / "source", "qwen3_moe", hidden=64, intermediate=128))
    parameters = {"format": "bitsandbytes", "double_quant": True, "self_contained": True, "scope": "all-linear"}
    execute(plan_quantize(source, **parameters), source=source.checkpoint, out=tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MOECONV, str(tmp_path / "out"), str(tmp_path / "logits")],
        capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mine = load(tmp_path / "out")
    assert torch.equal(mine(torch.arange(3, 11)[None]).logits, torch.load(tmp_path / "logits"))


# --------------------------------------------------------------------------- all experts of a layer in one tensor


@pytest.mark.parametrize("scheme", ["nf4 --double-quant", "int8"])
def test_experts_in_one_tensor_decode_only_what_is_hit_and_save_bit_for_bit(tmp_path, cli, scheme):
    from moeconv.families.model import open_model
    from moeconv.tensors import decode_weight

    packed = stacked(tmp_path, cli, scheme)
    decoded = open_model(packed)
    stock = load(tmp_path / "source")
    for name, parameter in stock.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            parameter.data.copy_(decode_weight(decoded, name))
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = load(packed, experts_implementation=implementation)
        stock.set_experts_implementation(implementation)
        for ids in (tokens(3, 9), tokens(1, 1)):
            assert torch.equal(model(ids).logits, stock(ids).logits), implementation
    module = experts_of(model)[0]
    assert held_bytes(module) <= (0.35 if scheme != "int8" else 0.57) * held_bytes(experts_of(stock)[0])  # biases too
    few = module._decoded(torch.tensor([1, 6]), dtype=torch.bfloat16)
    assert few.gate_up_proj.shape[0] == few.gate_up_proj_bias.shape[0] == 2
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    whole = load(packed, device_map="auto")
    assert torch.equal(whole(ids).logits, model(ids).logits)


def test_damaged_codes_of_experts_in_one_tensor_raise(tmp_path, cli):
    packed = stacked(tmp_path, cli)
    down = "model.layers.1.mlp.experts.down_proj"

    def other_shape(weights):
        state = bytes(weights[f"{down}.quant_state"]).replace(b"[96, 64]", b"[64, 96]")
        weights[f"{down}.quant_state"] = torch.tensor(list(state), dtype=torch.uint8)

    changes = {
        "absmax": lambda weights: weights.pop(f"{down}.absmax"),
        "expected U8": lambda weights: weights.update({down: weights[down][:7].clone()}),
        "quant_state has the shape": other_shape,
    }
    for i, (words, change) in enumerate(changes.items()):
        with pytest.raises(InputError, match=words):
            load(damaged(packed, tmp_path / str(i), change))


def test_slices_of_a_tensor_share_a_file_and_do_not_depend_on_the_workers(tmp_path, cli):
    first = stacked(tmp_path, cli)
    second = tmp_path / "second"
    flags = ("--format", "bitsandbytes", "--self-contained", "--double-quant", "--json")
    for more in (("--jobs", 3), ("--shard-size", "5kB")):
        done = cli("quantize", tmp_path / "source", second, *flags, *more, "--overwrite")
        assert done.code == 0, done.out
        files = list(second.glob("*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        whole = load_file(first / "model.safetensors")
        assert tensors.keys() == whole.keys() and all(torch.equal(t, whole[n]) for n, t in tensors.items())
    assert len(files) > 3
