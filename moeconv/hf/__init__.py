"""`import moeconv.hf` makes stock transformers 5 load experts stored packed (bitsandbytes NF4, FP4, row-wise INT8).

`AutoModelForCausalLM.from_pretrained(directory)` then keeps those experts packed in memory, decodes per forward only
the experts that tokens were routed to, and runs the family's own experts code on them, in any experts_implementation.

How such a checkpoint is told from an ordinary one: its `quantization_config` says `quant_method: bitsandbytes` (what
transformers 4 and SGLang read) and has a `moeconv` key besides. transformers picks the config class by `load_in_4bit`
or `load_in_8bit`, so those two entries of its table are wrapped by a class that looks for the key. With it our config
is built, whose `quant_method` "moeconv" leads to the quantizer registered under that name; without it the class that
was there before is called, and the stock quantizer follows. Nothing else of bitsandbytes is touched.
"""

from moeconv.hf.layout import METHOD, Layout, find_layouts
from moeconv.hf.modules import PackedExperts, PackedLinear
from moeconv.hf.quantizer import PackedExpertsConfig, PackedExpertsQuantizer, register

register()

__all__ = [
    "METHOD",
    "Layout",
    "PackedExperts",
    "PackedExpertsConfig",
    "PackedExpertsQuantizer",
    "PackedLinear",
    "find_layouts",
    "register",
]
