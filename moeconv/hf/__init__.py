"""`import moeconv.hf` lets stock transformers 5 load experts that are stored packed (bitsandbytes NF4, FP4, INT8).

`AutoModelForCausalLM.from_pretrained(directory)` then keeps these experts packed in memory. In each forward pass, it
decodes only the experts that tokens were routed to, and runs the family's own code on them, in any
experts_implementation.

How such a checkpoint is distinguished from an ordinary one: its `quantization_config` has `quant_method: bitsandbytes`
(which transformers 4 and SGLang read), and also a `moeconv` key. transformers chooses the config class by
`load_in_4bit` or `load_in_8bit`, so these two entries of its table are wrapped by a class that looks for the key. With
the key, our config is built, whose `quant_method` "moeconv" leads to the quantizer that is registered under this name.
Without it, the previous class is called, and the stock quantizer follows. Nothing else of bitsandbytes is changed.
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
