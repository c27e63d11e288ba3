#!/bin/sh
# Builds the image of this checkout with all its labels. Arguments go to `docker build`:
#   sh deploy/image/build.sh --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
# DOCKER: another command of the same form (podman, "buildah").  IMAGE: the name, elastic-pt:VERSION by default.
set -eu
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' elastic_pt/__init__.py)
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct)}"
revision=$(git rev-parse HEAD)
[ -z "$(git status --porcelain)" ] || revision="$revision-modified"
created=$(date --utc --date="@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
exec ${DOCKER:-docker} build --tag "${IMAGE:-elastic-pt:$version}" \
    --build-arg "VERSION=$version" \
    --build-arg "REVISION=$revision" \
    --build-arg "CREATED=$created" \
    --build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" \
    "$@" .
