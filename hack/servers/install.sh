#!/usr/bin/env bash
# Installs what hack/servers runs (PostgreSQL, Redis, a JDK, Maven, openssl) and what bench loads it with (pgbench, wrk), where it is
# missing: Debian or Ubuntu as root; elsewhere it says what to install.
set -euo pipefail

missing=()
[ -n "$(command -v initdb || ls /usr/lib/postgresql/*/bin/initdb 2>/dev/null)" ] || missing+=(postgresql)
command -v java >/dev/null || missing+=(default-jdk-headless)
command -v mvn >/dev/null || missing+=(maven)
command -v pgbench >/dev/null || missing+=(postgresql)
command -v wrk >/dev/null || missing+=(wrk)
command -v redis-server >/dev/null || missing+=(redis-server)
command -v openssl >/dev/null || missing+=(openssl)
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests and benchmarks need these programs, install them first: ${missing[*]}" >&2
  exit 1
fi
echo "installing ${missing[*]} from the distribution's packages (1 min once)"
apt-get update -qq
# the tests start servers of their own: Debian's default cluster isn't wanted
mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
