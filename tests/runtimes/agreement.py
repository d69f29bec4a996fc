"""Do runtimes compute what the dequantized model computes? Greedy tokens of each against transformers, as a table.

    python tests/runtimes/agreement.py [--model DENSE_OR_MOE] [--only llama.cpp] [--json FILE]

MOECONV_VLLM_PYTHON and MOECONV_LLAMA_CPP_PYTHON name the interpreters of the other runtimes (environments.sh); one that
is not named is skipped. Agreement is the share of tokens that a runtime chose greedily and that are also the
reference's choice after the same tokens, so that one near-tie does not count for all that follows. The reference is
transformers on the decoded weights: in bfloat16 for transformers and vLLM, in float32 for llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sizes import MOE

from moeconv.errors import InputError
from moeconv.families.model import open_model
from moeconv.quantize.formats import FORMATS
from moeconv.recipe.read import DEMO_DATA

HERE = Path(__file__).parent
RUNTIMES = {"vllm": "MOECONV_VLLM_PYTHON", "llama.cpp": "MOECONV_LLAMA_CPP_PYTHON"}
PROMPTS, PROMPT_TOKENS, LENGTH = 8, 24, 24
_DATA = {"data": (str(DEMO_DATA / "calibration.txt"),), "tokens": 4096}
Row = tuple[str, dict[str, Any], tuple[str, ...]]  # name, parameters of quantize, runtimes to try
_VARIANTS: tuple[Row, ...] = (
    ("compressed-tensors int4 g128", {"group_size": "128"}, ("transformers", "vllm")),
    ("compressed-tensors int4 g64", {"group_size": "64"}, ("transformers", "vllm")),
    ("compressed-tensors int4 g32", {"group_size": "32"}, ("transformers", "vllm")),
    # scales of either sign
    ("compressed-tensors int4 g128 mse", {"group_size": "128", "method": "mse"}, ("transformers", "vllm")),
    ("compressed-tensors int8 g128", {"bits": 8, "group_size": "128"}, ("transformers", "vllm")),
    ("compressed-tensors int8 channel", {"bits": 8, "group_size": "channel"}, ("transformers",)),
    ("bitsandbytes nf4 double quant", {"format": "bitsandbytes", "double_quant": True}, ("transformers",)),
    ("bitsandbytes nf4 gptq", {"format": "bitsandbytes", "method": "gptq"} | _DATA, ("transformers",)),
)
_LOADED = ("ok", "dequantized")
_NOT_HERE = ("mxfp4 mxfp4", "gguf q2_k_s")  # for gpt-oss alone; needs an importance matrix


def _schemes() -> Iterator[Row]:
    """Every scheme of every format that a runtime of this table loads for the demo, without data."""
    for record in FORMATS.values():
        for info in record.schemes:
            tried = tuple(r for r in ("transformers", *RUNTIMES) if info.loads.get(r) in _LOADED)
            if tried and (name := f"{record.name} {info.name}") not in _NOT_HERE:
                yield name, {"format": record.name, "scheme": info.name}, tried


ROWS: tuple[Row, ...] = (*_VARIANTS, *_schemes())


# What a runtime is known to refuse, with a message; the rows stay in the table.
REFUSED = {"vllm": ("compressed-tensors int8 g128",)}  # its CPU backend has no 8-bit kernel

# the families that moeconv writes GGUF for
LLAMA_CPP_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe")


def random_model(family: str, out: Path, config: Mapping[str, Any] | None = None) -> Path:
    """A small random model of a family with the demo's tokenizer; biases and corrections are not left at zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **(config or MOE[family]))
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "norm.weight")):
            tensor.data += torch.randn_like(tensor) * 0.1
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DATA / "model" / name, out / name)
    return out


