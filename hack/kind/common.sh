# shellcheck shell=bash disable=SC2034  # sourced; not every script uses every name
# What the scripts of this directory share: names, messages, and the two questions that several of them ask.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
# shellcheck source=env.sh
. "$HERE/env.sh"
# shellcheck source=versions.sh
. "$HERE/versions.sh"
CLUSTER=refold
CONTEXT=kind-$CLUSTER
NODE=$CLUSTER-control-plane
mkdir -p "$REFOLD_CACHE/bin" "$REFOLD_CACHE/log"

# Messages go to stderr: some scripts answer on stdout.
say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# at_least HAVE LEAST: whether version HAVE is LEAST or later.
at_least() { [ -n "$1" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

# Whether this is a Debian machine that we may install packages on.
is_debian_root() { [ "$(id -u)" = 0 ] && [ "$(. /etc/os-release 2>/dev/null && echo "$ID")" = debian ]; }

# Whether Docker can pull, asked of Docker itself (it may use mirrors and proxies that this shell doesn't know), at most
# once per run. REFOLD_REGISTRY=yes or =no in the environment answers instead.
registry_in_reach() {
  if [ -z "${REFOLD_REGISTRY:-}" ]; then
    if timeout 15 docker pull -q hello-world:latest >/dev/null 2>&1; then REFOLD_REGISTRY=yes; else REFOLD_REGISTRY=no; fi
    export REFOLD_REGISTRY
    say "container registry in reach: $REFOLD_REGISTRY"
  fi
  [ "$REFOLD_REGISTRY" = yes ]
}

# docker build, quiet unless it fails. With BuildKit where this client has it, else with the legacy builder (a client without
# buildx would refuse otherwise); the Dockerfiles use nothing that only one of them knows.
docker_build() {
  local log=$REFOLD_CACHE/log/docker-build.log buildkit=(DOCKER_BUILDKIT=0)
  if docker buildx version >/dev/null 2>&1; then buildkit=(DOCKER_BUILDKIT=1); fi
  env "${buildkit[@]}" docker build "$@" >"$log" 2>&1 || { tail -n 30 "$log" >&2; die "docker build $* failed (log in $log)"; }
}

# A short name for the contents of files and folders (below the current folder), for caching by content.
content_key() { find "$@" -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12; }
