"""Inputs that are no checkpoint, or not quite: what each is, what is taken as transformers takes it, and what to do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny import edit_json, make_dense, make_moe, read_tensors, write_shards
from words import add_tokenizer, text

from moeconv.checkpoint.paths import follow_links
from moeconv.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint
from moeconv.checkpoint.strangers import KINDS
from moeconv.errors import InputError, Unsupported
from moeconv.families.find import accepted, find_family
from moeconv.families.model import open_model
from moeconv.upcycle.planner import plan_upcycle

# -- directories that are no checkpoint ------------------------------------------------------------------------------


def test_an_adapter_says_whose_it_is(tmp_path: Path, cli) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = cli("prune", folder, tmp_path / "out", "--ratio", 0.5, "--json")
    assert done.code == 3
    error = done.json["error"]
    assert "adapter (LORA) of someone/base" in error["message"] and "merge_and_unload" in error["hint"]
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"is an adapter \(PEFT\), not a model"):
        Checkpoint(folder)


@pytest.mark.parametrize("lost", [(), (2,)])
def test_shards_without_an_index(tmp_path: Path, lost: tuple[int, ...]) -> None:
    source = make_dense(tmp_path / "source", shards=3)
    (source / INDEX_NAME).unlink()
    for number in lost:
        (source / f"model-{number:05d}-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="without an index") as caught:
        Checkpoint(source)
    assert f"holds {3 - len(lost)} of 3 shards" in caught.value.message
    assert ("number 2 of 3 missing" in caught.value.message) == bool(lost)
    assert "model.safetensors.index.json" in caught.value.hint


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("consolidated.safetensors", "Mistral's original layout"),
        ("consolidated-00001-of-00002.safetensors", "Mistral's original layout"),
        ("consolidated.00.pth", "Meta's original layout"),
        ("model_index.json", "diffusers"),
        ("onnx/", "ONNX"),
        ("decoder_model.onnx", "ONNX"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("weights.00.npz", "MLX"),
        ("openvino_model.bin", "pickled"),
        ("global_step100/", "trainer's own sharded state"),
        ("__0_0.distcp", "trainer's own sharded state"),
        ("pytorch_model-00001-of-00002.bin", "pickled"),
        ("model-q4_k_m.gguf", "GGUF"),
        ("pytorch_model.safetensors", "rename it to model.safetensors"),
        ("training_args.bin", "directory"),
    ],
)
def test_what_is_there_is_named(tmp_path: Path, name: str, says: str, with_config: bool) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert says in caught.value.message + caught.value.hint and caught.value.hint


def test_every_kind_says_what_to_do() -> None:
    assert all(kind.hint.endswith(".") and "{}" in kind.what for kind in KINDS)


def test_a_directory_of_checkpoints_names_them(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000"):
        make_dense(tmp_path / "run" / name)
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    with pytest.raises(InputError, match="contains checkpoints: checkpoint-1000, checkpoint-500") as caught:
        Checkpoint(tmp_path / "run")
    assert "checkpoint-500" in caught.value.hint


def test_a_broken_config_names_its_file_and_line(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "source")
    (source / "config.json").write_text('{\n "model_type": "llama",\n oops\n}')
    with pytest.raises(InputError) as caught:
        Checkpoint(source)
    assert str(source / "config.json") in caught.value.message and "line 3" in caught.value.message


# -- values that only Python's JSON has ------------------------------------------------------------------------------


def test_infinity_in_config_is_read_and_written_back(tmp_path: Path, cli) -> None:
    source = make_moe(tmp_path / "source", time_step_limit=[0.0, math.inf], other=math.nan)
    assert "Infinity" in (source / "config.json").read_text()
    done = cli("prune", source, tmp_path / "out", "--keep", 2, "--criterion", "random", "--no-check", "--json")
    assert done.code == 0, done.out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["time_step_limit"] == [0.0, math.inf] and math.isnan(written["other"])
    assert cli("verify", tmp_path / "out").code == 0
    for value in (math.inf, math.nan):
        edit_json(source / "config.json", rms_norm_eps=value)
        with pytest.raises(InputError, match="rms_norm_eps must be a number"):
            open_model(source)


# -- links -----------------------------------------------------------------------------------------------------------


def away(path: Path) -> Path:
    """Every file of a checkpoint as a link into a directory beside it."""
    cache = path.with_name(f"cache of {path.name}")
    cache.mkdir()
    for file in list(path.iterdir()):
        shutil.move(file, cache / file.name)
        file.symlink_to(cache / file.name)
    return path


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A checkpoint as old downloads into a local directory made it: every file a link into a cache elsewhere."""
    source = make_moe(tmp_path / "source", shards=2)
    (source / "tokenizer.json").write_text("{}")
    return away(source)


