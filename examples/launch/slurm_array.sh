#!/bin/bash
# Extraction by 32 workers as a SLURM job array: sbatch slurm_array.sh
# Workers find their work in the store. More can be added, or ended, at any time, and a task that is
# requeued after a pre-emption goes on. Not run by us on a cluster.
#SBATCH --array=0-31
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=extract-%A-%a.log

exec ping-llm extract-activations \
    --model Qwen/Qwen2.5-7B \
    --input "s3://bucket/texts/*.parquet" \
    --output s3://bucket/activations \
    --layers 14,21 \
    --overlong truncate-right \
    --worker-id "slurm-$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID"
