#!/bin/sh
# Installs parts of the lock into a Python environment: each file only if it has one of the recorded hashes, and nothing else.
#   sh requirements/install.sh PYTHON PART...         parts: runtime, dev, image, gcs, azure, grafana, wandb
# With `runtime` comes torch: its CPU build if an index or folder that pip is configured for has it, else the default build with its
# CUDA libraries. TORCH=cpu or TORCH=cuda insists on one. If there is a folder requirements/wheels, files come from there and from
# nowhere else (`make wheels` fills it).
set -eu
here=$(dirname "$0")
python=$1
shift

pip_install() {
    for part in "$@"; do
        if [ ! -f "$here/$part.txt" ]; then
            echo "install.sh: '$part': expected one of $(cd "$here" && echo *.txt | sed 's/\.txt//g')" >&2
            return 2
        fi
        set -- "$@" -r "$here/$part.txt"
        shift
    done
    if [ -d "$here/wheels" ]; then
        set -- --no-index --find-links "$here/wheels" "$@"
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes "$@"
}

for part in "$@"; do
    [ "$part" = runtime ] || continue
    case ${TORCH:-either} in
    cpu | cuda) pip_install "$TORCH" ;;
    either)
        if ! pip_install cpu 2>/dev/null; then
            echo "install.sh: no CPU build of torch with a recorded hash where pip looks: taking the default build"
            pip_install cuda
        fi
        ;;
    *)
        echo "install.sh: TORCH=$TORCH: expected cpu or cuda" >&2
        exit 2
        ;;
    esac
done
pip_install "$@"
