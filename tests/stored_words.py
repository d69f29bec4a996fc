"""Checkpoints in the layouts of GPTQ and AWQ, packed bit by bit from their definitions, and plain decoders of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.contract.stock import MOE_CASES, save_stock

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each four bits of a word hold, the lowest first
Parts = dict[str, torch.Tensor]


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of the codes of each row, without gaps, the least significant bits first."""
    rows = codes.shape[0]
    each = (codes[:, :, None].astype(np.int64) >> np.arange(bits)) & 1
    return np.packbits(each.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little").view("<i4")


def levels(weight: torch.Tensor, of: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in], zero points and scales [out, groups] of a weight whose column i is of group of[i]."""
    values, top = weight.double().numpy(), (1 << bits) - 1
    groups = int(of.max()) + 1
    low = np.stack([np.minimum(values[:, of == g].min(1), 0) for g in range(groups)], 1)
    high = np.stack([np.maximum(values[:, of == g].max(1), 0) for g in range(groups)], 1)
    scales = ((high - low) / top).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(float)), 1, top).astype(int)
    codes = np.clip(np.round(values / scales.astype(float)[:, of]) + zeros[:, of], 0, top).astype(int)
    return codes, zeros, scales


def pack_gptq(weight: torch.Tensor, *, bits: int, group: int, version: int, g_idx: np.ndarray | None = None) -> Parts:
    of = np.arange(weight.shape[1]) // group if g_idx is None else g_idx
    codes, zeros, scales = levels(weight, of, bits)
    return {
        "qweight": torch.from_numpy(stream(codes, bits).T.copy()),
        "qzeros": torch.from_numpy(stream(zeros.T - (version == 1), bits).copy()),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(of.astype(np.int32)),
    }


def pack_awq(weight: torch.Tensor, *, group: int) -> Parts:
    codes, zeros, scales = levels(weight, np.arange(weight.shape[1]) // group, 4)

    def words(table: np.ndarray) -> torch.Tensor:  # [n, out] -> [n, out / 8]
        found = np.zeros((table.shape[0], table.shape[1] // 8), np.uint32)
        for place, column in enumerate(AWQ_ORDER):
            found |= table[:, column::8].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(found.view(np.int32))

    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": torch.from_numpy(scales.T.copy())}


def _three(words: np.ndarray) -> list[int]:
    """The 32 codes of three words, as AutoGPTQ's kernels take them apart."""
    a, b, c = (int(word) & 0xFFFFFFFF for word in words)
    first = [(a >> 3 * i) & 7 for i in range(10)] + [(a >> 30) | (b & 1) << 2]
    middle = [(b >> 3 * i + 1) & 7 for i in range(10)] + [(b >> 31) | (c & 3) << 1]
    return first + middle + [(c >> 3 * i + 2) & 7 for i in range(10)]


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """[n, words] -> [n, codes]."""
    if bits == 3:
        return np.array([[c for i in range(0, len(row), 3) for c in _three(row[i : i + 3])] for row in words])
    return np.array([[(int(w) >> s) & ((1 << bits) - 1) for w in row for s in range(0, 32, bits)] for row in words])


def plain_gptq(parts: Parts, *, bits: int, version: int) -> torch.Tensor:
    """The weight [out, in]: each product is rounded once, from float64 to the dtype of the scales."""
    codes = _codes(parts["qweight"].T.numpy(), bits)
    zeros = _codes(parts["qzeros"].numpy(), bits).T + (version == 1)
    of = parts["g_idx"].numpy()
    values = parts["scales"].double().numpy().T[:, of] * (codes - zeros[:, of])
    return torch.from_numpy(values).to(parts["scales"].dtype)


def plain_awq(parts: Parts, *, group: int) -> torch.Tensor:
    def codes(words: torch.Tensor) -> np.ndarray:
        found = np.zeros((words.shape[0], words.shape[1] * 8), int)
        for place, column in enumerate(AWQ_ORDER):
            found[:, column::8] = (words.numpy() >> (4 * place)) & 15
        return found.T

    of = np.arange(parts["qweight"].shape[0]) // group
    values = parts["scales"].double().numpy().T[:, of] * (codes(parts["qweight"]) - codes(parts["qzeros"])[:, of])
    return torch.from_numpy(values).to(parts["scales"].dtype)


def _make(path: Path, case: str, pack, quantization: dict) -> Path:
    """A stock checkpoint with its projections in float16 packed by `pack`."""
    save_stock(path, *MOE_CASES[case], dtype=torch.float16)
    tensors: Parts = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            packs = "experts." in name or "_proj.weight" in name
            parts = pack(tensor) if packs else {"weight": tensor}
            tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    tiny.edit_json(path / "config.json", quantization_config=quantization)
    return path


def make_gptq(path: Path, case: str = "qwen3_moe", *, bits: int = 4, version: int = 1, ordered: bool = True) -> Path:
    """Groups of 32 columns, out of order where `ordered`."""
    draw = np.random.default_rng(0)

    def pack(tensor: torch.Tensor) -> Parts:
        of = np.arange(tensor.shape[1]) // 32
        g_idx = draw.permutation(of) if ordered else of
        return pack_gptq(tensor, bits=bits, group=32, version=version, g_idx=g_idx)

    quantization = {
        "quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": ordered, "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.01, "lm_head": False,
    }  # fmt: skip
    return _make(path, case, pack, quantization)


def make_awq(path: Path, case: str = "mixtral") -> Path:
    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["gate"],
    }  # fmt: skip
    return _make(path, case, lambda tensor: pack_awq(tensor, group=32), quantization)
