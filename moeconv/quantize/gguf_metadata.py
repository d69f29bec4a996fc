"""The metadata of a GGUF file: hyperparameters and the tokenizer, encoded by the `gguf` package."""

from __future__ import annotations

import logging
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.checkpoint.strictjson import read_json_object
from moeconv.errors import InputError, escape
from moeconv.families.model import Model
from moeconv.families.rope import read_rope
from moeconv.families.shapes import head_dim
from moeconv.quantize.llama_cpp import LlamaCpp

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # ggml's token types
_FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k": 14}  # llama.cpp's llama_ftype

_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# the regular expression of a byte-level BPE's pre-tokenizer -> llama.cpp's word for it. Texts that tokenize otherwise
# would be a silently wrong model, so what is not here is refused.
PRE_TOKENIZERS: dict[str, str] = {
    "": "gpt-2",  # ByteLevel's own
    _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL: "llama-bpe",
    _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL: "qwen2",
}
_IGNORE_MERGES = ("llama-bpe",)


def metadata(model: Model, row: LlamaCpp, *, scheme: str) -> tuple[bytes, int]:
    """(encoded key-value pairs, their number). Raises InputError without a tokenizer that llama.cpp knows."""
    gguf = import_gguf()
    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        path = Path(folder) / "head.gguf"
        writer = gguf.GGUFWriter(path, row.arch)
        for key, value in _numbers(model, row).items():
            _add(writer, f"{row.arch}.{key}", value)
        writer.add_file_type(_FILE_TYPES[scheme])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _tokenizer(gguf, writer, model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        data = path.read_bytes()
    (count,) = struct.unpack_from("<Q", data, 16)
    return data[24:], count


def import_gguf() -> Any:
    """The optional `gguf` package. Raises InputError that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise InputError("--format gguf needs the gguf package", hint="pip install 'moeconv[gguf]'") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)
    return gguf


def _numbers(model: Model, row: LlamaCpp) -> Mapping[str, Any]:
    """Hyperparameters by llama.cpp's keys, without the architecture in front."""
    value, family = model.value, model.family
    heads = value("num_attention_heads")
    width = head_dim(value)
    rope = read_rope({**family.config, **model.config}, theta=10000.0, partial=family.partial, style=family.rope)
    if rope["rope_type"] not in ("default", "linear"):
        raise InputError(
            f"rotary embeddings of type {escape(rope['rope_type'])} are not written to GGUF",
            hint="Choose another --format.",
        )
    partial = rope.get("partial_rotary_factor") or 1.0
    numbers: dict[str, Any] = {
        "block_count": model.num_layers,
        "context_length": value("max_position_embeddings"),
        "embedding_length": model.hidden_size,
        "feed_forward_length": value("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": value("num_key_value_heads") or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(value("rms_norm_eps")),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(width * partial),
        "vocab_size": value("vocab_size"),
        "expert_count": model.num_experts,
        "expert_used_count": model.top_k,
    }
    if rope["rope_type"] == "linear":
        numbers |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    for key, source in row.numbers.items():
        found = value(source)
        if found is not None:
            numbers[key] = float(found) if key == "expert_weights_scale" else found
    return numbers | dict(row.fixed)


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def _tokenizer(gguf: Any, writer: Any, model: Model) -> None:
    folder = model.checkpoint.path
    if not (folder / "tokenizer.json").is_file():
        raise InputError("a GGUF file holds its tokenizer, and there is no tokenizer.json", hint="Add it.")
    tokenizer = read_json_object(folder / "tokenizer.json", what="tokenizer.json")
    try:
        pre = _pre_tokenizer(tokenizer)
        size = int(model.value("vocab_size"))
        words: dict[int, tuple[str, int]] = {i: (w, _NORMAL) for w, i in tokenizer["model"]["vocab"].items()}
        for token in tokenizer.get("added_tokens") or ():
            words[token["id"]] = (token["content"], _CONTROL if token["special"] else _USER)
        if any(type(i) is not int or not 0 <= i < size for i in words):
            raise InputError(
                f"tokenizer.json has more tokens than the model's {size}", hint="They do not belong together."
            )
        rows = [words.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(size)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([word for word, _ in rows])
        writer.add_token_types([kind for _, kind in rows])
        vocabulary = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
        # without a template that adds it, transformers adds no token in front; llama.cpp's default differs by model
        vocabulary.add_special_token = {"bos": False, "eos": False} | vocabulary.add_special_token
        vocabulary.add_to_gguf(writer, quiet=True)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"tokenizer.json is not what it should be: {escape(error)}", hint="Restore it.") from None


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of how texts are split. Raises InputError for one that it does not know."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    known = model.get("type") == "BPE" and not model.get("byte_fallback") and last.get("type") == "ByteLevel"
    known = known and not last.get("add_prefix_space")
    pattern: str | None = None
    if known and len(steps) == 1 and last.get("use_regex", True):
        pattern = ""
    elif known and len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
            pattern = None
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    known = pattern in PRE_TOKENIZERS and normalizer in (None, "NFC")
    # whether a word that is a token as a whole skips the merges is part of llama.cpp's word too
    if not known or bool(model.get("ignore_merges")) != (PRE_TOKENIZERS[pattern or ""] in _IGNORE_MERGES):
        raise InputError(
            "the tokenizer splits texts in a way that llama.cpp is not known to",
            hint=f"Known are byte-level BPEs that split as {', '.join(sorted(PRE_TOKENIZERS.values()))} do.",
        )
    return PRE_TOKENIZERS[pattern or ""]
