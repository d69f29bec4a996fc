#!/usr/bin/env bash
# Runs the contract suite on the oldest and on the newest supported transformers, each in an environment of its own that
# is made anew from the package index: tests/matrix.sh DIR [PYTEST OPTIONS ...]. The oldest is the bound in
# pyproject.toml, the newest is the release in recipes/ci/constraints.txt. Families that a release has no class for are
# skipped, and so is what needs a newer one (moeconv/versions.py).
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: $0 DIR [PYTEST OPTIONS ...]" >&2
    exit 2
fi
root=$1
shift
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\)",$/\1/p' pyproject.toml)
releases=recipes/ci/constraints.txt
newest=$(sed -n 's/^transformers==\([0-9]*\.[0-9]*\)\..*/\1/p' "$releases")
failed=0
for release in "$oldest" "$newest"; do
    rm -rf "$root/$release"
    "$python" -m venv "$root/$release"
    grep -v '^transformers==' "$releases" >"$root/$release/constraints.txt"
    "$root/$release/bin/pip" install -q -c "$root/$release/constraints.txt" -e '.[test]' "transformers==$release.*"
    "$root/$release/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
    "$root/$release/bin/python" -m pytest -q tests/contract tests/unit/test_transformers_registry.py "$@" || failed=1
done
exit "$failed"
