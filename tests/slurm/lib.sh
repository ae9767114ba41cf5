# Shared by up, down and capture. Sourced, not run.
BASE=${SLURM_TEST_BASE:-/opt/slurm-test}         # one instance: state, keys, logs, configuration
DISTS=${SLURM_TEST_DIST:-/opt/slurm-test-dist}   # unpacked programs, shared by all instances
CLUSTER=${SLURM_TEST_CLUSTER:-testcluster}
OFFSET=${SLURM_TEST_PORT_OFFSET:-0}              # a multiple of 10: added to every port
DB_PORT=$((13306 + OFFSET))
SSH_PORT=$((2222 + OFFSET))
DB_PASS=slurm-test-only            # a loopback-only, throw-away database
NODES="n1 n2 n3 n4"
MULTIARCH=$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo "$(uname -m)-linux-gnu")

say() { printf '%s\n' "slurm-test: $*" >&2; }
die() { say "error: $*"; exit 1; }

# set_version VER: the paths and ports of one version. Both may be up at once.
set_version() {
    VER=$1
    VDIR=$BASE/$VER
    case $VER in
    24.11) SUITE=trixie; CTLD_PORT=16817; PLUGINS=slurm-wlm-jwt-plugin ;;
    22.05) SUITE=bookworm; CTLD_PORT=15817; PLUGINS=slurm-wlm-basic-plugins ;;
    *) die "unknown version '$VER' (24.11 or 22.05)" ;;
    esac
    CTLD_PORT=$((CTLD_PORT + OFFSET))
    DBD_PORT=$((CTLD_PORT + 2))
    SLURMD_PORT0=$((CTLD_PORT + 3))
    DB_NAME=slurm_acct_${VER/./_}
    PACKAGES="slurmctld slurmd slurmdbd slurm-client slurmrestd slurm-wlm-mysql-plugin $PLUGINS"
    DIST=$DISTS/$VER
    PLUGINDIR=$DIST/usr/lib/$MULTIARCH/slurm-wlm
}

# alive PIDFILE WORD: true if the process in PIDFILE runs and its command
# line or executable holds WORD (so that a recycled pid is not taken for ours).
alive() {
    local pid
    [ -s "$1" ] || return 1
    pid=$({ tr -dc 0-9 <"$1"; } 2>/dev/null) || return 1
    [ -n "$pid" ] && [ -d "/proc/$pid" ] || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline"; readlink "/proc/$pid/exe"; } 2>/dev/null | grep -q -- "$2"
}

# stop PIDFILE WORD [SECONDS]: TERM, wait, KILL; only by the recorded pid.
stop() {
    local pid i n=${3:-15}
    alive "$1" "$2" || { rm -f "$1"; return 0; }
    pid=$({ tr -dc 0-9 <"$1"; } 2>/dev/null) || return 0
    kill "$pid" 2>/dev/null || true
    for ((i = 0; i < n * 10; i++)); do
        alive "$1" "$2" || { rm -f "$1"; return 0; }
        sleep 0.1
    done
    say "$2 ($pid) did not stop in ${n}s: KILL"
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$1"
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
    local end=$((SECONDS + $1)) n=$1 what=$2
    shift 2
    while :; do
        timeout 20 "$@" >/dev/null 2>&1 9>&- && return 0
        [ $SECONDS -lt $end ] || break
        sleep 0.1
    done
    die "$what: not ready after ${n}s (logs: $BASE/log, ${VDIR:-$BASE}/log)"
}
