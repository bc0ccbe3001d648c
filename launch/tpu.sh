#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, and starts again when a host is lost.
#
#   NAME=my-slice ZONE=us-central2-b launch/tpu.sh [flags of flax_alexnet.train]
#
# Every host needs the package (pip install 'flax-alexnet[tpu]') and a folder that all share, such as
# a Filestore volume or a bucket mounted with gcsfuse, here /mnt/shared. JAX finds the other hosts by
# the slice's metadata.
set -uo pipefail

command="python -m flax_alexnet.train --recipe paper --workdir /mnt/shared/runs/alexnet \
--data.data-dir /mnt/shared/tensorflow_datasets$( (($#)) && printf ' %q' "$@")"

for ((attempt = 0; attempt <= ${RESTARTS:-10}; attempt++)); do
  gcloud compute tpus tpu-vm ssh "${NAME:?}" --zone "${ZONE:?}" --worker=all --command "$command"
  code=$?
  case $code in
    0 | 2 | 75 | 130) exit "$code" ;; # 75: stopped by a signal, and saved
  esac
  # A connection that broke may have left processes that hold the chips.
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all \
    --command "pkill -KILL -f [f]lax_alexnet.train" || true
done
exit "$code"
