"""Tiny random checkpoints for tests, made without torch and without the writer that the tests judge.

make_dense(path, "llama")                       2 layers, hidden 32, BF16, one file
make_moe(path, "mixtral", experts=4, shards=3)  further keywords go into config.json
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.families.rows.llama import LLAMA
from moeconv.families.rows.mistral import MISTRAL, MIXTRAL
from moeconv.families.rows.olmo import OLMOE
from moeconv.families.rows.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from moeconv.families.spec import Family, Role

# the families whose tensors this file can shape; tests/contract makes all of them with transformers
DENSE = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
MOE = {family.model_type: family for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE)}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, bytes
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def make_dense(path: Path, family: str = "llama", **keywords: Any) -> Path:
    """Write a dense checkpoint; keywords are those of `make`."""
    return make(path, DENSE[family], **keywords)


def make_moe(path: Path, family: str = "mixtral", *, experts: int = 4, top_k: int = 2, **keywords: Any) -> Path:
    """Write a Mixture-of-Experts checkpoint; further keywords are those of `make`."""
    row = MOE[family]
    counts = dict.fromkeys(row.experts.count, experts) | dict.fromkeys(row.experts.top_k, top_k)
    return make(path, row, **(counts | keywords))


def packable(info: Any, **sizes: int) -> dict[str, int]:
    """The sizes of a model that a scheme (`quantize.spec.SchemeInfo`) can pack: larger ones where it needs blocks."""
    blocks = min((size for size in info.groups if size), default=1) > 64
    return {name: 256 * (1 + i) for i, name in enumerate(sizes)} if blocks else sizes


def make(
    path: Path, family: Family, *, layers: int = 2, hidden: int = 32, intermediate: int = 64, vocab: int = 64,
    heads: int = 4, kv_heads: int = 2, shards: int = 1, dtype: str = "BF16", tied: bool = False, seed: int = 0,
    **config: Any,
) -> Path:  # fmt: skip
    """Write a random checkpoint of a family to the directory `path`; `config` holds further keys of config.json."""
    full = tiny_config(
        family, layers=layers, hidden=hidden, intermediate=intermediate, vocab=vocab, heads=heads, kv_heads=kv_heads,
        dtype=dtype, tied=tied,
    ) | config  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(full, indent=2))
    write_shards(path, random_tensors(family, full, dtype=dtype, seed=seed), shards=shards)
    return path


def tiny_config(
    family: Family, *, layers: int, hidden: int, intermediate: int, vocab: int, heads: int, kv_heads: int, dtype: str,
    tied: bool,
) -> dict[str, Any]:  # fmt: skip
    """A config.json that transformers loads: the keys that the family knows, and no others."""
    values = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
        "max_position_embeddings": 128, "tie_word_embeddings": tied, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "moe_intermediate_size": intermediate // 2, "sliding_window": None,
        "shared_expert_intermediate_size": intermediate, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }  # fmt: skip
    known = {key: value for key, value in values.items() if key in family.config.defaults}
    torch_name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}[dtype]
    about = {"model_type": family.model_type, "architectures": [family.architecture], "dtype": torch_name}
    return about | known | {"bos_token_id": 1, "eos_token_id": 2}


def random_tensors(family: Family, config: Mapping[str, Any], *, dtype: str, seed: int) -> Tensors:
    """Random weights for every tensor that a checkpoint of this config holds, norms near one."""
    rng = np.random.default_rng(seed)
    experts = next((config[key] for key in family.experts.count if key in config), 0)
    tensors: Tensors = {}
    for name, role in family.expand(layers=config["num_hidden_layers"], experts=experts):
        if not _belongs(family, config, role):
            continue
        shape = _shape(family, config, role, experts)
        values = rng.standard_normal(shape, np.float32) * np.float32(0.05)
        if role.key.startswith("norm.") or role.key.endswith("_norm"):
            values += 1
        tensors[name] = (dtype, shape, encode(values, dtype))
    return tensors


def _belongs(family: Family, config: Mapping[str, Any], role: Role) -> bool:
    step = config.get("decoder_sparse_step", 1)
    moe = family.kind == "moe" and role.layer is not None and (role.layer + 1) % step == 0
    moe = moe and role.layer not in config.get("mlp_only_layers", ())
    if role.group in ("expert", "router", "shared", "ffn"):
        if (role.group == "ffn") == moe:
            return False
        return not role.key.endswith("_bias") or bool(config.get("mlp_bias"))
    if role.key == "embedding.lm_head":
        return not config["tie_word_embeddings"]
    if role.key in family.tensors.optional:
        default = family.model_type == "qwen2_moe"
        return bool(config.get("attention_bias", config.get("qkv_bias", default)))
    return True


def _shape(family: Family, config: Mapping[str, Any], role: Role, experts: int) -> tuple[int, ...]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    query, value = heads * head, config["num_key_value_heads"] * head
    group, _, part = role.key.partition(".")
    width = {"expert": config.get(family.experts.width), "ffn": config.get("intermediate_size")}.get(
        group, config.get("shared_expert_intermediate_size")
    )
    if group == "norm":
        return (hidden,)
    if group == "embedding":
        return (config["vocab_size"], hidden)
    if role.key == "router.weight":
        return (experts, hidden)
    if role.key == "shared.router":
        return (1, hidden)
    if group == "attention":
        whole_row = family.model_type == "olmoe"  # normalises all heads together, the others each head alone
        matrix = {"q": (query, hidden), "k": (value, hidden), "v": (value, hidden), "o": (hidden, query)}
        letter, _, rest = part.partition("_")
        if rest == "norm":
            return (matrix[letter][0],) if whole_row else (head,)
        return matrix[letter][:1] if rest == "bias" else matrix[letter]
    matrix = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    letter, _, rest = part.partition("_")
    return matrix[letter][:1] if rest == "bias" else matrix[letter]


def encode(values: np.ndarray, dtype: str) -> bytes:
    """The array's bytes in a floating dtype; bfloat16 rounds half away from zero, which is good enough here."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16).tobytes()
    return np.asarray(values, _NUMPY[dtype]).tobytes()


def decode(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array behind `encode`, bfloat16 as float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    return np.frombuffer(data, _NUMPY[dtype]).reshape(shape)


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], **metadata: str) -> bytes:
    """A safetensors file, by hand."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return with_header(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A file of these header bytes and these data bytes, whatever they are."""
    return struct.pack("<Q", len(header)) + header + data


def write_shards(path: Path, tensors: Tensors, *, shards: int = 1) -> None:
    """Write tensors in order into one file, or spread evenly over several with an index."""
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        (path / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def read_file(path: Path) -> Tensors:
    """All tensors of one safetensors file, by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: (e["dtype"], tuple(e["shape"]), data[base + e["data_offsets"][0] : base + e["data_offsets"][1]])
        for name, e in header.items()
    }


def read_tensors(path: Path) -> Tensors:
    """All tensors of a checkpoint directory."""
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in read_file(file).items()}


def edit_json(path: Path, *, drop: Iterable[str] = (), **changes: Any) -> None:
    """Change keys of a JSON object in a file."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in value.items() if key not in set(drop)}))


def hashes(path: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path; links count as what they point to."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
