"""llama.cpp's own converter on a checkpoint: run_converter.py LLAMA_CPP MODEL OUT.gguf, in the environment of torch.

LLAMA_CPP is a folder with convert_hf_to_gguf.py, conversion/ and gguf-py/ (environments.sh). The converter knows how a
tokenizer splits words by a hash of what it makes of a text, and how some families' tokenizers are stored; the test's is
none that it knows, so every family's is read as a byte-level BPE.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    folder, model, out = sys.argv[1:]
    sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]
    from conversion.base import TextModel

    def with_any_tokenizer(cls: type, **_: object) -> None:
        if "set_vocab" in cls.__dict__:
            cls.set_vocab = lambda self: self._set_vocab_gpt2()

    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    TextModel.__init_subclass__ = classmethod(with_any_tokenizer)
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "f32"]
    runpy.run_path(str(Path(folder) / "convert_hf_to_gguf.py"), run_name="__main__")


main()
