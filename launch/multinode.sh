#!/usr/bin/env bash
# Train on several machines: run this on each of them, with the same HEAD. When a machine is lost, the others wait for
# it (or for another in its place), and all go on from the last checkpoint in RUN.
#
#   HEAD=node0 NNODES=2 launch/multinode.sh --steps 10000          on every machine
#   launch/multinode.sh --print                                    show the command, run nothing
#
# RUN must be a folder that all machines share. The number of ranks stays the same over restarts: each rank has random
# numbers of its own, and only then is the result the same to the bit.
set -euo pipefail

HEAD=${HEAD:-}                      # host of the rendezvous: any one of the machines, the same everywhere
PORT=${PORT:-29500}
NNODES=${NNODES:-2}
NPROC=${NPROC:-1}                   # ranks per machine
JOB=${JOB:-distckpt}                # the same everywhere; another name is another job
RUN=${RUN:-runs/$JOB}               # checkpoints
SAVE_EVERY=${SAVE_EVERY:-100}       # steps
RESTARTS=${RESTARTS:-10}            # how many times ranks are started again
RDZV_CONF=${RDZV_CONF:-join_timeout=1800}  # seconds to wait for a machine that is missing
PYTHON=${PYTHON:-python3}
SCRIPT=${SCRIPT:-launch/train.py}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

refuse() { echo "launch/multinode.sh: $1" >&2; exit 2; }
usage() { sed -nE -e '1d; /^#SBATCH/d; 1,/^set /s/^# ?//p' -e 's/^([A-Z_]+)=\$\{\1:-(.*)\} *(#|$) */  \1 (\2)  /p' launch/multinode.sh; }
show() { printf '%q ' "$@"; echo; }
has_torch() { "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; }

cd "$(dirname "$0")/.."
if [[ ${1:-} == --rank ]]; then # started by torchrun, once per rank and again after every restart
  shift
  resume=()
  # run.json comes last into a checkpoint, so a folder that has one is complete
  if compgen -G "$RUN/step-*/run.json" >/dev/null; then resume=(--resume "$RUN"); fi
  exec "$PYTHON" "$SCRIPT" --save "$RUN" --save-every "$SAVE_EVERY" ${resume[@]+"${resume[@]}"} "$@"
fi

print=false arguments=()
for argument in "$@"; do
  case $argument in
    --print) print=true ;;
    --help | -h) usage; exit ;;
    *) arguments+=("$argument") ;;
  esac
done
$print && HEAD=${HEAD:-HEAD} # a placeholder: nobody has to meet
[[ -n $HEAD ]] || refuse "HEAD is not set, so the machines cannot meet: HEAD=host NNODES=$NNODES launch/multinode.sh ..."
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || refuse "NPROC is '$NPROC': give the number of ranks per machine, 1 or more"
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || refuse "NNODES is '$NNODES': give the number of machines, 1 or more"

export RUN SAVE_EVERY PYTHON SCRIPT
# By default torchrun's agents share one store, and remember from the first round where it is; a machine that joins later
# waits for it in vain (seen in torch 2.13: it times out after a minute). With this each round has a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
command=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC"
  --max-restarts "$RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$JOB"
  --rdzv-conf "$RDZV_CONF" --no-python launch/multinode.sh --rank)
command+=(${arguments[@]+"${arguments[@]}"})
if $print; then show "${command[@]}"; exit; fi
has_torch || refuse "$PYTHON has no torch: activate the environment that has it, or PYTHON=.venv/bin/python launch/multinode.sh"
exec "${command[@]}"
