#!/usr/bin/env bash
# The pipeline of dense-to-int4.yaml as shell commands for CI: every step prints one JSON object, and every gate can fail the job.
#   bash pipeline.sh WORK [MODEL CALIBRATION HELDOUT]
set -euo pipefail
work=${1:?usage: pipeline.sh WORK [MODEL CALIBRATION HELDOUT]}
demo=$(python -c 'import moeconv, os; print(os.path.join(os.path.dirname(moeconv.__file__), "demo_data"))')
model=${2:-$demo/model}
calibration=${3:-$demo/calibration.txt}
heldout=${4:-$demo/heldout.txt}
mkdir -p "$work"

step() { # NAME COMMAND...: run a step, keep its output, fail if that is not JSON
    local name=$1
    shift
    moeconv "$@" --json > "$work/$name.json"
    python -m json.tool < "$work/$name.json" > /dev/null
    echo "$name: ok"
}

step 1-upcycle upcycle "$model" "$work/upcycled" --method drop --experts 8 --top-k 2
step 2-tune tune "$work/upcycled" "$work/tuned" --objective distill --train router,experts \
    --teacher "$model" --data "$calibration" --seq-len 256 ${STEPS:+--steps "$STEPS"}
step 3-calibrate calibrate "$work/tuned" "$work/statistics.safetensors" --data "$calibration" --tokens 32768 --seq-len 256
step 4-prune prune "$work/tuned" "$work/pruned" --ratio 0.5 --criterion saliency --stats "$work/statistics.safetensors"
step 5-quantize quantize "$work/pruned" "$work/int4" --scheme int4
step 6-verify verify "$work/int4"
step 7-evaluate evaluate "$work/int4" --data "$heldout" --reference "$model" --max-loss-increase "${MAX_LOSS_INCREASE:-0.5}"

# two steps as one pipe: `-` reads the output of the previous step
moeconv prune "$work/tuned" "$work/piped" --keep 4 --stats "$work/statistics.safetensors" --json \
    | moeconv quantize - "$work/piped-int8" --scheme int8 --json \
    | python -m json.tool > "$work/8-piped.json"
echo "8-piped: ok"
