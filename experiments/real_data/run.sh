#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The quickstart's recipe with more rows, on real tasks and conversations: is the team as good as one model with the same steps?
#
#   bash experiments/real_data/run.sh DIR outputs/real_data "0 1"    # about 90 minutes a seed on one core with bf16
#   python experiments/real_data/table.py outputs/real_data          # what came out
#
# DIR is a data directory with the roles of team.yaml. A seed has a run folder of its own; complete steps are skipped.
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
source=$(cd "$1" && pwd) folder=$2 seeds=${3:-0 1} base=${4:-outputs/quickstart/base}
rows=(--per_device_train_batch_size 4 --rows_per_task 600 --rows_of_task '{stock_movement: 160}')  # near chance for every model of this size
launch() {
  accelerate launch --quiet --config_file "$here/recipes/accelerate/cpu.yaml" "$here/recipes/$1.py" \
    --config "$here/recipes/sample/$2.yaml" "${where[@]}" --seed "$seed" "${@:3}"
}

for seed in $seeds; do
  run_dir=$folder/seed$seed data=$folder/data
  mkdir -p "$run_dir" "$data/chats"
  for part in tasks corpora; do [ -e "$data/$part" ] || ln -s "$source/$part" "$data/$part"; done
  for file in "$source"/chats/*; do [ -e "$data/chats/${file##*/}" ] || ln -s "$file" "$data/chats/${file##*/}"; done
  python "$here/scripts/rehearse.py" --run_dir "$folder" --base "$base"
  where=(--run_dir "$run_dir" --data_dir "$data") trunk=(--base "$run_dir/trunk") team=(--merge_config "$here/experiments/real_data/team.yaml")

  launch instruct_tune instruct_tune_trunk --base "$base" "${rows[@]}" --max_steps 1200 --learning_rate 5e-4 \
    --warmup_steps 40 --lr_scheduler_kwargs '{"num_decay_steps": 300}' --save_steps 200
  for role in macro micro quant credit; do
    launch train_expert train_expert --role "$role" "${team[@]}" "${trunk[@]}" "${rows[@]}" --steps_per_task 60 --max_length 2048 \
      --learning_rate 1e-3 --lr_scheduler_type linear --lr_scheduler_kwargs '{}' --warmup_steps 6 --save_steps 60 \
      --learn_from '{corpus: 0.05, chats: 0.4, general: 0.15, tasks: 0.4}'
  done
  python "$here/scripts/merge_moe.py" --run_dir "$run_dir" "${team[@]}" "${trunk[@]}"
  python "$here/scripts/fit_router.py" "${where[@]}"
  launch instruct_tune instruct_tune_moe "${rows[@]}" --max_steps 48 --save_steps 24
  # as many steps as the experts, 60 for each of nine tasks, and the team had
  launch instruct_tune instruct_tune_dense "${trunk[@]}" "${rows[@]}" --max_steps 588 \
    --warmup_steps 20 --lr_scheduler_kwargs '{"num_decay_steps": 147}' --save_steps 200
  python "$here/scripts/evaluate.py" "${where[@]}" --base "$base" --models base trunk dense-instruct moe moe-instruct --limit 200 --chats 20
  python "$here/scripts/report_routing.py" "${where[@]}" "${trunk[@]}" --tuned --passages 6 --max_tokens 96
done
