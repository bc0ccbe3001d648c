#!/usr/bin/env bash
# Trains as several processes on this machine, and starts them again when one is lost.
#
#   launch/local.sh PROCESSES [flags of flax_alexnet.train]
#
# JAX_NUM_CPU_DEVICES=2 gives each process two devices of a CPU. One process uses all GPUs or TPUs of
# a machine, so with those this is for trying things out. RESTARTS=3 is how often to start again;
# errors of the program (exit codes 1 and 2) and Ctrl-C (130) end it at once. A SIGTERM or Ctrl-C for
# this script goes to all, which save and end with exit code 75, as this script does then.
set -uo pipefail

processes=${1:?usage: launch/local.sh PROCESSES [flags of flax_alexnet.train]}
shift
pids=()
stopped=
stop() {
  stopped=1
  kill "${pids[@]}" 2>/dev/null
}
trap stop INT TERM

for ((attempt = 0; attempt <= ${RESTARTS:-3}; attempt++)); do
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  pids=()
  for ((index = 0; index < processes; index++)); do
    python -m flax_alexnet.train "$@" --parallel.coordinator "localhost:$port" \
      --parallel.num-processes "$processes" --parallel.process-id "$index" &
    pids+=($!)
  done
  lost=0
  for index in "${!pids[@]}"; do
    wait "${pids[index]}"
    code=$?
    while ((code > 128)) && kill -0 "${pids[index]}" 2>/dev/null; do  # a signal ended the waiting
      wait "${pids[index]}"
      code=$?
    done
    case $code in
      0) ;;
      1 | 2 | 75 | 130) final=${final:-$code} ;;
      *)
        lost=$code
        echo "process $index ended with exit code $code" >&2
        ;;
    esac
  done
  if [[ -n ${final:-} ]]; then exit "$final"; fi
  if [[ -n $stopped ]]; then exit 130; fi
  if ((lost == 0)); then exit 0; fi
done
exit "$lost"
