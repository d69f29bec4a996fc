"""The layer stream gives the stock model's logits and shows what each layer really does; and packed weights decode."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch

from moeconv.errors import InputError, OutputError, UsageError
from moeconv.families.model import open_model
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.plan.execute import execute
from moeconv.plan.kernels.stored import to_bytes, to_tensor
from moeconv.quantize.formats import FORMATS
from moeconv.quantize.planner import plan_quantize
from moeconv.stream.device import pick_device
from moeconv.stream.layers import LayerStream, layer_bytes
from moeconv.tensors import decode_weight, plain_names, read_tensor

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 6}
MIXED = SLIDING | {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "max_window_layers": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"shards": 3}),
    "llama-tied-biased": ("llama", {"tied": True, "attention_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral-sliding": ("mistral", {"sliding_window": 5}),
    "qwen2-mixed-sliding": ("qwen2", MIXED | {"tied": True, "attention_bias": True}),
    "qwen3-mixed-sliding": ("qwen3", MIXED),
    "mixtral": ("mixtral", {"shards": 2, "sliding_window": 7}),
    "qwen2_moe-dense-layer": ("qwen2_moe", MIXED | {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", {"tied": True, "mlp_only_layers": [0]}),
    "qwen3_moe-all-sliding": ("qwen3_moe", SLIDING | {"norm_topk_prob": False}),
    "olmoe": ("olmoe", {"norm_topk_prob": False, "clip_qkv": 0.2, "output_router_logits": True}),
}

CASES |= {family: (family, {}) for family in (*tiny.DENSE, *tiny.MOE) if family not in CASES}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: Path, family: str, **config: Any) -> Path:
    build = tiny.make_moe if family in tiny.MOE else tiny.make_dense
    return build(path, family, layers=3, **config)


def windows(n: int = 5, length: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, (n, length))


def stock(path: Path, **keywords: Any):
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "experts_implementation": "eager", "output_loading_info": True} | keywords
    model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def streamed_logits(path: Path, ids: np.ndarray, *, tail_batch: int = 2, **keywords: Any) -> torch.Tensor:
    stream = LayerStream(open_model(path), ids, batch_size=2, **keywords).run()
    return torch.cat([logits for _, logits in stream.logits(batch_size=tail_batch)])


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_stock_models(tmp_path: Path, case: str) -> None:
    family, config = CASES[case]
    path = make(tmp_path / "model", family, **config)
    ids = windows()
    model = stock(path)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor(ids[i : i + 2])).logits for i in range(0, len(ids), 2)])
    assert expected.std() > 0.05
    assert torch.equal(streamed_logits(path, ids), expected)
    assert (streamed_logits(path, ids, tail_batch=1) - expected).abs().max() < 1e-5


def test_bfloat16_and_grouped_experts(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "qwen3_moe")
    ids = windows()
    model = stock(path, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor(ids[i : i + 2])).logits for i in range(0, len(ids), 2)])
    assert torch.equal(streamed_logits(path, ids, dtype=torch.bfloat16, experts="grouped_mm"), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama"])
def test_batches_show_what_the_layer_computes(tmp_path: Path, family: str) -> None:
    path = make(tmp_path / "model", family)
    ids = windows(n=2)
    model = stock(path)
    seen: list[dict[str, Any]] = []
    for decoder in model.model.layers:
        record: dict[str, Any] = {}
        seen.append(record)
        decoder.post_attention_layernorm.register_forward_pre_hook(lambda _m, a, r=record: r.update(residual=a[0]))
        decoder.mlp.register_forward_hook(lambda _m, a, o, r=record: r.update(ffn_input=a[0], ffn_output=o))
        decoder.register_forward_hook(lambda _m, a, o, r=record: r.update(inputs=a[0], outputs=o))
        if hasattr(decoder.mlp, "experts"):
            decoder.mlp.gate.register_forward_hook(
                lambda _m, _a, o, r=record: r.update(router_logits=o[0], top_k_weights=o[1], top_k_index=o[2])
            )
    with torch.no_grad():
        model(torch.tensor(ids))
    count = 0
    for layer in LayerStream(open_model(path), ids).layers():
        for batch in layer.batches():
            assert batch.rows == slice(0, 2)
            for field, value in seen[layer.index].items():
                mine = getattr(batch, field)
                assert torch.equal(mine, value.reshape(mine.shape)), field
            assert (batch.router_logits is None) == (layer.experts is None) == (family == "llama")
            count += 1
    assert count == 3


def test_a_pass_can_be_repeated_until_it_advances(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "mixtral")
    stream = LayerStream(open_model(path), windows(), batch_size=2)
    for layer in stream.layers():
        first = torch.cat([b.outputs for b in layer.batches(advance=False)])
        second = torch.cat([b.outputs for b in layer.batches()])
        assert torch.equal(first, second)
        with pytest.raises(ValueError, match="already been run"):
            next(layer.batches())
    repeated = torch.cat([logits for _, logits in stream.logits(batch_size=2)])
    assert torch.equal(repeated, streamed_logits(path, windows()))


def test_a_pass_left_halfway_is_no_silent_damage(tmp_path: Path) -> None:
    stream = LayerStream(open_model(make(tmp_path / "model", "mixtral")), windows(), batch_size=2)
    layers = stream.layers()
    for _ in next(layers).batches():
        break
    with pytest.raises(ValueError, match="already been run"):
        next(layers)


def test_weights_changed_in_place_take_effect(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "mixtral")
    stream = LayerStream(open_model(path), windows(), batch_size=2)
    for layer in stream.layers():
        assert layer.router is not None
        with torch.no_grad():
            layer.router.weight.neg_()
    changed = torch.cat([logits for _, logits in stream.logits(batch_size=2)])
    assert (changed - streamed_logits(path, windows())).abs().max() > 1e-3


def test_only_one_layer_holds_weights(tmp_path: Path) -> None:
    stream = LayerStream(open_model(make(tmp_path / "model", "qwen3_moe")), windows(), batch_size=2)

    def real() -> set[str]:
        return {name for name, p in stream.skeleton.module.named_parameters() if not p.is_meta}

    assert not real()
    for layer in stream.layers():
        assert real() == {n for n in stream.skeleton.state if n.startswith(f"model.layers.{layer.index}.")}
    for _ in stream.logits():
        assert real() == {"model.norm.weight", "lm_head.weight"}
    assert not real()


def test_meter_hears_of_layers_and_bytes(tmp_path: Path) -> None:
    model = open_model(make(tmp_path / "model", "llama"))
    heard: list[Any] = []

    class Meter:
        def start(self, **keywords: Any) -> None: ...
        def note(self, text: str) -> None: ...
        def advance(self, nbytes: int) -> None:
            heard.extend([nbytes] if nbytes else [])  # none: a batch was computed

        def part_done(self) -> None:
            heard.append("layer")

    LayerStream(model, windows(), meter=Meter()).run()
    assert heard == [x for i in range(3) for x in (layer_bytes(model, i), "layer")]


def test_activations_beyond_the_budget_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "model", "llama")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stream = LayerStream(open_model(path), windows(), batch_size=2, max_memory=1000)
    assert stream.hidden.untyped_storage().filename is not None
    assert not list(tmp_path.glob("moeconv-*"))  # its name is gone, so that nothing can be left behind
    logits = torch.cat([logits for _, logits in stream.run().logits(batch_size=2)])
    assert torch.equal(logits, streamed_logits(path, windows()))

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match="no room for 15360 bytes"):
        LayerStream(open_model(path), windows(), max_memory=1000)
    assert not list(tmp_path.glob("moeconv-*"))


def test_refusals(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "llama")
    model = open_model(path)
    with pytest.raises(InputError, match="token id 64 is outside"):
        LayerStream(model, windows() + 1)
    with pytest.raises(InputError, match="no tokens"):
        LayerStream(model, np.zeros((0, 8), np.int64))
    with pytest.raises(UsageError, match="batch-size"):
        LayerStream(model, windows(), batch_size=0)
    with pytest.raises(ValueError, match="after all layers were run"):
        next(LayerStream(model, windows()).logits())
    tiny.edit_json(path / "config.json", hidden_act="no_such_function")
    with pytest.raises(InputError, match="cannot build"):
        LayerStream(open_model(path), windows())
    with pytest.raises(UsageError, match="finds no CUDA"):
        pick_device("cuda")
    assert pick_device("cpu").type == pick_device("auto").type == "cpu"


@pytest.mark.parametrize("what", ["tokens", "embedding"])
def test_layers_get_the_tokens_of_their_batch_but_no_second_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    stock_forward = LlamaModel.forward

    def forward(self: Any, input_ids: Any = None, **keywords: Any) -> Any:
        given = input_ids if what == "tokens" else self.embed_tokens(input_ids)
        return stock_forward(self, input_ids=input_ids, extra=given, **keywords)

    model = open_model(make(tmp_path / "model", "llama"))
    LayerStream(model, windows(), batch_size=2)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    if what == "embedding":
        with pytest.raises(InputError, match="cannot be run layer by layer"):
            LayerStream(model, windows(), batch_size=2)
        return
    stream = LayerStream(model, windows(), batch_size=2)
    for rows in stream.rows():
        _, keywords = stream.arguments(rows, 1)
        assert torch.equal(cast("torch.Tensor", keywords["extra"]), stream.windows[rows])
    # masks and rotary embeddings are kept once
    first, last = (stream.arguments(rows, 0)[1] for rows in (slice(0, 2), slice(2, 4)))
    assert cast("tuple", first["position_embeddings"])[0] is cast("tuple", last["position_embeddings"])[0]


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "llama")
    tiny.edit_json(path / "config.json", num_key_value_heads=4)  # k and v have rows for 2
    with pytest.raises(InputError, match=r"'model.layers.0.self_attn.k_proj.weight' has shape \[16, 32\]"):
        open_model(path)


def test_config_cannot_ask_for_code(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "mixtral")
    tiny.edit_json(
        path / "config.json", attn_implementation="someone/kernel", experts_implementation="someone/kernel",
        auto_map={"AutoModelForCausalLM": "modeling.Evil", "AutoConfig": "modeling.Evil"},
    )  # fmt: skip
    (path / "modeling.py").write_text("raise SystemExit('this code ran')")
    skeleton = LayerStream(open_model(path), windows()).skeleton
    assert skeleton.module.config._attn_implementation == "sdpa"
    assert skeleton.module.config._experts_implementation == "eager"


# -- tensors.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I8", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3"])
def test_bytes_round_trip(dtype: str) -> None:
    data = bytearray(np.random.default_rng(0).integers(0, 2, 48, dtype=np.uint8).tobytes())
    size = tiny_size(dtype)
    tensor = to_tensor(bytearray(data), dtype, (2, 24 // size))
    assert tensor.shape == (2, 24 // size)
    assert bytes(to_bytes(tensor)) == bytes(data)
    if tensor.shape[1] > 1:
        assert len(to_bytes(tensor.T)) == 48
        assert bytes(to_bytes(tensor.T)) != bytes(data)  # in the order of the view, not of the memory


def tiny_size(dtype: str) -> int:
    return {"F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}.get(dtype, 1)


def test_empty_and_scalar_tensors() -> None:
    assert to_tensor(bytearray(), "F32", (0, 4)).shape == (0, 4)
    assert bytes(to_bytes(torch.tensor(1, dtype=torch.uint8))) == b"\x01"
    with pytest.raises(InputError, match="no dtype"):
        to_tensor(bytearray(1), "F4", (2,))


QUANTIZED = [
    (f.name, s.name)
    for f in FORMATS.values()
    if f.takes(MIXTRAL) and f.shard is None
    for s in f.schemes
    if not s.inputs  # those are measured on text
]


@pytest.mark.parametrize(("format", "scheme"), QUANTIZED)
def test_packed_experts_stream_as_what_they_decode_to(tmp_path: Path, format: str, scheme: str) -> None:
    plain = make(
        tmp_path / "plain", "qwen3_moe", **tiny.packable(FORMATS[format].scheme(scheme), hidden=64, intermediate=128)
    )
    source = open_model(plain)
    plan = plan_quantize(source, format=format, scheme=scheme, group_size="auto")
    execute(plan, source=source.checkpoint, out=tmp_path / "packed")
    packed = open_model(tmp_path / "packed")
    if packed.family.only_served:  # experts in a layout that no class of transformers has
        with pytest.raises(InputError, match="layout"):
            streamed_logits(tmp_path / "packed", windows())
        return
    names = [name for name, _ in plain_names(packed)]
    assert sorted(names) == sorted(source.checkpoint.tensors)

    decoded: tiny.Tensors = {}
    for name in names:
        weight = decode_weight(packed, name).float()  # rounded as the runtimes round it
        original = read_tensor(source.checkpoint, name).float()
        error = (weight - original).norm() / original.norm()
        assert (error > 0) == (".experts." in name)
        assert error < FORMATS[format].scheme(scheme).limit / 2
        decoded[name] = ("F32", tuple(weight.shape), bytes(to_bytes(weight)))
    tiny.write_shards(tmp_path / "plain", decoded)
    expected = streamed_logits(tmp_path / "plain", windows())
    assert torch.equal(streamed_logits(tmp_path / "packed", windows()), expected)


def test_packed_experts_give_what_transformers_computes_with_them(tmp_path: Path) -> None:
    source = open_model(make(tmp_path / "plain", "qwen3_moe", hidden=64, intermediate=128))
    plan = plan_quantize(source, format="compressed-tensors", scheme="int4", group_size="auto")
    execute(plan, source=source.checkpoint, out=tmp_path / "packed")
    model = stock(tmp_path / "packed", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor(windows()[i : i + 2])).logits for i in range(0, 5, 2)])
    assert torch.equal(streamed_logits(tmp_path / "packed", windows(), dtype=torch.bfloat16), expected)


def test_an_incomplete_packing_is_refused(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", "mixtral", hidden=64, intermediate=64)
    source = open_model(plain)
    plan = plan_quantize(source, format="compressed-tensors", scheme="int8", group_size="auto")
    execute(plan, source=source.checkpoint, out=tmp_path / "packed")
    tensors = tiny.read_tensors(tmp_path / "packed")
    lost = next(name for name in tensors if name.endswith("experts.1.w1.weight_scale"))
    del tensors[lost]
    for shard in (tmp_path / "packed").glob("*.safetensors*"):
        shard.unlink()
    tiny.write_shards(tmp_path / "packed", tensors)
    with pytest.raises(InputError, match=f"'{lost}' is missing"):
        open_model(tmp_path / "packed")
    with pytest.raises(KeyError):
        decode_weight(source, "no.such.weight")
