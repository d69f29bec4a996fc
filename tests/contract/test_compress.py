"""Contract: every MoE row pruned and quantized by the real command, then run by stock transformers."""

from __future__ import annotations

import json

import pytest
import torch

from moeconv.families.model import open_model
from moeconv.families.rows.mistral import MIXTRAL
from moeconv.quantize.formats import FORMATS
from moeconv.tensors import read_tensor
from tests.contract.stock import (
    MOE_CASES,
    dropped,
    load,
    logits,
    relative_difference,
    row_of,
    run_imports,
    save_stock,
    skip_where_stock_is_broken,
)

torch.set_num_threads(1)
SEPARATE = [case for case in MOE_CASES if not row_of(case).tensors.packed]
# all experts of a layer in one tensor, which bitsandbytes' format packs as it lies
STACKED = [
    case
    for case in MOE_CASES
    if case not in SEPARATE
    and not any(way.flat or key == "expert.gate" for key, way in row_of(case).tensors.packed.items())
]
_USUAL = [f for f in FORMATS.values() if f.shard is None and f.takes(MIXTRAL)]
IN_PLACE = [f for f in _USUAL if not getattr(f.form(MIXTRAL), "only_served", False)]
LAID_OUT = [f for f in _USUAL if f not in IN_PLACE]  # in a layout of other readers
_FIRST = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # these in every scheme, the others in the first of a format
_STACKED_FIRST = ("granitemoe", "gpt_oss", "llama4")
STACKING = [f for f in IN_PLACE if f.stack is not None]


def nesting(formats):
    """(format, its first scheme, with double quantization where it goes with it)."""
    return [(f, f.names[0] + " --double-quant" * f.schemes[0].nests) for f in formats]


KINDS = [
    (c, f.name, s.name)
    for f in IN_PLACE
    for c in SEPARATE
    for s in f.schemes[: None if c in _FIRST else 1]
    if not s.inputs  # those are measured on text
]
for _f in STACKING:
    KINDS += [(c, _f.name, s.name) for c in STACKED for s in _f.schemes[: None if c in _STACKED_FIRST else 1]]
    KINDS += [(c, _f.name, f"{s.name} --double-quant") for c in _STACKED_FIRST for s in _f.schemes if s.nests][:3]


def in_blocks(format, scheme):
    """Whether a scheme packs blocks that are larger than the matrices of these models."""
    return min((size for size in format.scheme(scheme.split()[0]).groups if size), default=1) > 64


def flags_of(format, scheme):
    return ("--format", format, "--scheme", *scheme.split())


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("keep", [6, 4])
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_pruned_equals_the_unpruned_with_the_dropped_experts_masked(tmp_path, cli, case, keep):
    skip_where_stock_is_broken(case)
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32)
    done = cli("prune", source, tmp_path / "pruned", "--keep", keep, "--json")
    assert done.code == 0, done.out
    kept = done.json["prune"]["keep"]
    assert all(len(experts) == keep for experts in kept.values())
    model = load(source)
    whole = logits(model)
    with dropped(model, open_model(source), kept):
        masked = logits(model)
    assert relative_difference(masked, whole) > 1e-3, "the dropped experts did nothing"
    assert relative_difference(masked, logits(load(tmp_path / "pruned"))) <= 1e-5


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("case", list(MOE_CASES))
def test_dry_run_states_the_bytes_that_are_written(tmp_path, cli, case):
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)
    steps: list[tuple] = [("prune", "--keep", 4)]
    if case in SEPARATE:
        steps += [("quantize", *flags_of(f.name, f.names[-1])) for f in IN_PLACE if not in_blocks(f, f.names[-1])]
    if case in STACKED:
        steps += [("quantize", *flags_of(f.name, s), "--shard-size", "30kB") for f, s in nesting(STACKING)]
    for f in LAID_OUT:
        form = f.form(row_of(case))
        if form is not None and open_model(source).expert_width % 32 == 0:
            steps.append(("quantize", *flags_of(f.name, f.names[-1]), "--shard-size", "30kB"))
    for i, (verb, *flags) in enumerate(steps):
        out = tmp_path / f"out{i}"
        promised = cli(verb, source, out, *flags, "--dry-run", "--json").json
        done = cli(verb, source, out, *flags, "--json").json
        shards = [f for f in done["files"] if f.endswith(".safetensors")]
        assert promised["bytes"] == done["bytes"] == sum((out / f).stat().st_size for f in shards)
        assert promised["plan_id"] == done["plan_id"] or promised["prune"]["keep"] is None


def _dequantized(source, quantized, folder):
    """A stock bf16 checkpoint that holds the decoded weights of a quantized one."""
    from safetensors.torch import load_file, save_file

    from moeconv.tensors import decode_weight

    model = open_model(quantized)
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, role in open_model(source).roles.items():
        if role.group == "expert":
            tensors[name] = decode_weight(model, name, torch.bfloat16).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow(keep=6)