def sentencepiece(folder: Path, *, size: int = 2048) -> Path:
    """Give a model a BPE with byte fallback in place of its tokenizer, as SentencePiece's become in tokenizer.json:
    every way to make a token of two is a merge, and the merges are in the order of the tokens."""
    from tokenizers import SentencePieceBPETokenizer

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = SentencePieceBPETokenizer()
    trained.train([str(DEMO_DATA / "calibration.txt")], vocab_size=size - len(special), limit_alphabet=200,
                  show_progress=False, special_tokens=["<unk>"])  # fmt: skip
    learned = sorted(trained.get_vocab().items(), key=lambda pair: pair[1])
    pieces = dict.fromkeys([*special, *(piece for piece, _ in learned)])
    merges = [
        f"{piece[:at]} {piece[at:]}" for piece in pieces if piece not in special
        for at in range(1, len(piece)) if piece[:at] in pieces and piece[at:] in pieces
    ]  # fmt: skip
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    value = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": special[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, visible]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


def byte_level(folder: Path, steps: Sequence[str], *, whole: bool, size: int = 1024) -> Path:
    """Give a model a byte-level BPE that splits texts by `steps` (moeconv.quantize.gguf.pre_tokenizers) in place of its
    tokenizer. `whole`: a word that is a token is not merged."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from moeconv.quantize.gguf.pre_tokenizers import BYTES, DIGITS, GPT2

    def step(word: str) -> Any:
        if word in (BYTES, GPT2):
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=word == GPT2)
        return (
            pre_tokenizers.Digits(individual_digits=True)
            if word == DIGITS
            else pre_tokenizers.Split(Regex(word), "isolated")
        )

    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer = pre_tokenizers.Sequence([step(word) for word in steps])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train([str(DEMO_DATA / "calibration.txt")], trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder


def in_environment(variable: str, script: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """What a script of this folder answers in another environment. Raises RuntimeError with its last words."""
    done = subprocess.run(
        [os.environ[variable], str(HERE / script)], input=json.dumps(job) + "\n", capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, check=False,
    )  # fmt: skip
    try:
        found = json.loads(done.stdout)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines()
        found = {"failed": lines[-1].strip()[-200:] if lines else f"exit {done.returncode}"}
    if "failed" in found:
        raise RuntimeError(found["failed"])
    return found


def texts_elsewhere(packed: Path, texts: Sequence[str]) -> list[list[int]]:
    """Texts as llama.cpp tokenizes them with a GGUF file."""
    job = {"model": str(packed / "model.gguf"), "prompts": [], "length": 1, "texts": list(texts)}
    return in_environment(RUNTIMES["llama.cpp"], "run_llama_cpp.py", job)["texts"]


def moe_source(model: Path, out: Path) -> Path:
    """The model itself when it has experts, else what `upcycle --method drop` makes of it."""
    from moeconv.plan.meter import SilentMeter
    from moeconv.recipe.run import run_step

    if open_model(model).family.kind == "moe":
        return model
    values = {"experts": 4, "top_k": 2, "method": "drop", "no_check": True}
    run_step("upcycle", values, str(model), str(out), meter=SilentMeter())
    return out


def quantize(source: Path, out: Path, parameters: dict[str, Any]) -> None:
    from moeconv.plan.meter import SilentMeter
    from moeconv.recipe.run import run_step

    run_step("quantize", parameters, str(source), str(out), meter=SilentMeter())


def prompts(source: Path) -> list[list[int]]:
    """Tokens from the text that no demo model was trained on."""
    from tokenizers import Tokenizer

    text = (DEMO_DATA / "heldout.txt").read_text()
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text[:40000], add_special_tokens=False).ids
    step = (len(ids) - PROMPT_TOKENS) // PROMPTS
    return [ids[i * step : i * step + PROMPT_TOKENS] for i in range(PROMPTS)]


def dequantized(source: Path, packed: Path, out: Path, parameters: dict[str, Any]) -> None:
    """An ordinary checkpoint of the weights that `packed` decodes to: float32 for GGUF, else what loaders decode to."""
    import torch
    from safetensors.torch import save_file

    from moeconv.plan.meter import SilentMeter
    from moeconv.recipe.run import run_step
    from moeconv.tensors import decode_weight, plain_names

    if parameters.get("format") == "gguf":
        run_step("import", {"dtype": "float32"}, str(packed / "model.gguf"), str(out), meter=SilentMeter())
        return
    config = json.loads((source / "config.json").read_text())
    out.mkdir()
    written = open_model(packed)
    dtype = getattr(torch, config["dtype"])
    weights = {name: decode_weight(written, name, dtype).contiguous() for name, _ in plain_names(written)}
    (out / "config.json").write_text(json.dumps(config))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import moeconv.hf  # noqa: F401

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def generate(model: Any, asked: Sequence[Sequence[int]]) -> list[list[int]]:
    import torch

    ids = torch.tensor(asked)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return made[:, ids.shape[1] :].tolist()


def run_elsewhere(runtime: str, path: Path, asked: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens of another runtime. Raises RuntimeError with the last words of one that fails."""
    script, target = {
        "vllm": ("run_vllm.py", path), "llama.cpp": ("run_llama_cpp.py", path / "model.gguf")
    }[runtime]  # fmt: skip
    job = {"model": str(target), "prompts": asked, "length": LENGTH, "texts": []}
    return in_environment(RUNTIMES[runtime], script, job)["tokens"]


