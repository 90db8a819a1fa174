#!/usr/bin/env bash
# One machine: CPU, or one or more GPUs.
#
#   CONFIG=configs/grpoz.py:tiny RUN_ID=tiny launch/local.sh [--config.KEY=VALUE ...]
#
# One process drives all devices. PROCESSES=8 starts eight, the i-th on GPU i, as a cluster on the loopback.
# RUNS=DIR holds the runs (default: runs), PYTHON the interpreter, DRY_RUN=1 only prints.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
need CONFIG RUN_ID
valid_run_id
train=("${PYTHON:-python}" -m ambijax.train --config="$CONFIG" --workdir="${RUNS:-runs}/$RUN_ID" "$@")
processes=${PROCESSES:-1}
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || { echo "local.sh: PROCESSES=$processes must be a whole number from 1" >&2; exit 2; }

if [ "$processes" -eq 1 ]; then
  [ -n "${DRY_RUN:-}" ] && { run "${train[@]}"; exit; }
  exec "${train[@]}" # signals reach it directly
fi

cluster=(JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-12345}" JAX_NUM_PROCESSES="$processes")
children=()
stopped=
trap 'stopped=1; kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  [ -z "$stopped" ] || break
  one=(env "${cluster[@]}" JAX_PROCESS_ID="$i" CUDA_VISIBLE_DEVICES="$i" "${train[@]}")
  if [ -n "${DRY_RUN:-}" ]; then run "${one[@]}"; continue; fi
  "${one[@]}" &
  children+=($!)
done

code=0
for child in ${children[@]+"${children[@]}"}; do
  while :; do # a trapped signal ends `wait` before the child ends
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  [ "$status" -eq 0 ] || code=$status
done
exit "$code"
