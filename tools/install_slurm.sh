#!/bin/bash
# Installs Debian's Slurm for the tests in tests/slurm (root, apt-get). Starts nothing: the tests run the daemons themselves.
set -euo pipefail

packages=(slurmd slurmctld slurm-client munge)
missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -Wf '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

# Debian starts services when it installs them, unless policy-rc.d says no.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