def agreement(runtime: str, packed: Path, plain: Path, asked: Sequence[Sequence[int]]) -> dict[str, Any]:
    """{agreement, gap}: share of a runtime's greedy tokens that are the reference's choice too, and the most (in
    logits) by which it preferred another. In transformers both generate, so that all tokens must be the same."""
    import torch

    reference = load(plain)
    if runtime == "transformers":
        mine, theirs = (torch.tensor(generate(model, asked)) for model in (load(packed), reference))
        return {"agreement": float((mine == theirs).float().mean()), "gap": 0.0}
    answered = run_elsewhere(runtime, packed, asked)
    ids = torch.tensor([[*a, *b] for a, b in zip(asked, answered, strict=True)])
    with torch.no_grad():
        logits = reference(ids).logits[:, len(asked[0]) - 1 : -1].float()
    gap = logits.amax(-1) - logits.gather(-1, torch.tensor(answered)[..., None])[..., 0]
    return {"agreement": float((gap == 0).float().mean()), "gap": float(gap.max())}


def measure(source: Path, work: Path, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A row for every format and runtime that is there: {format, runtime, bytes, agreement, gap} or {..., failed}."""
    asked = prompts(source)
    for name, parameters, runtimes in ROWS:
        there = [r for r in runtimes if (not only or r in only) and (r not in RUNTIMES or RUNTIMES[r] in os.environ)]
        if not there:
            continue
        packed, plain = work / "packed", work / "plain"
        try:
            quantize(source, packed, parameters)
        except InputError as error:  # a group size that does not divide this model's widths
            yield {"format": name, "runtime": "-", "bytes": 0, "failed": f"refused: {error.message}"}
            continue
        dequantized(source, packed, plain, parameters)
        size = sum(f.stat().st_size for f in packed.iterdir() if f.suffix in (".safetensors", ".gguf"))
        for runtime in there:
            row: dict[str, Any] = {"format": name, "runtime": runtime, "bytes": size}
            try:
                row |= agreement(runtime, packed, plain, asked)
            except RuntimeError as error:
                row["failed"] = str(error)
            yield row
        shutil.rmtree(packed)
        shutil.rmtree(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_DATA / "model")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for runtime, variable in RUNTIMES.items():
        if variable not in os.environ:
            print(f"{variable} is not set: {runtime} is skipped", file=sys.stderr)
    rows = []
    print("| format | runtime | bytes | greedy tokens that agree | largest gap |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = moe_source(options.model, Path(folder) / "moe")
        for row in measure(source, Path(folder), options.only):
            rows.append(row)
            found = f"{row['failed']} | -" if "failed" in row else f"{100 * row['agreement']:.1f} % | {row['gap']:.3f}"
            print(f"| {row['format']} | {row['runtime']} | {row['bytes']} | {found} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
