#!/usr/bin/env bash
# Train on this machine, one rank per process, started by torchrun.
#
#   launch/train.sh --steps 200 --save runs/a          options are launch/train.py's
#   NPROC=4 LOG_RANK=0,1 launch/train.sh               4 ranks, two of them logged
#   launch/train.sh --print --steps 200                show the command, run nothing
#   python3 launch/train.py --help                     all options
#   launch/train.sh --dry-run --ranks 512 --parallel pp+fsdp    what 512 ranks would save and hold
set -euo pipefail

NPROC=${NPROC:-2}        # ranks on this machine
LOG_RANK=${LOG_RANK:-0}  # local ranks whose output is shown; torchrun keeps the others' in LOG_DIR
LOG_DIR=${LOG_DIR:-}     # folder for every rank's output; empty: a temporary one
PYTHON=${PYTHON:-python3}
SCRIPT=${SCRIPT:-launch/train.py}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

refuse() { echo "launch/train.sh: $1" >&2; exit 2; }
usage() { sed -nE -e '1d; /^#SBATCH/d; 1,/^set /s/^# ?//p' -e 's/^([A-Z_]+)=\$\{\1:-(.*)\} *(#|$) */  \1 (\2)  /p' "$0"; }
show() { printf '%q ' "$@"; echo; }
has_torch() { "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; }

print=false dry=false arguments=()
for argument in "$@"; do
  case $argument in
    --print) print=true ;;
    --dry-run) dry=true ;;
    --help | -h) usage; exit ;;
    *) arguments+=("$argument") ;;
  esac
done
for ((i = 0; i < ${#arguments[@]}; i++)); do
  case ${arguments[i]} in
    --parallel) value=${arguments[i + 1]:-} ;;
    --parallel=*) value=${arguments[i]#*=} ;;
    *) continue ;;
  esac
  case $value in
    fsdp | ddp | pp | tp | pp+fsdp) ;;
    *) refuse "--parallel '$value' is unknown: use one of fsdp, ddp, pp, tp, pp+fsdp" ;;
  esac
done
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || refuse "NPROC is '$NPROC': give the number of ranks, 1 or more"

cd "$(dirname "$0")/.."
if $dry; then
  command=("$PYTHON" launch/dryrun.py)
else
  # c10d on port 0: the system picks a free port, so two jobs on one machine never meet
  command=("$PYTHON" -m torch.distributed.run --nnodes 1 --nproc-per-node "$NPROC"
    --rdzv-backend c10d --rdzv-endpoint localhost:0
    --role rank --tee 3 --local-ranks-filter "$LOG_RANK" ${LOG_DIR:+--log-dir "$LOG_DIR"} "$SCRIPT")
fi
command+=(${arguments[@]+"${arguments[@]}"})
if $print; then show "${command[@]}"; exit; fi
has_torch || refuse "$PYTHON has no torch: activate the environment that has it, or PYTHON=.venv/bin/python launch/train.sh"
exec "${command[@]}"
