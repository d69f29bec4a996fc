#!/usr/bin/env bash
# The pipeline of a CI job: convert, verify, apply a gate to the loss, write a report. The JSON of every step is kept beside the models.
#   MODEL=... CALIBRATION=... HELDOUT=... WORK=build MAX_LOSS_INCREASE=0.5 bash ci/convert.sh
set -euo pipefail
: "${MODEL:?the dense checkpoint}" "${CALIBRATION:?text to tune and calibrate on}" "${HELDOUT:?text to measure on}"
work=${WORK:-build}
mkdir -p "$work"

moeconv upcycle "$MODEL" "$work/moe" --method drop --experts 8 --top-k 2 --json > "$work/upcycle.json"
moeconv tune "$work/moe" "$work/tuned" --teacher "$MODEL" --data "$CALIBRATION" --train router,experts \
    ${STEPS:+--steps "$STEPS"} ${TUNE_TOKENS:+--tokens "$TUNE_TOKENS"} --json > "$work/tune.json"
moeconv calibrate "$work/tuned" "$work/stats.safetensors" --data "$CALIBRATION" --tokens "${TOKENS:-32768}" --json > "$work/calibrate.json"
moeconv prune "$work/tuned" "$work/pruned" --ratio 0.5 --stats "$work/stats.safetensors" --json > "$work/prune.json"
moeconv quantize "$work/pruned" "$work/int4" --scheme int4 --json > "$work/quantize.json"
moeconv verify "$work/int4" --json > "$work/verify.json"

# the report is written whether the gate passes or not; the job ends with the exit code of the gate
code=0
moeconv evaluate "$work/int4" --reference "$MODEL" --data "$HELDOUT" --max-loss-increase "${MAX_LOSS_INCREASE:-0.5}" \
    --json > "$work/evaluate.json" || code=$?
moeconv report "$work/int4" "$work/report.html" --markdown --overwrite --reference "$MODEL" --stats "$work/stats.safetensors" \
    --results "$work/upcycle.json" --results "$work/tune.json" --results "$work/prune.json" \
    --results "$work/quantize.json" --results "$work/verify.json" --results "$work/evaluate.json" -q
exit "$code"
