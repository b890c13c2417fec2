#!/usr/bin/env bash
# Algorithms x seeds on VMAS tasks in parallel processes, by Hydra's joblib launcher; then their report (docs/report.md).
#
# It needs the extras sweep, Hydra's launchers, and report:
#
#   pip install "benchmarl_trust[sweep,report]"
#   bash examples/sweep.sh                                                # into outputs/sweep, two runs at a time
#   JOBS=8 bash examples/sweep.sh outputs/tag algorithm=mappo,happo task=vmas/simple_tag seed=0,1,2,3
#
# The first argument is a new folder; overrides of BenchMARL's configuration follow it, with several values to sweep.
set -euo pipefail
folder=${1:-outputs/sweep}
shift || true
if [[ $folder == *=* ]]; then
    echo "The first argument is a folder, the overrides follow it: $folder" >&2
    exit 2
fi
if [[ -e $folder ]]; then
    echo "$folder is there already: remove it, or name a new folder." >&2
    exit 2
fi
if ! python -c "import hydra_plugins.hydra_joblib_launcher" 2> /dev/null; then
    echo "Hydra's joblib launcher is missing: pip install \"benchmarl_trust[sweep]\"" >&2
    exit 2
fi
if ! python -c "from importlib.util import find_spec as f; assert f('rliable') and f('matplotlib')" 2> /dev/null; then
    echo "What the report needs is missing: pip install \"benchmarl_trust[report]\"" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one thread for each run: they share the cores

python -m benchmarl.run -m hydra/launcher=joblib hydra.launcher.n_jobs="${JOBS:-2}" hydra.sweep.dir="$folder" \
    algorithm=mappo,happo,mars seed=0,1,2 task=vmas/balance experiment=vmas_laptop "$@"
python -m benchmarl_trust.report "$folder"
