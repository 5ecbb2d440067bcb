#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole pipeline on Hugging Face Jobs: every stage is a job, submitted when the stages it reads from have succeeded.
#
#   hf buckets create OWNER/finteam && hf buckets sync DIR hf://buckets/OWNER/finteam/data
#   bash recipes/hf_jobs.sh --recipes recipes/llama3-8b --base ID --bucket OWNER/finteam
#   bash recipes/hf_jobs.sh ... --flavor h200x8 --gpus 8 --single_flavor h200 --timeout 12h --image python:3.12
#
# The run folder is in the bucket as `run`; every job fetches it and, however it ends, puts back what it wrote. This script
# waits for the stages, so leave it running. Run it again after a failure: a stage whose folder is complete is skipped, and one
# that was interrupted resumes from its last checkpoint. The code that runs is the last commit's. HF_TOKEN is taken from your shell.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/stages.sh

merge_config=moe_merge.yaml flavor=h200x8 gpus=8 single_flavor=h200 timeout=12h image=python:3.12 # single: for merge and evaluation
read_options 'recipes base bucket merge_config flavor gpus single_flavor timeout image' "$@"
run_dir=run data_dir=data
[ -n "${HF_TOKEN:-}" ] || usage_error "HF_TOKEN is not set: the jobs need a token that may write to $bucket"
code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
git archive HEAD | tar -x -C "$code"

remote=hf://buckets/$bucket
prepare="cp -r /code /work && cd /work && pip install --quiet --constraint constraints.txt --editable '.[eval,gpu]' \
&& hf buckets sync $remote/data data && mkdir -p run && hf buckets sync $remote/run run \
&& trap 'hf buckets sync run $remote/run' EXIT"

declare -A ids
stage() {  # NAME KIND AFTER COMMAND
  local command=$4 name machine=$flavor
  local -a after=()
  for name in $3; do after+=("${ids[$name]}"); done
  [ "${#after[@]}" -eq 0 ] || hf jobs wait "${after[@]}" >&2
  case $2 in
    plain) machine=$single_flavor ;;
    replicated) command="accelerate launch --config_file recipes/accelerate/multi_gpu.yaml --num_processes $gpus $4" ;;
    sharded) command="accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes $gpus $4" ;;
  esac
  ids[$1]=$(hf jobs run --detach --quiet --name "finteam-$1" --flavor "$machine" --timeout "$timeout" --secrets HF_TOKEN \
    --volume "$code:/code" "$image" bash -c "set -e; $prepare; $command")
  echo "$1: job ${ids[$1]}${3:+, after $3}"
}

pipeline
hf jobs wait "${ids[evaluate]}"
echo "Fetch the run: hf buckets sync $remote/run $PWD/outputs/run"
