#!/usr/bin/env bash
# Installs what the tests run against. Safe to call again; does nothing when all is there.
#   Ceph RGW   the real S3 server: Debian packages, root only
#   moto       a light S3 server, in a virtual environment of its own (it wants another botocore than s3fs)
#   extras     the clients of Grafana and W&B, in a virtual environment of their own (one of them replaces urllib3)
#   Chromium   the browser in which the report of a run is opened: a Debian package
#   networks   what gives each node a network of its own and cuts it: Debian packages, root only
#   Prometheus and Alertmanager, with promtool and amtool: Debian packages, root only
#   Grafana's schema package and a TypeScript compiler: npm, into services/grafana-schema
# What cannot be installed is named, and the tests that need it say so; the exit status is still 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MOTO_VERSION=5.2.5
MOTO_VENV=services/moto-venv
EXTRAS_VENV=services/extras-venv
SCHEMA=services/grafana-schema
SCHEMA_SOURCE=tests/services/grafana-schema
CEPH_PACKAGES=(radosgw ceph-mon ceph-osd ceph-common)
CEPH_COMMANDS=(radosgw radosgw-admin ceph ceph-authtool ceph-mon ceph-osd monmaptool)
NETWORK_PACKAGES=(iproute2 iptables util-linux)
NETWORK_COMMANDS=(ip tc iptables ip6tables nsenter)
PROMETHEUS_PACKAGES=(prometheus prometheus-alertmanager)
PROMETHEUS_COMMANDS=(prometheus promtool prometheus-alertmanager amtool)

left_out() { echo "services: left out: $1 ($2)"; }

has_all() {
    local command
    for command in "$@"; do
        command -v "$command" >/dev/null || return 1
    done
}

has_ceph() { has_all "${CEPH_COMMANDS[@]}"; }

has_networks() { has_all "${NETWORK_COMMANDS[@]}"; }

has_prometheus() { has_all "${PROMETHEUS_COMMANDS[@]}"; }

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

install_prometheus() { has_prometheus || install_packages "Prometheus" "${PROMETHEUS_PACKAGES[@]}"; }

# Debian and Ubuntu call the command differently.
has_chromium() { [ -x /usr/bin/chromium ] || [ -x /usr/bin/chromium-browser ]; }

install_chromium() { has_chromium || install_packages "Chromium" chromium; }

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

has_extras() { cat pyproject.toml constraints.txt | cmp -s - "$EXTRAS_VENV/.installed-from"; }

purelib_of() { "$1/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }

install_extras() {
    has_extras && return
    echo "services: installing the extras grafana and wandb"
    rm -rf "$EXTRAS_VENV"
    # The environment sees the packages of .venv behind its own, so that only those of the extras are installed.
    if .venv/bin/python -m venv --without-pip "$EXTRAS_VENV" &&
        echo "import site; site.addsitedir('$(purelib_of .venv)')" >"$(purelib_of "$EXTRAS_VENV")/venv.pth" &&
        .venv/bin/pip --python "$EXTRAS_VENV/bin/python" install --quiet --constraint constraints.txt \
            --no-build-isolation --editable '.[grafana,wandb]'; then
        cat pyproject.toml constraints.txt >"$EXTRAS_VENV/.installed-from"
    else
        left_out "the extras" "pip could not install them, see above"
    fi
}

has_schema() { cmp -s "$SCHEMA_SOURCE/package-lock.json" "$SCHEMA/package-lock.json" && [ -d "$SCHEMA/node_modules/typescript" ]; }

install_schema() {
    has_schema && return
    if ! command -v npm >/dev/null; then
        left_out "Grafana's schema" "there is no npm"
        return
    fi
    echo "services: installing Grafana's schema"
    mkdir -p "$SCHEMA"
    cp "$SCHEMA_SOURCE"/package*.json "$SCHEMA"
    if ! npm ci --prefix "$SCHEMA" --ignore-scripts --no-audit --no-fund --silent; then
        rm -f "$SCHEMA/package-lock.json"
        left_out "Grafana's schema" "npm could not install it, see above"
    fi
}

mkdir -p services
install_ceph
install_networks
install_prometheus
install_chromium
install_moto
install_extras
install_schema
has_ceph && has_networks && has_prometheus && has_chromium && has_moto && has_extras && has_schema &&
    echo "services: Ceph RGW, networks, Prometheus, Chromium, moto, the extras and Grafana's schema are ready"
exit 0