@pytest.mark.parametrize(("case", "format", "scheme"), KINDS)
def test_what_transformers_loads_computes_with_the_decoded_weights(tmp_path, cli, case, format, scheme):
    skip_where_stock_is_broken(case)
    record = FORMATS[format]
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)
    done = cli("quantize", source, tmp_path / "packed", *flags_of(format, scheme), "--json")
    if in_blocks(record, scheme):  # these models are narrower than a block
        assert done.code == 3 and "128" in done.json["error"]["message"]
        return
    assert done.code == 0, done.out
    word = done.json["quantize"]["loads"]["transformers"]
    assert cli("verify", tmp_path / "packed", "--json").json["ok"]
    if word not in ("ok", "dequantized"):
        return
    run_imports(record)
    plain = load(_dequantized(source, tmp_path / "packed", tmp_path / "plain"), dtype=torch.bfloat16)
    packed = load(tmp_path / "packed", dtype=torch.bfloat16)
    plain.config._is_quantized = True  # jamba's class adds a bias at another place then
    assert torch.equal(logits(plain), logits(packed))
    stored = [p for n, p in packed.named_parameters() if ".experts." in n and p.dtype in (torch.uint8, torch.int8)]
    assert bool(stored) == (word == "ok"), "whether the experts are packed in memory is not what the format says"
    if case in STACKED:
        packed.save_pretrained(tmp_path / "again")
        before, after = (open_model(tmp_path / folder) for folder in ("packed", "again"))
        assert before.roles.keys() == after.roles.keys()
        for name in (name for name, role in before.roles.items() if role.group == "expert"):
            assert torch.equal(read_tensor(before.checkpoint, name), read_tensor(after.checkpoint, name)), name
        assert torch.equal(logits(load(tmp_path / "again", dtype=torch.bfloat16)), logits(packed))


def test_scales_of_either_sign_load_in_transformers_as_the_decoded_weights(tmp_path, cli):
    source = save_stock(tmp_path / "moe", *MOE_CASES["qwen3_moe"], dtype=torch.bfloat16)
    done = cli("quantize", source, tmp_path / "packed", "--method", "mse", "--json")
    assert done.code == 0, done.out
    model = open_model(tmp_path / "packed")
    scales = [name for name, role in model.roles.items() if role.part == "scale"]
    assert any(bool((read_tensor(model.checkpoint, name) < 0).any()) for name in scales)
    plain = load(_dequantized(source, tmp_path / "packed", tmp_path / "plain"), dtype=torch.bfloat16)
    assert torch.equal(logits(plain), logits(load(tmp_path / "packed", dtype=torch.bfloat16)))


@pytest.mark.parametrize(("format", "scheme"), [*nesting(STACKING), *((f, f.names[-1]) for f in STACKING)])
@pytest.mark.parametrize("case", ["granitemoe", "gpt_oss"])
def test_codes_of_all_experts_in_one_tensor_are_pruned_as_what_they_decode_to(tmp_path, cli, case, format, scheme):
    run_imports(format)
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)
    assert cli("quantize", source, tmp_path / "packed", *flags_of(format.name, scheme), "--json").code == 0
    plain = _dequantized(source, tmp_path / "packed", tmp_path / "plain")
    for folder in (tmp_path / "packed", plain):
        done = cli("prune", folder, folder.with_suffix(".pruned"), "--keep", 5, "--criterion", "magnitude", "--json")
        assert done.code == 0, done.out
    assert cli("verify", tmp_path / "packed.pruned", "--json").json["ok"]
    pruned, decoded = (load(tmp_path / f"{name}.pruned", dtype=torch.bfloat16) for name in ("packed", "plain"))
    assert torch.equal(logits(pruned), logits(decoded))


def test_what_a_router_cannot_give_is_refused_before_any_calibration(tmp_path, cli):
    """Groups of equal size, two experts in each, enough for every token in those that it may use."""
    source = save_stock(tmp_path / "moe", *MOE_CASES["deepseek_v3"], dtype=torch.bfloat16)
    for keep, word in ((5, "2 groups of equal size"), (2, "1 in each of 2 groups"), (1, "fewer than the 2")):
        refused = cli("prune", source, tmp_path / "out", "--keep", keep, "--data", tmp_path / "none.txt", "--json")
        assert refused.code == 2 and word in refused.json["error"]["message"], refused.out
    kept = cli("prune", source, tmp_path / "out", "--keep", 4, "--json").json["prune"]["keep"]
    assert all(sum(e < 4 for e in layer) == 2 for layer in kept.values())
    refused = cli("prune", source, tmp_path / "out", "--keep", 4, "--protect", "1:0,1:1,1:2", "--json")
    assert refused.code == 2 and "group 0" in refused.json["error"]["message"]


