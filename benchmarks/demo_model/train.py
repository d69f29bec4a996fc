"""Train the demo checkpoint: a dense 1.5 M parameter Llama that has read Python's standard library.

python benchmarks/demo_model/train.py OUT_DIR [--steps N | --minutes M] [--seed 0]

A killed run continues where it stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import sysconfig
import time
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 256  # tokens a sequence, in training and in measuring
BOS, EOS = "<s>", "</s>"  # a byte-level vocabulary covers every text, so there is no <unk>
SKIP_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings",
                "pydoc_data", "msilib"}  # fmt: skip
SKIP_FILES = {"html/entities.py", "locale.py"}  # tables more than code
HELD_OUT = ("heapq.py", "textwrap.py", "fractions.py", "graphlib.py", "queue.py", "shlex.py")
CALIBRATION, EXCERPT, HELD_OUT_LENGTH = 400_000, 4_000, 100_000  # characters
PURPOSES = {"init": 1, "order": 2, "calibration": 3}


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    steps: int = 4000
    minutes: float | None = None  # given: the clock decides, not the steps
    batch: int = 8
    rate: float = 4e-3
    warmup: float = 0.04  # share of the run
    floor: float = 0.02  # the final rate, as a share of the highest
    decay: float = 0.1


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, PURPOSES[purpose] << 32 | index]))


def standard_library() -> dict[str, str]:
    """Path inside the standard library -> text, sorted, without tests, tables and build settings of one machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        skipped = SKIP_FOLDERS & set(name.parts) or any("-" in part for part in name.parts)
        if skipped or name.as_posix() in SKIP_FILES or name.name.startswith("_sysconfigdata"):
            continue
        with tokenize.open(path) as source:
            if text := source.read().strip("\n"):
                texts[name.as_posix()] = text + "\n"
    return texts


def cut_at_line(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: text.rfind("\n", 0, limit) + 1]


def calibration_text(documents: list[str], seed: int) -> str:
    """One run of lines a document, in a shuffled order, of documents without a copyright notice of their own."""
    rng = generator(seed, "calibration")
    sources = [text for text in documents if "copyright" not in text.lower()]
    excerpts = []
    for index in rng.permutation(len(sources)):
        text = sources[index]
        start = int(rng.integers(max(1, len(text) - EXCERPT)))
        start = text.find("\n", start) + 1 if start else 0
        excerpts.append(cut_at_line(text[start:], EXCERPT))
    return cut_at_line("\n".join(excerpts), CALIBRATION)


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def build_model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=10000.0,
        tie_word_embeddings=True, initializer_range=0.06, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rng = generator(seed, "init")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue  # norms start at one
            # GPT-2's rule: what adds to the residual stream starts smaller, by the root of how many add
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if adds else 1)
            weight.copy_(torch.from_numpy(rng.standard_normal(weight.shape, dtype=np.float32) * scale))
    return model


def losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """ids: [B, WINDOW] -> the mean next-token loss, a scalar in nats."""
    logits = model(input_ids=ids, use_cache=False).logits  # [B, WINDOW, V]
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """ids: [T], cut into full windows; mean over every predicted token."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return sum(losses(model, part).item() * len(part) for part in windows.split(16)) / len(windows)


def batch_at(step: int, stream: torch.Tensor, settings: Settings) -> torch.Tensor:
    """[batch, WINDOW]: every epoch shifts the grid of windows and shuffles it, a pure function of (seed, step)."""
    per_epoch = (len(stream) // WINDOW - 1) // settings.batch
    epoch, index = divmod(step, per_epoch)
    rng = generator(settings.seed, "order", epoch)
    shift = int(rng.integers(WINDOW))
    rows = rng.permutation(len(stream) // WINDOW - 1)[index * settings.batch : (index + 1) * settings.batch]
    return torch.stack([stream[shift + row * WINDOW : shift + (row + 1) * WINDOW] for row in rows.tolist()])


def rate_at(progress: float, settings: Settings) -> float:
    if progress < settings.warmup:
        return settings.rate * progress / settings.warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup))
    return settings.rate * (settings.floor + (1 - settings.floor) * cosine)


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, *, settings: Settings, saved: Path
) -> tuple[int, float]:
    """Trains in place; returns the steps and the seconds taken. `saved` is rewritten every 100 steps."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": settings.decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)
    step, seconds, recent = 0, 0.0, []
    if saved.exists():
        state = torch.load(saved)
        if state["settings"] != asdict(settings):
            raise SystemExit(f"{saved} is of a run with other settings: {state['settings']}. Remove it to start anew.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    before = time.monotonic()
    while True:
        progress = seconds / 60 / settings.minutes if settings.minutes else step / settings.steps
        if progress >= 1:
            return step, seconds
        for group in optimizer.param_groups:
            group["lr"] = rate_at(max(progress, 1e-4), settings)
        loss = losses(model, batch_at(step, stream, settings))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent.append(loss.item())
        if step % 100 == 0:
            note = f"  held-out {held_out_loss(model, held_out):.4f}" if step % 300 == 0 else ""
            print(f"step {step:5d}  {seconds / 60:5.1f} min  training {np.mean(recent):.4f}{note}", flush=True)
            recent = []
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                     "seconds": seconds, "settings": asdict(settings)}  # fmt: skip
            torch.save(state, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)
        now = time.monotonic()
        seconds, before = seconds + now - before, now


def write_texts(out: Path, calibration: str, held_out: str) -> None:
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if not licence.is_file():
        raise SystemExit(f"Python's licence is not at {licence}: copy LICENSE.txt of your Python's source there.")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(licence, out / "LICENSE.PSF")
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (out / "heldout.txt").write_text(held_out, encoding="utf-8")
    (out / "NOTICE").write_text(
        f"calibration.txt and heldout.txt are excerpts of the standard library of Python {platform.python_version()},\n"
        "Copyright (c) Python Software Foundation; All Rights Reserved, under the PSF licence (LICENSE.PSF).\n"
        f"heldout.txt holds {', '.join(HELD_OUT)}, the last one cut short;\n"
        "calibration.txt holds a run of lines each of other modules. The lines themselves are unchanged.\n"
        "The model and its tokenizer were trained on that standard library, without the modules of heldout.txt,\n"
        "by benchmarks/demo_model/train.py.\n",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=Settings.steps, help="the default gives the shipped checkpoint")
    length.add_argument("--minutes", type=float, help="train by the clock instead (not reproducible)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=Settings.batch, help="windows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=Settings.rate, help="the highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    settings = Settings(options.seed, options.steps, options.minutes, options.batch, options.rate)
    torch.set_num_threads(options.threads)

    texts = standard_library()
    documents = [text for name, text in texts.items() if name not in HELD_OUT]
    held_out_text = cut_at_line("\n".join(texts[name] for name in HELD_OUT), HELD_OUT_LENGTH)
    write_texts(options.out, calibration_text(documents, settings.seed), held_out_text)
    tokenizer = train_tokenizer(documents, 2048)
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in (bos, *ids, eos)])  # [T]
    held_out = torch.tensor(tokenizer(held_out_text, add_special_tokens=False, verbose=False)["input_ids"])
    model = build_model(settings.seed)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"{parameters} parameters, {len(documents)} documents of {sum(map(len, documents))} characters, "
        f"{len(stream)} training tokens, {len(held_out)} held-out tokens",
        flush=True,
    )

    saved = options.out / "training.pt"
    done, seconds = train(model, stream, held_out, settings=settings, saved=saved)
    model.to(torch.bfloat16).save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(options.out / "model", dtype=torch.float32)
    retokenized = AutoTokenizer.from_pretrained(options.out / "model")
    text = (options.out / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(retokenized(text, add_special_tokens=False, verbose=False)["input_ids"])
    loss = held_out_loss(reloaded, ids)
    saved.unlink(missing_ok=True)
    print(f"{done} steps, {done * settings.batch * WINDOW} tokens seen, {seconds / 60:.1f} minutes")
    print(f"held-out loss {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}, of the saved bf16 model in float32")


if __name__ == "__main__":
    main()
