#!/usr/bin/env bash
# GKE: fills in launch/gke.yaml and applies it. Applied again under the same RUN_ID nothing changes; to start a run that
# ended once more, delete it first (its directory stays).
#
#   launch/gke.sh apply | status | logs | delete
#
# Needs RUN_ID; apply: IMAGE CONFIG BUCKET DATA SERVICE_ACCOUNT ACCELERATOR (tpu-v5-lite-podslice) TOPOLOGY (2x4)
# HOSTS (2) CHIPS_A_HOST (4). The bucket holds checkpoints/Qwen2-Audio-7B-Instruct, the corpus at DATA (data/cremad) and
# the runs; the pods reach it as SERVICE_ACCOUNT, without a key. DRY_RUN=1 prints the manifest and the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
need RUN_ID
valid_run_id

manifest() {
  local text name
  text=$(cat launch/gke.yaml)
  for name in RUN_ID IMAGE CONFIG BUCKET DATA SERVICE_ACCOUNT ACCELERATOR TOPOLOGY HOSTS CHIPS_A_HOST; do
    text=${text//"\${$name}"/"${!name}"}
  done
  printf '%s\n' "$text"
}

case ${1:-} in
  apply)
    need IMAGE CONFIG BUCKET DATA SERVICE_ACCOUNT ACCELERATOR TOPOLOGY HOSTS CHIPS_A_HOST
    [ -z "${DRY_RUN:-}" ] || manifest
    run kubectl apply -f - < <(manifest) ;;
  status) run kubectl get jobset,pods -l "jobset.sigs.k8s.io/jobset-name=$RUN_ID" ;;
  logs) run kubectl logs -f "job/$RUN_ID-hosts-0" -c train ;;
  delete) run kubectl delete jobset "$RUN_ID" --ignore-not-found ;;
  *) echo "usage: $0 apply|status|logs|delete" >&2; exit 2 ;;
esac
