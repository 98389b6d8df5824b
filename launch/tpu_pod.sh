#!/usr/bin/env bash
# Run a command on every worker of a TPU pod slice, over gcloud. Without a command: `distckpt doctor`.
#
#   TPU=my-pod ZONE=us-central2-b launch/tpu_pod.sh
#   TPU=my-pod ZONE=us-central2-b launch/tpu_pod.sh python3 -m distckpt run train.py --steps 100
#   launch/tpu_pod.sh --print                                      show the command, run nothing
#
# The workers have the checkout in FOLDER, and an environment with `pip install -e '.[xla]'`.
set -euo pipefail

TPU=${TPU:-}               # name of the TPU VM
ZONE=${ZONE:-}             # its zone
PROJECT=${PROJECT:-}       # empty: gcloud's own setting
WORKER=${WORKER:-all}      # or one worker's number
FOLDER=${FOLDER:-distckpt} # on the workers, from the home folder

refuse() { echo "launch/tpu_pod.sh: $1" >&2; exit 2; }
usage() { sed -nE -e '1d; /^#SBATCH/d; 1,/^set /s/^# ?//p' -e 's/^([A-Z_]+)=\$\{\1:-(.*)\} *(#|$) */  \1 (\2)  /p' "$0"; }
show() { printf '%q ' "$@"; echo; }

print=false
if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage; exit; fi
if [[ ${1:-} == --print ]]; then print=true; shift; fi
if $print; then TPU=${TPU:-TPU} ZONE=${ZONE:-ZONE}; fi # placeholders
[[ -n $TPU ]] || refuse "TPU is not set: TPU=name ZONE=zone launch/tpu_pod.sh ..."
[[ -n $ZONE ]] || refuse "ZONE is not set: TPU=$TPU ZONE=zone launch/tpu_pod.sh ..."
[[ $# -gt 0 ]] || set -- python3 -m distckpt doctor

# quoted once more, since a shell on the worker reads it again
there="cd $(printf '%q' "$FOLDER") && PJRT_DEVICE=TPU $(printf '%q ' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"}
  --worker "$WORKER" --command "${there% }")
if $print; then show "${command[@]}"; else exec "${command[@]}"; fi
