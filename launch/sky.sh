#!/usr/bin/env bash
# SkyPilot: launches launch/sky.yaml as a managed job, which comes back by itself after a preemption.
#
#   launch/sky.sh launch | status | logs | cancel
#
# Needs RUN_ID; launch: CONFIG BUCKET (s3://... or gs://...) DATA (the corpus in it, data/cremad). DRY_RUN=1 only prints.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
need RUN_ID
valid_run_id

# Whether a job of exactly this name is in the queue. awk reads to the end: a pipe closed early would look like "no".
runs() {
  sky jobs queue --skip-finished 2>/dev/null |
    awk -v id="$RUN_ID" '{for (i = 1; i <= NF; i++) if ($i == id) found = 1} END {exit !found}'
}

case ${1:-} in
  launch)
    need CONFIG BUCKET DATA
    if [ -z "${DRY_RUN:-}" ] && runs; then
      echo "$RUN_ID runs already" >&2
      exit 0
    fi
    run sky jobs launch launch/sky.yaml --name "$RUN_ID" --env RUN_ID="$RUN_ID" --env CONFIG="$CONFIG" \
      --env BUCKET="$BUCKET" --env DATA="$DATA" --detach-run --yes ;;
  status) run sky jobs queue ;;
  logs) run sky jobs logs --name "$RUN_ID" ;;
  cancel) run sky jobs cancel --name "$RUN_ID" --yes ;;
  *) echo "usage: $0 launch|status|logs|cancel" >&2; exit 2 ;;
esac
