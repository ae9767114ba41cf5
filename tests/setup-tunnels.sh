#!/bin/sh
# What the suites of tunnels need on Debian: sshd, ssh and iproute2. As root; may be run again.
set -e
missing=""
command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || missing="$missing openssh-server"
command -v ssh >/dev/null || missing="$missing openssh-client"
command -v ip >/dev/null || [ -x /usr/sbin/ip ] || missing="$missing iproute2"
[ -n "$missing" ] || exit 0
[ -e /usr/sbin/policy-rc.d ] || {                 # dpkg starts no daemon
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
}
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
