#!/usr/bin/env bash
# Everything a machine with a GPU, and without a network, should tell, in about seven minutes: tests, then bench/gpu.py,
# then a run stopped by SIGTERM and resumed, which must end with the bits of one left alone.
#
#   bench/gpu.sh RESULTS [OFFICIAL]      OFFICIAL: a checkout of the official implementation, timed beside ours
#
# Writes as it goes: RESULTS/tests.txt, RESULTS/gpu.jsonl (a line for each measurement), RESULTS/kernels_*.json,
# RESULTS/run.txt, RESULTS/runs/. FLAGS are those of the runs; on a CPU try
# FLAGS="--num-updates 300 --batch-size 8".
set -u
cd "$(dirname "$0")/.."
mkdir -p "$1"
python=${PYTHON:-python3}
rm -rf "$1/tests.done" "$1/runs"
(timeout 150 "$python" -m pytest test_dql.py tests/test_kernels.py -o addopts=-q -k cuda --durations=10 > "$1/tests.txt" 2>&1
 touch "$1/tests.done") &
LIMIT=240 WAIT_FOR="$1/tests.done" timeout 285 "$python" bench/gpu.py "$1" ${2:+--official "$2"} > "$1/gpu.txt" 2>&1
code=$?

real_run() {
    flags="--num-seeds 2 --log-every 100 ${FLAGS:---fused --device cuda --num-updates 20000 --eval-every 10000}"
    timeout 40 "$python" dql.py $flags --runs-dir "$1/runs" --run-name whole
    timeout --preserve-status 40 "$python" dql.py $flags --runs-dir "$1/runs" --run-name stopped &
    until [ -s "$1/runs/stopped/metrics.csv" ] || ! kill -0 $! 2> /dev/null; do sleep 0.05; done
    kill -TERM $!
    wait $!
    echo "exit code of the stopped run: $?"
    timeout 40 "$python" dql.py --resume "$1/runs/stopped"
    PYTHONPATH=tests:. "$python" -c "
import pathlib, sys
from runs import assert_same_end
assert_same_end(*(pathlib.Path(sys.argv[1], name) for name in ('whole', 'stopped')))
print('the stopped and resumed run ends with the same bits')" "$1/runs"
}

real_run "$1" > "$1/run.txt" 2>&1 || code=1
tail -5 "$1/tests.txt"
cat "$1/gpu.txt" "$1/run.txt"
exit $code
