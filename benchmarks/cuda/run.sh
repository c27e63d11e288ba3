#!/usr/bin/env bash
# Measures elastic-pt on one NVIDIA GPU: bits, speed, cost of exactness, checkpoints, recovery.
#
#     benchmarks/cuda/run.sh                                   all parts, at most 560 s together
#     benchmarks/cuda/run.sh digests recovery                  some parts
#     benchmarks/cuda/run.sh --device cpu --size tiny --seconds 1200
#                                                              every part on a CPU, to try the benchmark itself
#
# Parts (each in its own process, with its own time limit; a part that fails or exceeds its limit does not stop the others):
#
#     numerics   exact against native arithmetic, alternating; median of 7 pairs                 about 30 s
#     snapshot   how long a checkpoint of 4.3 GB stops training, and how fast it is restored     about 60 s
#     digests    do disturbed runs end with equal weights? W = 1, 2, 3; eager, compiled          about 200 s
#     recovery   a worker or a node is killed: seconds by phase                                  about 120 s
#     speed      step time, tokens/s, MFU, memory of 125M, 350M and 1B models; profile           about 200 s
#
# The times are estimates for an H100: the benchmark has only run on CPUs so far.
#
# On a machine lent for 15 minutes in total: a start takes at least a minute of this time, no machine starts with less
# than 4 minutes left, and a machine is taken back after 30 s without a command. So make two calls, the second
# directly after the first, both with `.wheels` in `carry`:
#
#     benchmarks/cuda/run.sh --seconds 330 numerics snapshot digests
#     benchmarks/cuda/run.sh --seconds 330 recovery speed
#
# Each call begins with an empty $OUT, so there are two sets of results: copy the first before the second call.
#
# It needs a checkout, Python 3.12 with torch >= 2.11, and 20 GB in the temporary directory, but no network. The other
# dependencies of elastic-pt come from a folder of wheels, which `wheels.sh` fills on a machine with a network. git
# ignores the folder, so copy it together with the checkout.
#
# Options:  --wheels DIR   folder of wheels (default: .wheels in the checkout, if it is there)
#           --out DIR      results (default: $OUT, else cuda-results): results.json, table.txt, *-logs.tar.gz
#           --seconds N    for all parts together (default 560); --device cuda|cpu; --size full|tiny
#           PYTHON=...     the interpreter that has torch (default: python3)
#
# The wheels are installed into a separate directory, which follows the checkout on PYTHONPATH. A virtual environment would
# not work: if Python itself is in a virtual environment, the new one does not see its torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
wheels=.wheels
out=${OUT:-cuda-results}
arguments=()
while (($#)); do
    case $1 in
        --wheels) wheels=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --help | -h) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        *) arguments+=("$1"); shift ;;
    esac
done

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
# torch requires this for deterministic matrix products on CUDA. Agents set it for their own workers.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
if compgen -G "$wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$PWD:$site
fi
"$python" -m benchmarks.cuda --out "$out" "${arguments[@]}"
