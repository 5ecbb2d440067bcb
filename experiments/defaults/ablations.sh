#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the parts of the sample's team are worth: it is merged again without one, from a complete run.
#
#   bash experiments/defaults/ablations.sh outputs/quickstart outputs/ablations    # ten minutes on 2 cores
#
# Each folder in the second one is a run in which one part is missing. Complete steps are skipped.
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
run=$(cd "$1" && pwd) folder=$2
mkdir -p "$folder"

variant() {  # NAME PARTS...: a run folder that shares these parts with the complete run
  dir=$folder/$1
  mkdir -p "$dir"
  for part in base data "${@:2}"; do [ -e "$dir/$part" ] || ln -s "$run/$part" "$dir/$part"; done
}
merge() { python "$here/scripts/merge_moe.py" --run_dir "$dir" --base "$dir/trunk" "$@"; }
score() { python "$here/scripts/evaluate.py" --run_dir "$dir" --models "$@" --limit 200 --bf16; }

variant complete trunk dense-instruct moe-instruct; score trunk dense-instruct moe-instruct
variant not-tuned-as-a-whole trunk moe; score moe
variant hidden-gates trunk adapters experts; merge; score moe
variant two-experts-per-token trunk adapters experts
merge --experts_per_token 2; python "$here/scripts/fit_router.py" --run_dir "$dir"; score moe
