#!/usr/bin/env bash
# Downloads the wheels that `run.sh` needs in addition to torch, for Python 3.12 on Linux x86-64.
#
#     benchmarks/cuda/wheels.sh [DIR]        default: .wheels in the checkout
#
# It needs a network and an installed elastic-pt (PYTHON=.venv/bin/python by default). It downloads the dependencies of
# elastic-pt at the versions of constraints.txt, without torch (and CUDA) and without those that the benchmark does not
# import (listed in `wheels.py`). The wheels and the checkout together must fit in 64 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

directory=${1:-.wheels}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$directory"
list=$("$python" benchmarks/cuda/wheels.py)
platforms=()
for glibc in 39 35 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
for old in manylinux2014 manylinux2010 manylinux1; do platforms+=(--platform "${old}_x86_64"); done
# shellcheck disable=SC2086
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$directory" $list
total=$(cat "$directory"/*.whl | wc -c)
echo "$(ls "$directory"/*.whl | wc -l) wheels, $((total / 1024 / 1024)) MiB in $directory"
if ((total > 60 * 1024 * 1024)); then
    echo "more than 60 MiB; the largest:" >&2
    ls -lS "$directory" | head -6 >&2
    exit 1
fi
