#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole pipeline on a small real model, in order. Complete steps are skipped: run it again after an interruption.
#
#   bash scripts/quickstart.sh                                        # sample data; recipes/README.md has the minutes
#   bash scripts/quickstart.sh --max_steps 4 --limit 8                # every step, shortened
#   bash scripts/quickstart.sh --run_dir outputs/mine --data_dir DIR  # your own data directory
#   bash scripts/quickstart.sh --run_dir outputs/mine --data_dir DIR --rows_per_task 900  # no task drowns the others
#   bash scripts/quickstart.sh --run_dir outputs/mine --base ID       # your own base: folder or Hub id
#   bash scripts/quickstart.sh --run_dir outputs/mine --merge_config YAML  # your own team
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
run_dir=outputs/quickstart data_dir='' base='' merge_config=$here/moe_merge.yaml limit=60 settings=() steps=() scoring=()
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
  case "$1" in
    --run_dir) run_dir=$2 ;;
    --data_dir) data_dir=$2 ;;
    --base) base=$2 ;;
    --merge_config) merge_config=$2 ;;
    --limit) limit=$2 ;;
    --max_steps) steps=("$1" "$2") ;;  # of the trunk, of each expert and of the team; the dense baseline takes their sum
    --seed | --rows_per_task) settings+=("$1" "$2") ;;  # of every training
    --bf16) settings+=("$1" "$2"); [ "$2" = true ] && scoring=(--bf16) || scoring=(--no-bf16) ;;
    *) echo "error: unknown option '$1'; known: --run_dir --data_dir --base --merge_config --limit --max_steps --seed --rows_per_task --bf16" >&2; exit 2 ;;
  esac
  shift 2
done
step() { python "$here/scripts/timed_step.py" --run_dir "$run_dir" --title "$1" -- "${@:2}"; }
run() { step "$1" python "$here/scripts/$2.py" --run_dir "$run_dir" "${@:3}"; }
launch() {
  step "$1" accelerate launch --quiet --config_file "$here/recipes/accelerate/cpu.yaml" "$here/recipes/$2.py" \
    --config "$here/recipes/sample/$3.yaml" --run_dir "$run_dir" "${@:4}"
}

[ -n "$base" ] || run "dense base" make_base
if [ -z "$data_dir" ]; then
  run "sample data" make_sample_data
  run "rehearsal" rehearse --base "${base:-$run_dir/base}"
fi
data=(--data_dir "${data_dir:-$run_dir/data}")
base=(--base "${base:-$run_dir/base}")
trunk=(--base "$run_dir/trunk")
team=(--merge_config "$merge_config")
matched=("${data[@]}" ${settings[@]+"${settings[@]}"})  # macOS's bash 3 calls an empty array unset
training=("${matched[@]}" ${steps[@]+"${steps[@]}"})

# Step 1: the trunk, one model tuned on everything, and from it one LoRA for each role
launch "trunk" instruct_tune instruct_tune_trunk "${base[@]}" "${training[@]}"
roles=$(python -m finteam_experts.merging.config "$merge_config")
for role in $roles; do
  launch "expert: $role" train_expert train_expert --role "$role" "${team[@]}" "${trunk[@]}" "${training[@]}"
done

# Step 2: the experts become one mixture of experts, with a router that is fitted to them
run "merge" merge_moe "${team[@]}" "${trunk[@]}"
run "router" fit_router "${data[@]}"

# Step 3: tune the whole team for a few steps, and the trunk for as many steps as experts and team had, for comparison
launch "tune: team" instruct_tune instruct_tune_moe "${training[@]}"
run "routing report" report_routing "${data[@]}" "${trunk[@]}" --tuned --passages 6 --max_tokens 96
launch "tune: dense baseline" instruct_tune instruct_tune_dense "${trunk[@]}" "${matched[@]}"

# Step 4: evaluate all of them, and show what came out
run "evaluation" evaluate "${data[@]}" "${base[@]}" --models base dense-instruct moe-instruct --limit "$limit" --chats 12 \
  ${scoring[@]+"${scoring[@]}"}
python "$here/scripts/summarize.py" --run_dir "$run_dir"
cat <<END

The team is in        $run_dir/moe-instruct
Talk to the team:     make space MODEL_ID=$run_dir/moe-instruct
Train it for longer:  bash scripts/quickstart.sh --run_dir outputs/longer --max_steps 240
END
