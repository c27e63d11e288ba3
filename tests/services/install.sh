#!/usr/bin/env bash
# Installs the S3 servers that the tests run against. Safe to call again; does nothing when all is there.
#   Ceph RGW   the real thing: Debian packages, root only
#   moto       a light S3 server, in a virtual environment of its own (it wants another botocore than s3fs)
# What cannot be installed is named, and the tests that need it say so; the exit status is still 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MOTO_VERSION=5.2.5
MOTO_VENV=services/moto-venv
CEPH_PACKAGES=(radosgw ceph-mon ceph-osd ceph-common)
CEPH_COMMANDS=(radosgw radosgw-admin ceph ceph-authtool ceph-mon ceph-osd monmaptool)

left_out() { echo "services: left out: $1 ($2)"; }

has_ceph() {
    local command
    for command in "${CEPH_COMMANDS[@]}"; do
        command -v "$command" >/dev/null || return 1
    done
}

install_ceph() {
    has_ceph && return
    if [ "$(id -u)" -ne 0 ]; then
        left_out "Ceph RGW" "installing Debian packages takes root"
        return
    fi
    if ! command -v apt-get >/dev/null; then
        left_out "Ceph RGW" "this is not Debian or Ubuntu: no apt-get"
        return
    fi
    echo "services: installing ${CEPH_PACKAGES[*]}"
    local log
    log=$(mktemp)
    # The packages start no daemon here: every test session starts its own, with its own directory.
    local apt=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -o DPkg::Lock::Timeout=120)
    if ! "${apt[@]}" install -y --no-install-recommends "${CEPH_PACKAGES[@]}" >"$log" 2>&1; then
        { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${CEPH_PACKAGES[@]}"; } >"$log" 2>&1
    fi
    if ! has_ceph; then
        tail -n 5 "$log"
        left_out "Ceph RGW" "apt-get could not install it, see above"
    fi
    rm -f "$log"
}

has_moto() { [ -x "$MOTO_VENV/bin/moto_server" ] && [ "$(cat "$MOTO_VENV/.version" 2>/dev/null)" = "$MOTO_VERSION" ]; }

install_moto() {
    has_moto && return
    echo "services: installing moto $MOTO_VERSION"
    local python=.venv/bin/python
    [ -x "$python" ] || python=python3
    rm -rf "$MOTO_VENV"
    if "$python" -m venv "$MOTO_VENV" && "$MOTO_VENV/bin/pip" install --quiet "moto[server]==$MOTO_VERSION"; then
        echo "$MOTO_VERSION" >"$MOTO_VENV/.version"
    else
        left_out "moto" "pip could not install it, see above"
    fi
}

mkdir -p services
install_ceph
install_moto
has_ceph && has_moto && echo "services: Ceph RGW and moto are ready"
exit 0
