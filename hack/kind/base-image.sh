#!/usr/bin/env bash
# The image that all others start from: there, or pulled, or made from Debian's packages.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

docker image inspect "$BASE_IMAGE" >/dev/null 2>&1 && exit 0

if registry_in_reach; then
  say "pulling $BASE_IMAGE"
  docker pull -q "$BASE_IMAGE" >/dev/null && exit 0
  say "the pull failed"
fi

is_debian_root || die "$BASE_IMAGE can be neither pulled (no container registry in reach) nor made: that takes Debian and root"
if ! command -v mmdebstrap >/dev/null; then
  say "installing mmdebstrap"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap debian-archive-keyring >/dev/null
fi
say "making $BASE_IMAGE from Debian's packages (30 s once)"
# Slim as the public one is: without manuals, translations and Perl (which Debian's own way to a merged /usr needs). The machine's own CA certificates go in, so that builds
# reach package registries through whatever stands between.
slim=(--aptopt='Apt::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*'
  --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright')
# shellcheck disable=SC2016  # $1 is the new root, expanded by mmdebstrap
mmdebstrap --variant=minbase --include=ca-certificates,usr-is-merged --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr "${slim[@]}" \
  --customize-hook='cp /usr/local/share/ca-certificates/*.crt "$1/usr/local/share/ca-certificates/" 2>/dev/null || true' \
  --customize-hook='chroot "$1" update-ca-certificates' \
  --format=tar bookworm - 2>"$REFOLD_CACHE/log/mmdebstrap.log" |
  docker import --change 'CMD ["bash"]' - "$BASE_IMAGE" >/dev/null || { tail -n 20 "$REFOLD_CACHE/log/mmdebstrap.log" >&2; die "mmdebstrap failed"; }