def test_links_are_followed_when_asked_for(linked: Path, tmp_path: Path, cli) -> None:
    refused = cli("inspect", linked, "--json")
    assert refused.code == 3 and "--follow-links" in refused.json["error"]["hint"]
    assert cli("inspect", linked, "--follow-links", "--json").json["kind"] == "moe"
    keep = ("--keep", 2, "--criterion", "random", "--no-check")
    assert cli("prune", linked, tmp_path / "out", *keep).code == 3
    done = cli("prune", linked, tmp_path / "out", *keep, "--follow-links", "--json")
    assert done.code == 0 and "tokenizer.json" in done.json["files"], done.out
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert cli("verify", linked, "--follow-links").code == 0
    assert cli("inspect", linked).code == 3  # the switch holds for its own command alone


@pytest.mark.slow
def test_links_hold_for_all_that_a_command_reads_and_for_its_check(tmp_path: Path, cli) -> None:
    """The check runs in a process of its own; siblings and references are opened on the way."""
    dense, sibling = (away(add_tokenizer(make_dense(tmp_path / n, vocab=128, seed=i))) for i, n in enumerate("ab"))
    (tmp_path / "text.txt").write_text(text(400))
    made = cli("upcycle", dense, tmp_path / "moe", "--experts-from", dense, "--experts-from", sibling, "--json")
    assert made.code == 3, made.out
    links = ("--follow-links", "--json")
    made = cli("upcycle", dense, tmp_path / "moe", "--experts-from", dense, "--experts-from", sibling, *links)
    assert made.code == 0 and made.json["upcycle"]["equivalence"]["checked"], made.out
    judged = cli("evaluate", tmp_path / "moe", "--reference", dense, "--data", tmp_path / "text.txt", *links)
    assert judged.code == 0, judged.out
    told = cli("report", tmp_path / "moe", tmp_path / "page.html", "--reference", dense, *links)
    assert told.code == 0, told.out


def test_every_command_that_reads_a_checkpoint_has_the_switch(cli) -> None:
    from moeconv.cli.commands import VERBS
    from moeconv.options import ReadOptions
    from moeconv.recipe.read import GROUPS

    readers = [verb for verb in VERBS if any(p.name in ("model", "source") for p in verb.positionals)]
    assert len(readers) >= 9 and all(ReadOptions in verb.groups for verb in readers)
    assert all(ReadOptions in groups for groups in GROUPS.values())


def test_links_in_python_and_in_recipes(linked: Path, tmp_path: Path, cli) -> None:
    with pytest.raises(InputError, match="leaves"):
        open_model(linked)
    assert open_model(linked, follow_links=True).num_experts == 4
    with follow_links():
        assert open_model(linked).checkpoint.read("model.norm.weight")
        with follow_links(False):
            assert open_model(linked)
    recipe = tmp_path / "recipe.yaml"
    steps = (
        "name: r\nsteps:\n  - step: prune\n    from: {}\n    to: {}\n"
        "    with: {{keep: 2, criterion: random, no_check: true{}}}\n"
    )
    for extra, code in (("", 3), (", follow_links: true", 0)):
        recipe.write_text(steps.format(linked, tmp_path / "made", extra))
        assert cli("run", recipe, "--dry-run").code == code
        assert cli("run", recipe).code == code


