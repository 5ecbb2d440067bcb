#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole road on a SLURM cluster: every stage is a job, which starts when those whose folders it reads have ended well.
#
#   bash recipes/slurm.sh --recipes recipes/llama3-8b --base ID --run_dir outputs/llama3-8b --data_dir DIR
#   bash recipes/slurm.sh ... --nodes 2 --gpus 8 --sbatch "--partition gpu --time 12:00:00"
#
# Run it again after a failure: a stage whose folder is complete is skipped, and one that was cut off goes on from its last
# checkpoint. Each job's log lies in RUN_DIR/logs.
set -euo pipefail
cd "$(dirname "$0")/.."

recipes='' base='' run_dir='' data_dir='' merge_config=moe_merge.yaml nodes=1 gpus=8 sbatch_options=''
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
  case "$1" in
    --recipes) recipes=$2 ;;
    --base) base=$2 ;;
    --run_dir) run_dir=$2 ;;
    --data_dir) data_dir=$2 ;;
    --merge_config) merge_config=$2 ;;
    --nodes) nodes=$2 ;;
    --gpus) gpus=$2 ;;
    --sbatch) sbatch_options=$2 ;;
    *) echo "error: unknown option '$1'; known: --recipes --base --run_dir --data_dir --merge_config --nodes --gpus --sbatch" >&2; exit 2 ;;
  esac
  shift 2
done
for name in recipes base run_dir data_dir; do
  [ -n "${!name}" ] || { echo "error: --$name is missing" >&2; exit 2; }
done
for file in train_expert instruct_tune_moe instruct_tune_dense; do
  [ -f "$recipes/$file.yaml" ] || { echo "error: $recipes/$file.yaml does not exist: name a folder of the three recipes with --recipes" >&2; exit 2; }
done
mkdir -p "$run_dir/logs"

# submit TITLE NODES AFTER COMMAND: prints the job's id. AFTER is a list of ids, as 12:13, or nothing.
submit() {
  # shellcheck disable=SC2086  # the options are several words
  sbatch --parsable --job-name "finteam-$1" --nodes "$2" --ntasks-per-node 1 --gpus-per-node "$gpus" \
    --output "$run_dir/logs/$1-%j.log" ${3:+--dependency afterok:$3} --kill-on-invalid-dep yes $sbatch_options --wrap "$4"
}
# One process a GPU; on several machines each starts its own, and the first machine of the job is where they meet.
# $SLURM_... is for the job's shell, not for this one.
# shellcheck disable=SC2016
launch='srun bash -c "accelerate launch --config_file CONFIG --num_processes ALL --num_machines MACHINES --machine_rank \$SLURM_PROCID --main_process_ip \$(scontrol show hostnames \$SLURM_JOB_NODELIST | head -n 1) --main_process_port 29500 STEP"'
training() {  # training CONFIG NODES STEP
  local line=${launch//CONFIG/recipes/accelerate/$1.yaml}
  line=${line//ALL/$(($2 * gpus))}
  line=${line//MACHINES/$2}
  echo "${line//STEP/$3 --run_dir $run_dir --data_dir $data_dir}"
}

# Step 1: the experts do not need each other, and each fits a machine
experts=''
for role in $(python -m finteam_experts.merge_config "$merge_config"); do
  id=$(submit "$role" 1 '' "$(training multi_gpu 1 "recipes/train_expert.py --config $recipes/train_expert.yaml --base $base --merge_config $merge_config --role $role")")
  experts=${experts:+$experts:}$id
done
# Step 2
moe=$(submit merge 1 "$experts" "python scripts/merge_moe.py --run_dir $run_dir --base $base --merge_config $merge_config \
&& python scripts/fit_router.py --run_dir $run_dir --data_dir $data_dir \
&& python scripts/report_routing.py --run_dir $run_dir --data_dir $data_dir --base $base")
# Step 3: the baseline waits for nobody
if [ "$nodes" -gt 1 ]; then sharded=multi_node; else sharded=fsdp2; fi
team=$(submit team "$nodes" "$moe" "$(training $sharded "$nodes" "recipes/instruct_tune.py --config $recipes/instruct_tune_moe.yaml")")
dense=$(submit dense 1 '' "$(training multi_gpu 1 "recipes/instruct_tune.py --config $recipes/instruct_tune_dense.yaml --base $base")")
# Step 4
last=$(submit evaluate 1 "$team:$dense" "python scripts/evaluate.py --run_dir $run_dir --data_dir $data_dir --base $base --bf16")
echo "experts ${experts//:/ }, merge $moe, team $team, baseline $dense, evaluation $last; logs in $run_dir/logs"
