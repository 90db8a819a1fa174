#!/usr/bin/env bash
# TPU VMs through queued resources.
#
#   launch/tpu.sh create | setup | run | logs | status | babysit | delete      [--config.KEY=VALUE ...]
#
# create   asks for the slice; nothing happens when it is there already
# setup    on every host: this repository at REVISION, its packages, BUCKET mounted at ~/runs
# run      starts training on every host; nothing happens while it runs
# babysit  all of the above, and again after every preemption, until the run ends by itself
#
# Needs PROJECT ZONE ACCELERATOR (v5litepod-8) RUNTIME (v2-alpha-tpuv5-lite) RUN_ID; setup: REPOSITORY REVISION BUCKET;
# run: CONFIG CHECKPOINT, and where the corpus is: --config.data.root=/home/ME/runs/data/cremad. SPOT=1 for preemptible
# chips. BUCKET should have a hierarchical namespace: renaming a directory is atomic there. Credentials are those of the
# hosts' service account. DRY_RUN=1 only prints.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
action=${1:-}
shift || true
need PROJECT ZONE RUN_ID
valid_run_id
where=(--project="$PROJECT" --zone="$ZONE")
queued=(gcloud compute tpus queued-resources)

# on WORKER COMMAND: runs a command on worker 0, or on all.
on() { run gcloud compute tpus tpu-vm ssh "$RUN_ID" "${where[@]}" --worker="$1" --command="$2"; }

# What the slice is: ABSENT when there is none, UNKNOWN when nobody answers.
state() {
  local said
  if said=$("${queued[@]}" describe "$RUN_ID" "${where[@]}" --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}" # after what gcloud warns of
  elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then echo ABSENT
  else echo UNKNOWN; echo "$said" >&2; fi
}

create() {
  need ACCELERATOR RUNTIME
  local is=ABSENT
  [ -n "${DRY_RUN:-}" ] || is=$(state)
  case $is in
    ABSENT) ;;
    UNKNOWN) return 1 ;;
    *) echo "$RUN_ID is there: $is" >&2; return ;;
  esac
  run "${queued[@]}" create "$RUN_ID" --node-id="$RUN_ID" "${where[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

setup() {
  need REPOSITORY REVISION BUCKET
  on all "set -e
    [ -d ambijax ] || git clone -q $(printf %q "$REPOSITORY") ambijax
    cd ambijax && git fetch -q && git checkout -q $(printf %q "$REVISION")
    python3 -m venv .venv-uv && .venv-uv/bin/pip install -q uv # the image's own Python may be older than 3.11
    [ -d .venv ] || .venv-uv/bin/uv venv -q --seed --python 3.12 .venv
    .venv/bin/pip install -q -e '.[tpu]'
    mkdir -p ~/runs
    mountpoint -q ~/runs || gcsfuse --implicit-dirs --rename-dir-limit=1000 $(printf %q "$BUCKET") ~/runs"
}

start() {
  need CONFIG CHECKPOINT
  local train watched
  train=$(printf '%q ' .venv/bin/python -m ambijax.train --config="$CONFIG" \
    --config.model.checkpoint="$CHECKPOINT" "$@")
  # The shell that waits for training writes its exit code beside the log.
  watched="$train --workdir=\$HOME/runs/$RUN_ID & child=\$!
    trap 'kill -TERM \$child' TERM
    while :; do code=0; wait \$child || code=\$?; kill -0 \$child 2>/dev/null || break; done
    echo \$code > ../$RUN_ID.exit"
  on all "cd ambijax
    if [ -f ../$RUN_ID.pid ] && kill -0 \$(cat ../$RUN_ID.pid) 2>/dev/null; then echo runs already; exit 0; fi
    rm -f ../$RUN_ID.exit
    nohup bash -c $(printf %q "$watched") >> ../$RUN_ID.log 2>&1 < /dev/null &
    echo \$! > ../$RUN_ID.pid"
}

# How training ended on worker 0: its exit code, 'running', or 'lost' when the host does not answer or knows nothing.
ended() {
  gcloud compute tpus tpu-vm ssh "$RUN_ID" "${where[@]}" --worker=0 --command="
    if [ -f $RUN_ID.exit ]; then cat $RUN_ID.exit
    elif [ -f $RUN_ID.pid ] && kill -0 \$(cat $RUN_ID.pid) 2>/dev/null; then echo running; else echo lost; fi" \
    2>/dev/null || echo lost
}

delete() {
  [ -z "${DRY_RUN:-}" ] && [ "$(state)" = ABSENT ] && return
  run "${queued[@]}" delete "$RUN_ID" "${where[@]}" --force --quiet
}

babysit() {
  need ACCELERATOR RUNTIME REPOSITORY REVISION BUCKET CONFIG CHECKPOINT
  local how
  if [ -n "${DRY_RUN:-}" ]; then create; setup; start "$@"; delete; return; fi
  while :; do
    case $(state) in
      ABSENT) create || echo "not created; trying again" >&2 ;;
      SUSPENDED | FAILED) delete || echo "not deleted; trying again" >&2 ;; # preempted, or never granted
      ACTIVE)
        how=$(ended)
        case $how in
          running) ;;
          lost | 75) setup && start "$@" || echo "the slice is leaving; waiting for its state" >&2 ;;
          0) echo "$RUN_ID is done" >&2; delete; return ;;
          *) echo "$RUN_ID stopped with exit code $how: see $0 logs" >&2; return 1 ;;
        esac ;;
    esac
    sleep "${INTERVAL:-60}"
  done
}

case $action in
  create | setup | delete | babysit) "$action" "$@" ;;
  run) start "$@" ;;
  logs) on 0 "tail -n 100 -f $RUN_ID.log" ;;
  status)
    if [ -n "${DRY_RUN:-}" ]; then run "${queued[@]}" describe "$RUN_ID" "${where[@]}"; exit; fi
    echo "slice $(state), training $(ended)" ;;
  *) echo "usage: $0 create|setup|run|logs|status|babysit|delete" >&2; exit 2 ;;
esac