def test_a_link_to_nothing_says_so(linked: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache of source")
    with pytest.raises(InputError, match="where nothing is"):
        open_model(linked, follow_links=True)


# -- names -----------------------------------------------------------------------------------------------------------


def renamed(path: Path, change) -> Path:
    tensors = {change(name): tensor for name, tensor in read_tensors(path).items()}
    for old in path.glob("*.safetensors*"):
        old.unlink()
    write_shards(path, tensors)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [lambda name: name.removeprefix("model."), lambda name: f"model.{name}"],
    ids=["without the prefix", "with two"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_base_models_prefix_may_lack_or_double(tmp_path: Path, cli, family: str, change) -> None:
    """As from_pretrained takes both; tests/contract/test_prefixes.py asks transformers itself."""
    make = make_dense if family == "llama" else make_moe
    usual, other = make(tmp_path / "usual", family), renamed(make(tmp_path / "other", family), change)
    one, two = open_model(usual), open_model(other)
    assert set(one.roles) == set(two.roles)
    assert all(one.checkpoint.read(name) == two.checkpoint.read(name) for name in one.roles)
    assert any("prefix 'model.'" in w for w in two.warnings) and not one.warnings
    step = ("upcycle",) if family == "llama" else ("prune",)
    more = () if family == "llama" else ("--keep", 2, "--criterion", "random")
    for source, out in ((usual, "a"), (other, "b")):
        check = () if family == "llama" and source == other else ("--no-check",)
        assert cli(*step, source, tmp_path / out, *more, *check).code == 0
    assert read_tensors(tmp_path / "a") == read_tensors(tmp_path / "b")


def test_names_that_would_fall_together(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "source")
    tensors = read_tensors(source)
    write_shards(source, tensors | {"norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(InputError, match=r"holds 'model\.norm\.weight' twice"):
        open_model(source)


@pytest.mark.parametrize(
    ("change", "tool"),
    [
        (lambda n: f"_orig_mod.{n}", "torch.compile"),
        (lambda n: n.replace("model.", "model._orig_mod.", 1), "torch.compile"),
        (lambda n: f"module.{n}", "DataParallel"),
        (lambda n: n.replace("self_attn", "_fsdp_wrapped_module.self_attn"), "FSDP"),
        (lambda n: f"base_model.model.{n}", "PEFT"),
        (lambda n: n.replace("q_proj.weight", "q_proj.lora_A.weight"), "adapter"),
        (lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), "PEFT"),
        (lambda n: f"_forward_module.{n}", "Lightning"),
        (lambda n: f"pretrained_model.{n}", "TRL"),
    ],
)
def test_names_that_a_training_tool_has_wrapped_are_refused_by_its_name(tmp_path: Path, change, tool: str) -> None:
    source = renamed(make_dense(tmp_path / "source"), change)
    with pytest.raises(InputError, match=tool) as caught:
        open_model(source)
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize("head", ["score.weight", "v_head.summary.weight", "classifier.bias"])
def test_heads_of_other_classes_are_left_out_and_named(tmp_path: Path, cli, head: str) -> None:
    source = make_moe(tmp_path / "source", architectures=["MixtralForSequenceClassification"])
    write_shards(source, read_tensors(source) | {head: ("BF16", (1, 32), bytes(64))})
    done = cli("prune", source, tmp_path / "out", "--keep", 2, "--criterion", "random", "--no-check", "--json")
    assert done.code == 0, done.out
    assert any(head in w and "left out" in w for w in done.json["warnings"])
    assert head not in read_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


@pytest.mark.parametrize(("head", "says"), [("score.weight", "another head"), (None, "base model")])
def test_a_model_without_a_language_models_head(tmp_path: Path, head: str | None, says: str) -> None:
    source = make_dense(tmp_path / "source")
    tensors = {name: t for name, t in read_tensors(source).items() if name != "lm_head.weight"}
    write_shards(source, tensors | ({head: ("BF16", (1, 32), bytes(64))} if head else {}))
    with pytest.raises(InputError, match=r"lm_head\.weight is missing") as caught:
        open_model(source)
    assert says in caught.value.hint
    edit_json(source / "config.json", tie_word_embeddings=True)
    assert open_model(source)


# -- architectures that no step takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says", "hint"),
    [
        ({"model_type": "idefics2", "vision_config": {}}, "around a dense language model", "lists the supported"),
        (
            {"model_type": "paligemma", "vision_config": {}, "text_config": {"model_type": "llama"}},
            "around llama, a dense language model", "as a separate checkpoint",
        ),
        (
            {"model_type": "deepseek_vl_v2", "vision_config": {}, "language_config": {"n_routed_experts": 64}},
            "around a Mixture-of-Experts language model", "",
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder", "moeconv families"),
        ({"model_type": "telechat", "auto_map": {"AutoConfig": "x.Y"}}, "code in the checkpoint", ""),
        ({"model_type": "gemma2"}, "softcap", ""),
        ({"model_type": "qwen3_omni_moe"}, "talker", ""),
        ({"model_type": "mixtrall"}, "unknown architecture", "Did you mean mixtral?"),
        ({"model_type": "bert"}, "an encoder with a head", "moeconv families"),
        ({"model_type": "got_ocr2"}, "around a dense language model", "moeconv families"),
        ({"model_type": "xyz"}, "unknown architecture", "moeconv families"),
    ],
)  # fmt: skip
def test_the_reason_is_given_and_no_list(config: dict[str, object], says: str, hint: str) -> None:
    with pytest.raises(Unsupported) as caught:
        find_family(config)
    assert says in caught.value.message and hint in caught.value.hint
    assert len(caught.value.message) + len(caught.value.hint) < 450


def test_inspect_and_verify_answer_for_what_no_step_takes(tmp_path: Path, cli) -> None:
    source = make_dense(tmp_path / "source", shards=2)
    whole = cli("inspect", source, "--json").json
    edit_json(source / "config.json", model_type="unheard_of")
    found = cli("inspect", source, "--json")
    assert found.code == 0 and set(found.json) == set(whole)
    same = ("bytes", "dtypes", "tensors", "shards", "layers")
    assert {k: found.json[k] for k in same} == {k: whole[k] for k in same}
    assert found.json["kind"] is None and found.json["parameters"]["total"] == whole["parameters"]["total"]
    assert found.json["parameters"]["active"] is None and "unheard_of" in found.json["warnings"][-1]
    assert "unknown" in cli("inspect", source).out
    verified = cli("verify", source, "--json")
    assert verified.code == 0 and verified.json["ok"] and "not checked" in verified.json["warnings"][-1]
    refused = cli("upcycle", source, tmp_path / "out")
    assert refused.code == 3 and "unknown architecture" in refused.err
    (source / "model-00002-of-00002.safetensors").unlink()
    assert cli("inspect", source).code == 3 and cli("verify", source).code == 3


def test_inspect_still_refuses_a_damaged_checkpoint_of_a_known_family(tmp_path: Path, cli) -> None:
    source = make_dense(tmp_path / "source")
    tensors = read_tensors(source)
    write_shards(source, {name: t for name, t in tensors.items() if "k_proj" not in name})
    assert cli("inspect", source).code == 3
    assert (source / SINGLE_NAME).exists()


def test_families_lists_all_that_is_taken(cli) -> None:
    listed = cli("families", "--json").json
    taken = accepted()
    assert {k: tuple(listed[k]) for k in ("dense", "moe")} == {k: taken[k] for k in ("dense", "moe")}
    assert tuple(sorted(listed["multimodal"])) == taken["multimodal"]
    for name in (*taken["dense"], *taken["moe"]):
        assert find_family({"model_type": name}).model_type == name
    for name in taken["multimodal"]:
        inside = listed["multimodal"][name]
        rows = [find_family({"model_type": name, "text_config": {"model_type": text}}) for text in inside]
        assert all(row.model_type == name for row in rows)
    from moeconv.families.registry import tables

    rows = {*tables().dense, *tables().moe, *tables().wrapped}
    assert rows == {*taken["dense"], *taken["moe"], *taken["multimodal"]}


def test_a_plan_on_renamed_tensors_reads_the_right_bytes(tmp_path: Path) -> None:
    """The plan names tensors as they are called here; the reader finds them under their stored names."""
    source = renamed(make_dense(tmp_path / "source"), lambda name: name.removeprefix("model."))
    model = open_model(source)
    plan = plan_upcycle(model)
    for item in plan.items():
        for part in item.inputs:
            assert model.checkpoint.read(part.tensor, start=part.start, length=min(part.nbytes, 8))


def test_an_empty_key_of_a_multimodal_model_does_not_make_one() -> None:
    """Phi-2 as it was first published has `img_processor: null`."""
    with pytest.raises(InputError, match="unknown architecture"):
        find_family({"model_type": "unheard_of", "img_processor": None})
    with pytest.raises(InputError, match="is a multimodal model"):
        find_family({"model_type": "unheard_of", "img_processor": {}})
    with pytest.raises(InputError, match="FFN without a gate"):
        find_family({"model_type": "phi-msft", "img_processor": None})
