"""Two examples of each command, and the address of its page: the end of its help text."""

from __future__ import annotations

PAGES = "https://github.com/moeconv/moeconv/blob/main/docs/"  # the manual
EXAMPLES: dict[str, tuple[str, str]] = {
    "inspect": ("model", "model --json"),
    "upcycle": ("model moe --experts 8 --top-k 2", "model split --method split --experts 8 --top-k 6 --data text.txt"),
    "calibrate": ("moe moe.stats --data text.txt", "moe mixed.stats --data code.txt --data text.txt=2 --tokens 20000"),
    "tune": (
        "moe tuned --teacher model --data text.txt",
        "moe tuned --teacher model --data text.txt --objective distill --train router,experts",
    ),
    "prune": ("moe pruned --ratio 0.5 --refit --data text.txt", "moe pruned --max-bytes 20GB --stats moe.stats"),
    "quantize": ("moe packed --scheme int4 --method gptq --data text.txt", "moe packed --format gguf --scheme q4_k"),
    "import": ("model.gguf out", "model.gguf exact --dtype float32"),
    "arrange": ("moe arranged --devices 4 --stats moe.stats", "moe in-eights --devices 8 --stats moe.stats --dry-run"),
    "collapse": ("moe dense --data text.txt", "moe wide --width 4096 --data text.txt --dry-run"),
    "evaluate": ("moe --data text.txt", "packed --data text.txt --reference moe --max-loss-increase 0.05"),
    "verify": ("moe", "moe --source model --load"),
    "report": ("moe report.html", "moe page.html --stats moe.stats --reference model"),
    "run": ("recipe.yaml --dry-run", "recipe.yaml --set experts=4"),
    "recipes": ("", "dense-to-int4 mine.yaml"),
    "families": ("", "--json"),
    "formats": ("", "--json"),
    "schema": ("", "prune"),
    "demo": ("", "folder"),
}


def epilog(command: str) -> str:
    """What the help text of a command ends with."""
    lines = [f"  moeconv {command} {words}".rstrip() for words in EXAMPLES[command]]
    return "\n\n".join(["Examples:", *lines, f"Manual: {PAGES}{command}.md"])
