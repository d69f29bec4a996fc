"""llama.cpp's own converter on checkpoints: run_converter.py LLAMA_CPP TYPE MODEL OUT.gguf [MODEL OUT.gguf ...], in the
environment of torch. TYPE is f32 or f16.

LLAMA_CPP is a folder with convert_hf_to_gguf.py, conversion/ and gguf-py/ (environments.sh). The converter knows how a
tokenizer splits words by a hash of what it makes of a text, and how some families' tokenizers are stored; the test's is
none that it knows, so every family's is read as a byte-level BPE. Prediction layers are left out, as moeconv does.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def convert(folder: str, kind: str, model: str, out: str, options: list[str]) -> bool:
    """Convert one checkpoint in a process of its own."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind, *options]
    code = 0
    try:
        runpy.run_path(str(Path(folder) / "convert_hf_to_gguf.py"), run_name="__main__")
    except SystemExit as error:
        code = 1 if error.code else 0
    except BaseException as error:
        print(f"{model}: {type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    folder, kind, *pairs = sys.argv[1:]
    sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]
    from conversion import get_model_class
    from conversion.base import TextModel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def options(model: str) -> list[str]:
        (architecture,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
        try:
            return ["--no-mtp"] if get_model_class(architecture).supports_mtp_export else []
        except NotImplementedError:
            return []

    def with_any_tokenizer(cls: type, **_: object) -> None:
        if "set_vocab" in cls.__dict__:
            cls.set_vocab = lambda self: self._set_vocab_gpt2()

    def plain_tokenizer(path: str, **_: object) -> PreTrainedTokenizerFast:
        config = json.loads((Path(path) / "tokenizer_config.json").read_text())
        words = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
        return PreTrainedTokenizerFast(tokenizer_file=str(Path(path) / "tokenizer.json"), **words)

    AutoTokenizer.from_pretrained = plain_tokenizer
    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    TextModel.__init_subclass__ = classmethod(with_any_tokenizer)
    done = [convert(folder, kind, model, out, options(model)) for model, out in zip(pairs[::2], pairs[1::2])]
    sys.exit(0 if all(done) else 1)


main()
