# SPDX-License-Identifier: Apache-2.0
# The pipeline as stages, for scripts that hand each to a scheduler: they source this file.
#
# read_options NAMES "$@" sets a variable for each of the options NAMES and checks those that every pipeline needs.
# pipeline calls `stage NAME KIND AFTER COMMAND` for each stage, which the caller defines: KIND is replicated (a copy of the model on
# each GPU), sharded (the model cut into pieces) or plain; AFTER lists the stages whose folders it reads; for a KIND other than
# plain, COMMAND is what `accelerate launch` takes. No stage comes before one that it waits for.

usage_error() { echo "error: $1" >&2; exit 2; }

read_options() {
  local known=$1 name
  shift
  while [ $# -gt 0 ]; do
    name=${1#--}
    [[ "$1" == --* && " $known " == *" $name "* ]] || usage_error "unknown option '$1'; known: --${known// / --}"
    [ $# -ge 2 ] || usage_error "$1 needs a value"
    printf -v "$name" %s "$2"
    shift 2
  done
  for name in $known; do
    [ -n "${!name+set}" ] || usage_error "--$name is missing"
  done
  for name in train_expert instruct_tune_moe instruct_tune_dense; do
    [ -f "$recipes/$name.yaml" ] || usage_error "$recipes/$name.yaml does not exist: name a folder of the three recipes with --recipes"
  done
}

pipeline() {
  local role roles before='' start=$base where="--run_dir $run_dir --data_dir $data_dir"
  roles=$(python -m finteam_experts.merging.config "$merge_config" | paste -sd ' ')
  # Step 1: the trunk, where the folder has a recipe for it. The experts do not need each other
  if [ -f "$recipes/instruct_tune_trunk.yaml" ]; then
    stage trunk replicated '' "recipes/instruct_tune.py --config $recipes/instruct_tune_trunk.yaml --base $base $where"
    before=trunk start=$run_dir/trunk
  fi
  for role in $roles; do
    stage "$role" replicated "$before" "recipes/train_expert.py --config $recipes/train_expert.yaml --base $start --merge_config $merge_config --role $role $where"
  done
  # Step 2
  stage merge plain "$roles" "python scripts/merge_moe.py --run_dir $run_dir --base $start --merge_config $merge_config \
&& python scripts/fit_router.py $where && python scripts/report_routing.py $where --base $start"
  # Step 3
  stage team sharded merge "recipes/instruct_tune.py --config $recipes/instruct_tune_moe.yaml $where"
  # The baseline may take as many steps as experts and team did: it reads their records
  stage dense replicated team "recipes/instruct_tune.py --config $recipes/instruct_tune_dense.yaml --base $start $where"
  # Step 4
  stage evaluate plain dense "python scripts/evaluate.py $where --base $base --bf16"
}
