#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole road on a small real model, in order. Complete steps are skipped: run it again after an interruption.
#
#   bash scripts/quickstart.sh                                        # sample data, about 11 minutes on 2 cores
#   bash scripts/quickstart.sh --max_steps 4 --limit 8                # every step, shortened
#   bash scripts/quickstart.sh --run_dir outputs/mine --data_dir DIR  # your own data directory
#   bash scripts/quickstart.sh --run_dir outputs/mine --base ID       # your own base: folder or Hub id
#   bash scripts/quickstart.sh --run_dir outputs/mine --merge_config YAML  # your own team
set -euo pipefail

run_dir=outputs/quickstart data_dir='' base='' merge_config=moe_merge.yaml limit=60 steps=()
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
  case "$1" in
    --run_dir) run_dir=$2 ;;
    --data_dir) data_dir=$2 ;;
    --base) base=$2 ;;
    --merge_config) merge_config=$2 ;;
    --limit) limit=$2 ;;
    --max_steps) steps=(--max_steps "$2") ;;
    *) echo "error: unknown option '$1'; known: --run_dir --data_dir --base --merge_config --limit --max_steps" >&2; exit 2 ;;
  esac
  shift 2
done
step() { python scripts/timed_step.py --run_dir "$run_dir" --title "$1" -- "${@:2}"; }
launch() { step "$1" accelerate launch --config_file recipes/accelerate/cpu.yaml "${@:2}" --run_dir "$run_dir"; }

[ -n "$base" ] || step "dense base" python scripts/make_base.py --run_dir "$run_dir"
[ -n "$data_dir" ] || step "sample data" python scripts/make_sample_data.py --run_dir "$run_dir"
data=(--data_dir "${data_dir:-$run_dir/data}")
base=(--base "${base:-$run_dir/base}")
team=(--merge_config "$merge_config")
training=("${data[@]}" ${steps[@]+"${steps[@]}"})  # macOS's bash 3 calls an empty array unset

# Step 1: one LoRA for each role
roles=$(python -m finteam_experts.merge_config "$merge_config")
for role in $roles; do
  launch "expert: $role" recipes/train_expert.py --config recipes/sample/train_expert.yaml \
    --role "$role" "${team[@]}" "${base[@]}" "${training[@]}"
done

# Step 2: the experts become one mixture of experts, with a router that knows them
step "merge" python scripts/merge_moe.py --run_dir "$run_dir" "${team[@]}" "${base[@]}"
step "router" python scripts/fit_router.py --run_dir "$run_dir" "${data[@]}"
step "routing report" python scripts/report_routing.py --run_dir "$run_dir" "${data[@]}" "${base[@]}" \
  --passages 8 --max_tokens 96

# Step 3: tune the team, and a dense model on the same rows for comparison
launch "tune: team" recipes/instruct_tune.py --config recipes/sample/instruct_tune_moe.yaml "${training[@]}"
launch "tune: dense baseline" recipes/instruct_tune.py --config recipes/sample/instruct_tune_dense.yaml \
  "${base[@]}" "${training[@]}"

# Step 4: what that bought
step "evaluation" python scripts/evaluate.py --run_dir "$run_dir" "${data[@]}" "${base[@]}" --limit "$limit"

python scripts/timed_step.py --run_dir "$run_dir" --summary
cat <<EOF

The team lies in      $run_dir/moe-instruct
The reports in        $run_dir/reports: routing and evaluation, as .json and .png
Talk to the team:     make space MODEL_ID=$run_dir/moe-instruct
Train it for longer:  bash scripts/quickstart.sh --run_dir outputs/longer --max_steps 400
EOF
