#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole pipeline on a SLURM cluster: every stage is a job, which starts when the stages it reads from have succeeded.
#
#   bash recipes/slurm.sh --recipes recipes/llama3-8b --base ID --run_dir outputs/llama3-8b --data_dir DIR
#   bash recipes/slurm.sh ... --nodes 2 --gpus 8 --sbatch "--partition gpu --time 12:00:00"
#
# Run it again after a failure: a stage whose folder is complete is skipped, and one that was interrupted resumes from its
# last checkpoint. The logs of the jobs are in RUN_DIR/logs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/recipes/stages.sh"

merge_config=$root/moe_merge.yaml nodes=1 gpus=8 sbatch=''
read_options 'recipes base run_dir data_dir merge_config nodes gpus sbatch' "$@"
for name in recipes base run_dir data_dir merge_config; do  # the jobs start in the repository
  if [ "$name" != base ] || [ -d "$base" ]; then printf -v "$name" %s "$(realpath -m "${!name}")"; fi
done
cd "$root"
mkdir -p "$run_dir/logs"

# One process per GPU. On several machines each starts its own, and the first machine of the job is the rendezvous.
# $SLURM_... is for the job's shell, not for this one.
# shellcheck disable=SC2016
launch='srun bash -c "accelerate launch --config_file CONFIG --num_processes ALL --num_machines MACHINES --machine_rank \$SLURM_PROCID --main_process_ip \$(scontrol show hostnames \$SLURM_JOB_NODELIST | head -n 1) --main_process_port 29500 COMMAND"'

declare -A ids
stage() {  # NAME KIND AFTER COMMAND
  local machines=1 config=multi_gpu after='' command=$4 name
  for name in $3; do after+=:${ids[$name]}; done
  if [ "$2" = sharded ]; then
    machines=$nodes config=fsdp2
    [ "$nodes" -gt 1 ] && config=multi_node
  fi
  if [ "$2" != plain ]; then
    command=${launch//CONFIG/recipes/accelerate/$config.yaml}
    command=${command//ALL/$((machines * gpus))}
    command=${command//MACHINES/$machines}
    command=${command//COMMAND/"$4"}
  fi
  # shellcheck disable=SC2086  # the options are several words
  ids[$1]=$(sbatch --parsable --job-name "finteam-$1" --nodes "$machines" --ntasks-per-node 1 --gpus-per-node "$gpus" \
    --output "$run_dir/logs/$1-%j.log" ${after:+--dependency afterok$after} --kill-on-invalid-dep yes $sbatch --wrap "$command")
  echo "$1: job ${ids[$1]}${3:+, after $3}"
}

pipeline
echo "logs in $run_dir/logs"
