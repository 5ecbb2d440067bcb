#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole pipeline on a small real model, in order. Complete steps are skipped: run it again after an interruption.
#
#   bash scripts/quickstart.sh                                        # sample data; docs/speed.md has the time
#   bash scripts/quickstart.sh --max_steps 4 --limit 8                # every step, shortened
#   bash scripts/quickstart.sh --run_dir outputs/mine --data_dir DIR  # your own data directory
#   bash scripts/quickstart.sh --run_dir outputs/mine --base ID       # your own base: folder or Hub id
#   bash scripts/quickstart.sh --run_dir outputs/mine --merge_config YAML  # your own team
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
run_dir=outputs/quickstart data_dir='' base='' merge_config=$here/moe_merge.yaml limit=60 steps=()
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
step() { python "$here/scripts/timed_step.py" --run_dir "$run_dir" --title "$1" -- "${@:2}"; }
run() { step "$1" python "$here/scripts/$2.py" --run_dir "$run_dir" "${@:3}"; }
launch() {
  step "$1" accelerate launch --config_file "$here/recipes/accelerate/cpu.yaml" "$here/recipes/$2.py" \
    --config "$here/recipes/sample/$3.yaml" --run_dir "$run_dir" "${@:4}"
}

[ -n "$base" ] || run "dense base" make_base
[ -n "$data_dir" ] || run "sample data" make_sample_data
data=(--data_dir "${data_dir:-$run_dir/data}")
base=(--base "${base:-$run_dir/base}")
team=(--merge_config "$merge_config")
training=("${data[@]}" ${steps[@]+"${steps[@]}"})  # macOS's bash 3 calls an empty array unset

# Step 1: one LoRA for each role
roles=$(python -m finteam_experts.merging.config "$merge_config")
for role in $roles; do
  launch "expert: $role" train_expert train_expert --role "$role" "${team[@]}" "${base[@]}" "${training[@]}"
done

# Step 2: the experts become one mixture of experts, with a router that is fitted to them
run "merge" merge_moe "${team[@]}" "${base[@]}"
run "router" fit_router "${data[@]}"
run "routing report" report_routing "${data[@]}" "${base[@]}" --passages 8 --max_tokens 96

# Step 3: tune the team, and a dense model on the same rows for comparison
launch "tune: team" instruct_tune instruct_tune_moe "${training[@]}"
launch "tune: dense baseline" instruct_tune instruct_tune_dense "${base[@]}" "${training[@]}"

# Step 4: evaluate all of them
run "evaluation" evaluate "${data[@]}" "${base[@]}" --limit "$limit"

python "$here/scripts/timed_step.py" --run_dir "$run_dir" --summary
cat <<END

The team is in        $run_dir/moe-instruct
The reports are in    $run_dir/reports: routing and evaluation, as .json and .png
Talk to the team:     make space MODEL_ID=$run_dir/moe-instruct
Train it for longer:  bash scripts/quickstart.sh --run_dir outputs/longer --max_steps 400
END
