#!/usr/bin/env bash
# prune-repair.yaml as shell commands for CI: prune a Mixture-of-Experts, repair its router, and fail if the loss rises too much.
#   bash prune-repair.sh MOE OUT CALIBRATION HELDOUT
set -euo pipefail
moe=${1:?usage: prune-repair.sh MOE OUT CALIBRATION HELDOUT} out=${2:?OUT} calibration=${3:?CALIBRATION} heldout=${4:?HELDOUT}
work=$(mktemp -d "$(dirname "$out")/prune-repair.XXXXXX")
trap 'rm -rf "$work"' EXIT

moeconv calibrate "$moe" "$work/stats.safetensors" --data "$calibration" ${TOKENS:+--tokens "$TOKENS"} --json > "$work/calibrate.json"
moeconv prune "$moe" "$work/pruned" --ratio "${RATIO:-0.5}" --criterion reap --stats "$work/stats.safetensors" --json > "$work/prune.json"
moeconv tune "$work/pruned" "$out" --objective distill --teacher "$moe" --data "$calibration" \
    ${TOKENS:+--tokens "$TOKENS"} --steps "${STEPS:-60}" --json > "$work/tune.json"
moeconv evaluate "$out" --reference "$moe" --data "$heldout" ${EVAL_TOKENS:+--tokens "$EVAL_TOKENS"} \
    --max-loss-increase "${MAX_LOSS_INCREASE:-0.3}"