@pytest.mark.parametrize("case", [case for case in MOE_CASES if case not in SEPARATE])
def test_experts_in_one_tensor_are_packed_only_for_our_own_loader(tmp_path, cli, case):
    """No stock runtime reads packed weights for them, so nothing is written for one; test_served_layout.py has the
    families for which an engine does."""
    source = save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.bfloat16)
    served = row_of(case).tensors.served is not None
    for format in (
        f for f in IN_PLACE if (f.stack is None or case not in STACKED) and not (served and f.form(row_of(case)))
    ):
        refused = cli("quantize", source, tmp_path / "out", "--format", format.name, "--json")
        assert refused.code == 3 and "one tensor" in refused.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_experts_that_lie_transposed_to_their_class_are_not_packed(tmp_path, cli):
    """The hub's Qwen3-VL-MoE: transformers turns its matrices while it loads them, which codes cannot be."""
    from safetensors.torch import load_file, save_file

    source = save_stock(tmp_path / "moe", *MOE_CASES["qwen3_vl_moe"], dtype=torch.bfloat16)
    for file in source.glob("*.safetensors"):
        turned = {n: t.mT.contiguous() if "mlp.experts" in n else t for n, t in load_file(file).items()}
        save_file(turned, file, metadata={"format": "pt"})
    refused = cli("quantize", source, tmp_path / "out", "--format", STACKING[0].name, "--json")
    assert refused.code == 3 and "transposed" in refused.json["error"]["message"], refused.out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_refit_does_not_depend_on_a_norm_behind_the_experts(tmp_path, cli):
    from safetensors.torch import load_file, save_file

    from tests.words import add_tokenizer, text

    kind, config = MOE_CASES["axk1"]
    (tmp_path / "text").write_text(text(3000))
    made = []
    for scale in (1.0, 0.05):
        source = add_tokenizer(
            save_stock(tmp_path / f"{scale}", kind, config | {"num_hidden_layers": 2}, dtype=torch.float32)
        )
        for file in source.glob("*.safetensors"):
            scaled = {n: t * scale if "post_mlp_layernorm" in n else t for n, t in load_file(file).items()}
            save_file(scaled, file, metadata={"format": "pt"})
        flags = ("--keep", 4, "--refit", "--criterion", "magnitude", "--data", tmp_path / "text", "--seq-len", 32)
        done = cli("prune", source, tmp_path / f"{scale}-pruned", *flags, "--tokens", 2048, "--json")
        assert done.code == 0, done.out
        before, after = open_model(source), open_model(tmp_path / f"{scale}-pruned")
        kept = done.json["prune"]["keep"]["1"]
        names = [
            (after.expert_name("down", layer=1, expert=i), before.expert_name("down", layer=1, expert=e))
            for i, e in enumerate(kept)
        ]
        made.append([read_tensor(after.checkpoint, new) for new, _ in names])
        assert not torch.equal(made[-1][0], read_tensor(before.checkpoint, names[0][1]))
    for one, other in zip(*made):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_refit_knows_that_routed_and_shared_outputs_are_averaged(tmp_path, cli):
    """Halved weights that are summed are the same model, so the refitted ones are the same too."""
    from safetensors.torch import load_file, save_file

    from tests.words import add_tokenizer, text

    kind, config = MOE_CASES["cohere2_moe"]
    made = {}
    (tmp_path / "text").write_text(text(3000))
    for word in ("average", "sum"):
        said = config | {"shared_expert_combination_strategy": word}
        source = add_tokenizer(save_stock(tmp_path / word, kind, said, dtype=torch.float32))
        for file in source.glob("*.safetensors") if word == "sum" else ():
            tensors = load_file(file)
            halved = {n: t / 2 if "experts" in n and "down_proj" in n else t for n, t in tensors.items()}
            save_file(halved, file, metadata={"format": "pt"})
        flags = ("--keep", 4, "--refit", "--data", tmp_path / "text", "--seq-len", 32, "--tokens", 2048)
        done = cli("prune", source, tmp_path / f"{word}-pruned", *flags, "--json")
        assert done.code == 0, done.out
        made[word] = logits(load(source)), logits(load(tmp_path / f"{word}-pruned"))
    assert relative_difference(made["average"][0], made["sum"][0]) <= 1e-5
    assert relative_difference(made["average"][1], made["sum"][1]) <= 1e-3


@pytest.mark.parametrize("case", ["hy_v4", "qwen4_exp"])
def test_refit_of_experts_before_a_mixer_of_several_residual_streams(tmp_path, cli, case):
    """What the experts add is weighed per stream, so the refit corrects the output of the FFN."""
    from tests.words import add_tokenizer, text

    (tmp_path / "text").write_text(text(3000))
    source = add_tokenizer(save_stock(tmp_path / "moe", *MOE_CASES[case], dtype=torch.float32))
    flags = ("--keep", 4, "--refit", "--data", tmp_path / "text", "--seq-len", 32, "--tokens", 2048)
    done = cli("prune", source, tmp_path / "out", *flags, "--json")
    assert done.code == 0, done.out
    layers = done.json["prune"]["refit"]["layers"]
    assert layers and all(0 < layer["error_after"] < layer["error_before"] for layer in layers)
