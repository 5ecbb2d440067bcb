#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that a GPU changes, on one GPU and without network: the pipeline's steps at 135M in bfloat16 and in float32, then
# training and generation at the shapes of 1B and 8B bases. Under ten minutes by its design; not yet run on a GPU.
#
#   bash benchmarks/gpu.sh outputs/gpu                            # H100
#   bash benchmarks/gpu.sh outputs/gpu 312                        # A100: its bfloat16 peak in TFLOPS
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
run_dir=$1 tflops=${2:-989}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv 2> /dev/null || echo "no GPU was found: this will be slow"
date

run() { python "$here/scripts/$1.py" --run_dir "$run_dir/$type" "${@:2}"; }
# Rows apart and padded: without flash attention, which is fetched from the Hub, those of one sequence could see each other
train() { python "$here/recipes/$1.py" --config "$here/recipes/sample/$2.yaml" --run_dir "$run_dir/$type" --use_cpu false --max_steps 20 --padding_free false "${@:3}"; }
for type in bf16 fp32; do
  [ "$type" = bf16 ] && bf16=true scoring=--bf16 || bf16=false scoring=--no-bf16
  run make_base
  run make_sample_data
  for role in macro micro quant; do train train_expert train_expert --role "$role" --learn_from null --packing false --bf16 "$bf16"; done
  run merge_moe
  run fit_router
  train instruct_tune instruct_tune_moe --bf16 "$bf16"
  train instruct_tune instruct_tune_dense --base "$run_dir/$type/base" --bf16 "$bf16"
  run evaluate --models base dense-instruct moe-instruct --limit 60 --chats 0 "$scoring"
done
python "$here/benchmarks/gpu.py" --tflops "$tflops"
