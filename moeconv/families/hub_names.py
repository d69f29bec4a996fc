"""Which family a model of the hub has, by the beginning of its name, for `moeconv families --model`."""

from __future__ import annotations

from fnmatch import fnmatchcase

# pattern of a name in lower case, without its owner -> model_type of its config.json; the first match counts
HUB_NAMES: tuple[tuple[str, str], ...] = (
    ("kimi-k2.[5-9]*", "kimi_k25"), ("kimi-k2*", "kimi_k2"), ("kimi-linear*", "kimi_linear"),
    ("kimi-vl*", "kimi_vl"), ("moonlight*", "deepseek_v3"),
    ("deepseek-r1-distill-llama*", "llama"), ("deepseek-r1-distill-qwen*", "qwen2"), ("deepseek-r1-*qwen3*", "qwen3"),
    ("deepseek-v4*", "deepseek_v4"), ("deepseek-v3.2*", "deepseek_v32"), ("deepseek-v3*", "deepseek_v3"),
    ("deepseek-r1*", "deepseek_v3"), ("deepseek-v2*", "deepseek_v2"), ("deepseek-coder-v2*", "deepseek_v2"),
    ("deepseek-moe*", "deepseek"), ("deepseek-llm*", "llama"), ("deepseek-coder*", "llama"),
    ("glm-5*", "glm_moe_dsa"), ("glm-4.7-flash*", "glm4_moe_lite"), ("glm-4.[56]v-flash*", "glm4v"),
    ("glm-4.[56]v*", "glm4v_moe"), ("glm-4.[567]*", "glm4_moe"), ("glm-4*-0414*", "glm4"), ("glm-z1*", "glm4"),
    ("glm-4*-hf", "glm"), ("glm-4*", "chatglm"), ("chatglm*", "chatglm"),
    ("qwen3.[5-9]-*-a*b*", "qwen3_5_moe"), ("qwen3.[5-9]-*reap*", "qwen3_5_moe"),
    ("qwen3.[5-9]-*", "qwen3_5"), ("qwen3-next*", "qwen3_next"),
    ("qwen3-coder-next*", "qwen3_next"), ("qwen3-vl-*-a*b*", "qwen3_vl_moe"), ("qwen3-vl*", "qwen3_vl"),
    ("qwen3-omni*", "qwen3_omni_moe"), ("qwen3-coder*", "qwen3_moe"), ("qwen3-*-a*b*", "qwen3_moe"),
    ("qwen3-*", "qwen3"), ("qwen2-57b-a14b*", "qwen2_moe"), ("qwen1.5-moe*", "qwen2_moe"),
    ("qwen2.5-vl*", "qwen2_5_vl"), ("qwen2-vl*", "qwen2_vl"), ("qwen2*", "qwen2"), ("qwen1.5*", "qwen2"),
    ("qwq-32b*", "qwen2"),
    ("*mixtral*", "mixtral"), ("wizardlm-2-8x22b*", "mixtral"), ("ministral-3-*", "mistral3"),
    ("mistral-small-3.[12]*", "mistral3"), ("mistral-*", "mistral"), ("ministral-*", "mistral"),
    ("codestral-22b*", "mistral"), ("zephyr-7b*", "mistral"),
    ("llama-4*", "llama4"), ("llama-3.2-*vision*", "mllama"), ("llama-*", "llama"), ("meta-llama-*", "llama"),
    ("codellama*", "llama"), ("tinyllama*", "llama"), ("smollm3*", "smollm3"), ("smollm*", "llama"), ("yi-*", "llama"),
    ("falcon3-*", "llama"), ("solar-10.7b*", "llama"),
    ("gpt-oss*", "gpt_oss"), ("gpt2*", "gpt2"), ("gpt-2*", "gpt2"),
    ("minimax-m3*", "minimax_m3_vl"), ("minimax-m2*", "minimax_m2"), ("minimax-*-hf", "minimax"),
    ("ernie-4.5-vl*", "ernie4_5_vl_moe"), ("ernie-4.5-*-a*b*", "ernie4_5_moe"), ("ernie-4.5-0.3b*", "ernie4_5"),
    ("hunyuan-a13b*", "hunyuan_v1_moe"), ("hunyuan-*b*", "hunyuan_v1_dense"),
    ("olmoe*", "olmoe"), ("flexolmo*", "flex_olmo"), ("olmo-3*", "olmo3"), ("olmo-2*", "olmo2"), ("olmo-*", "olmo"),
    ("phi-*moe*", "phimoe"), ("phi-3-small*", "phi3small"), ("phi-4-multimodal*", "phi4mm"), ("phi-[34]*", "phi3"),
    ("phi-[12]*", "phi"),
    ("granite-4*", "granitemoehybrid"), ("granite-3*-a*m*", "granitemoe"), ("granite-*", "granite"),
    ("lfm2-vl*", "lfm2_vl"), ("lfm2*-a*b*", "lfm2_moe"), ("lfm2*", "lfm2"),
    ("dots.llm1*", "dots1"), ("dots3-note*", "dots3_note"), ("*jamba*", "jamba"), ("nemotron-[3h]*", "nemotron_h"),
    ("nvidia-nemotron-*", "nemotron_h"), ("nemotron-*-minitron*", "nemotron"), ("minitron-*", "nemotron"),
    ("trinity-*", "afmoe"), ("afm-4.5b*", "arcee"), ("mimo-v2*", "mimo_v2_flash"), ("mimo-7b*", "mimo"),
    ("seed-oss*", "seed_oss"), ("stablelm-*", "stablelm"), ("*command-r7b*", "cohere2"), ("*command-a*", "cohere2"),
    ("*command-r*", "cohere"), ("aya-*", "cohere"),
    ("gemma-4*", "gemma4"), ("gemma-3n*", "gemma3n"), ("gemma-3-1b*", "gemma3_text"), ("gemma-3-270m*", "gemma3_text"),
    ("gemma-3*", "gemma3"), ("gemma-2-*", "gemma2"), ("gemma-*", "gemma"), ("codegemma*", "gemma"),
    ("internlm3*", "internlm3"), ("internlm2*", "internlm2"), ("baichuan*", "baichuan"), ("k-exaone*", "exaone_moe"),
    ("exaone-4*", "exaone4"), ("exaone-3*", "exaone"), ("ling-*2.5*", "bailing_hybrid"),
    ("ring-*2.5*", "bailing_hybrid"), ("ling-lite*", "bailing_moe"), ("ling-plus*", "bailing_moe"),
    ("ling-*", "bailing_moe_v2"), ("ring-*", "bailing_moe_v2"), ("step-3.7*", "step3p7"), ("step-3.5*", "step3p5"),
    ("minicpm-*", "minicpm"), ("minicpm3*", "minicpm3"), ("longcat-flash*", "longcat_flash"),
    ("starcoder2*", "starcoder2"), ("falcon-h1*", "falcon_h1"), ("falcon-*", "falcon"), ("solar-open*", "solar_open"),
    ("helium-*", "helium"), ("youtu-llm*", "youtu"), ("apertus*", "apertus"), ("dbrx*", "dbrx"), ("aria*", "aria"),
    ("bamba*", "bamba"),
)  # fmt: skip


def model_type_of(name: str) -> str | None:
    """The model_type of a model by its name on the hub, with or without OWNER/; None for a name without a pattern."""
    short = name.removeprefix("hf://").rpartition("/")[2].partition("@")[0].lower()
    return next((model_type for pattern, model_type in HUB_NAMES if fnmatchcase(short, pattern)), None)
