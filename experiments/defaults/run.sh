#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The quickstart with other seeds, numbers of threads and number types: do its defaults hold? Complete runs are skipped.
#
#   bash experiments/defaults/run.sh outputs/defaults                       # all twelve: about four hours on 2 cores
#   bash experiments/defaults/run.sh outputs/defaults "0 1" "2" "true"      # seeds, threads, bf16
#   FIRST_CORE=1 bash experiments/defaults/run.sh outputs/defaults "2" "1"  # on another core, beside a run on core 0
#   python experiments/defaults/table.py outputs/defaults                   # what came out
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
folder=$1 seeds=${2:-0 1 2} threads=${3:-2 1} types=${4:-true false} core=${FIRST_CORE:-0}
for type in $types; do
  for count in $threads; do
    for seed in $seeds; do
      run_dir=$folder/seed$seed-threads$count-bf16$type
      [ ! -f "$run_dir/reports/summary.html" ] || continue
      mkdir -p "$run_dir"
      taskset -c "$core-$((core + count - 1))" bash "$here/scripts/quickstart.sh" --run_dir "$run_dir" --seed "$seed" --bf16 "$type" --limit 200 \
        > "$run_dir/log.txt" 2>&1
    done
  done
done
python "$here/experiments/defaults/table.py" "$folder"
