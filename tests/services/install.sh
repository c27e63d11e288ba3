#!/usr/bin/env bash
# Installs what the tests run against. Safe to call again; does nothing when all is there.
#   Ceph RGW   the real S3 server: Debian packages, root only
#   moto       a light S3 server, in a virtual environment of its own (it wants another botocore than s3fs)
#   networks   what gives each node a network of its own and cuts it: Debian packages, root only
# What cannot be installed is named, and the tests that need it say so; the exit status is still 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MOTO_VERSION=5.2.5
MOTO_VENV=services/moto-venv
CEPH_PACKAGES=(radosgw ceph-mon ceph-osd ceph-common)
CEPH_COMMANDS=(radosgw radosgw-admin ceph ceph-authtool ceph-mon ceph-osd monmaptool)
NETWORK_PACKAGES=(iproute2 iptables util-linux)
NETWORK_COMMANDS=(ip iptables ip6tables nsenter)

left_out() { echo "services: left out: $1 ($2)"; }

has_all() {
    local command
    for command in "$@"; do
        command -v "$command" >/dev/null || return 1
    done
}

has_ceph() { has_all "${CEPH_COMMANDS[@]}"; }

has_networks() { has_all "${NETWORK_COMMANDS[@]}"; }

# install_packages WHAT PACKAGE...
install_packages() {
    local what=$1
    shift
    if [ "$(id -u)" -ne 0 ]; then
        left_out "$what" "installing Debian packages takes root"
        return
    fi
    if ! command -v apt-get >/dev/null; then
        left_out "$what" "this is not Debian or Ubuntu: no apt-get"
        return
    fi
    echo "services: installing $*"
    local log
    log=$(mktemp)
    # The packages start no daemon here: every test session starts its own, with its own directory.
    local apt=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -o DPkg::Lock::Timeout=120)
    if ! "${apt[@]}" install -y --no-install-recommends "$@" >"$log" 2>&1 &&
        ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 5 "$log"
        left_out "$what" "apt-get could not install it, see above"
    fi
    rm -f "$log"
}

install_ceph() { has_ceph || install_packages "Ceph RGW" "${CEPH_PACKAGES[@]}"; }

install_networks() { has_networks || install_packages "networks" "${NETWORK_PACKAGES[@]}"; }

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
install_networks
install_moto
has_ceph && has_networks && has_moto && echo "services: Ceph RGW, networks and moto are ready"
exit 0
