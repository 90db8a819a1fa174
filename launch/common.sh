# Sourced by the scripts beside it: what they need, what they do, and how a dry run only says it.
# shellcheck shell=bash

# need NAME...: stops unless every variable is set, naming all that are missing.
need() {
  local name missing=()
  for name in "$@"; do [ -n "${!name:-}" ] || missing+=("$name"); done
  [ ${#missing[@]} -eq 0 ] || { echo "$(basename "$0"): set ${missing[*]} (see launch/README.md)" >&2; exit 2; }
}

# run COMMAND...: shows a command and, unless DRY_RUN is set, executes it.
run() {
  printf '+ %s\n' "$(printf '%q ' "$@")" >&2
  [ -n "${DRY_RUN:-}" ] || "$@"
}

# RUN_ID names the run and its directory: launched again under the same name it resumes.
valid_run_id() {
  [[ "$RUN_ID" =~ ^[a-z]([a-z0-9-]{0,48}[a-z0-9])?$ ]] ||
    { echo "$(basename "$0"): RUN_ID=$RUN_ID must be lower-case letters, digits and -, at most 50" >&2; exit 2; }
}
