#!/usr/bin/env bash
# Everything a machine with a GPU, and without a network, should tell, in under six minutes: tests, then bench/gpu.py.
#
#   bench/gpu.sh RESULTS [OFFICIAL]      OFFICIAL: a checkout of the official implementation, timed beside ours
#
# Writes as it goes: RESULTS/tests.txt, RESULTS/gpu.jsonl (a line for each measurement), RESULTS/kernels_*.json.
set -u
cd "$(dirname "$0")/.."
mkdir -p "$1"
python=${PYTHON:-python3}
rm -f "$1/tests.done"
(timeout 150 "$python" -m pytest tests/test_kernels.py -q -k cuda --durations=10 > "$1/tests.txt" 2>&1
 touch "$1/tests.done") &
LIMIT=300 WAIT_FOR="$1/tests.done" timeout 345 "$python" bench/gpu.py "$1" ${2:+--official "$2"} > "$1/gpu.txt" 2>&1
code=$?
tail -5 "$1/tests.txt"
cat "$1/gpu.txt"
exit $code
