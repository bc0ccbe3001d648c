#!/usr/bin/env bash
# Trains as several processes on this machine, and starts them again when one is lost.
#
#   launch/local.sh PROCESSES [flags of flax_alexnet.train]
#
# JAX_NUM_CPU_DEVICES=2 gives each process two devices of a CPU. One process uses all GPUs or TPUs of
# a machine, so with those this is for trying things out. RESTARTS=3 is how often to start again;
# mistakes (exit code 2) and Ctrl-C (130) end it at once.
set -uo pipefail

processes=${1:?usage: launch/local.sh PROCESSES [flags of flax_alexnet.train]}
shift
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait; exit 130' INT TERM

for ((attempt = 0; attempt <= ${RESTARTS:-3}; attempt++)); do
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  pids=()
  for ((index = 0; index < processes; index++)); do
    python -m flax_alexnet.train "$@" --parallel.coordinator "localhost:$port" \
      --parallel.num-processes "$processes" --parallel.process-id "$index" &
    pids+=($!)
  done
  worst=0
  for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    if ((code == 2 || code == 130)); then exit "$code"; fi
    if ((code != 0)); then worst=$code; fi
  done
  if ((worst == 0)); then exit 0; fi
  echo "a process was lost (exit code $worst)" >&2
done
exit "$worst"
