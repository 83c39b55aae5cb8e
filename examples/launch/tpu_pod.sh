#!/bin/bash
# Extraction on a TPU VM pod: bash tpu_pod.sh NAME ZONE
# The hosts of a pod join by themselves and are one worker with one model, sharded over all chips.
# Start it on further pods with the same output, and they share the work. Not run by us on TPUs.
set -euo pipefail

gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command '
    pip install --quiet "ping-llm[tpu]" &&
    ping-llm extract-activations \
        --model Qwen/Qwen2.5-72B \
        --input "gs://bucket/texts/*.parquet" \
        --output gs://bucket/activations \
        --layers 40,60 \
        --overlong truncate-right \
        --mesh data=1,fsdp=-1
'
