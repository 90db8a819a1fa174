#!/usr/bin/env bash
# A container on this machine.
#
#   launch/docker.sh build | run | stop       [--config.KEY=VALUE ...]
#
# Needs RUN_ID and IMAGE; run: CONFIG RUNS (a directory) CHECKPOINT and DATA (directories; optional for :tiny). EXTRA=cuda
# builds for GPUs, GPUS=all gives them to the run. Relative directories are the repository's. SIGTERM to this script is the
# container's; stop waits two minutes for the checkpoint. DRY_RUN=1 only prints.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
action=${1:-}
shift || true
need IMAGE RUN_ID
valid_run_id

case $action in
  build) run docker build -f launch/Dockerfile --build-arg EXTRA="${EXTRA:-}" -t "$IMAGE" . ;;
  run)
    need CONFIG RUNS
    RUNS=$(realpath -m "$RUNS") # docker takes a relative path for the name of a volume
    mounts=(-v "$RUNS:/runs")
    flags=()
    if [ -n "${CHECKPOINT:-}" ]; then
      mounts+=(-v "$(realpath -m "$CHECKPOINT"):/checkpoint:ro")
      flags+=(--config.model.checkpoint=/checkpoint)
    fi
    if [ -n "${DATA:-}" ]; then
      mounts+=(-v "$(realpath -m "$DATA"):/data:ro")
      flags+=(--config.data.root=/data)
    fi
    train=(docker run --rm --name "$RUN_ID" --stop-timeout 120 ${GPUS:+--gpus "$GPUS"} --user "$(id -u):$(id -g)"
      -e HOME=/tmp -e XDG_CACHE_HOME=/runs/.cache "${mounts[@]}" "$IMAGE"
      --config="$CONFIG" --workdir="/runs/$RUN_ID" ${flags[@]+"${flags[@]}"} "$@")
    run mkdir -p "$RUNS" # docker would make it, as root
    if [ -n "${DRY_RUN:-}" ]; then run "${train[@]}"; else exec "${train[@]}"; fi ;;
  stop) run docker stop --time 120 "$RUN_ID" ;;
  *) echo "usage: $0 build|run|stop" >&2; exit 2 ;;
esac
