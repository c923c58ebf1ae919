#!/usr/bin/env bash
# A Docker engine that answers. Does nothing where there is one; on a Debian machine without, as root, installs Debian's
# and starts it, or starts it again when it has died.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

docker info >/dev/null 2>&1 && exit 0

if ! is_debian_root; then
  die "no Docker engine answers: $(docker version --format '{{.Server.Version}}' 2>&1 | tail -n 1 || true)
Start or install one and make sure that this user may use it. It is installed for you only on Debian, as root."
fi

if ! command -v dockerd >/dev/null || ! command -v runc >/dev/null; then
  say "installing Debian's docker.io (20 s once)"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io containerd runc iptables python3 \
    >"$REFOLD_CACHE/log/apt.log" 2>&1 || { cat "$REFOLD_CACHE/log/apt.log" >&2; die "apt-get install docker.io failed"; }
fi

if [ -d /run/systemd/system ]; then
  say "starting Docker by systemd"
  systemctl start docker
else
  # After a hard end another process (or the dead one, not reaped) may have the number in these files, and dockerd would
  # give up or wait for that one.
  for pidfile in /var/run/docker.pid /var/run/docker/containerd/containerd.pid; do
    [ -f "$pidfile" ] || continue
    case "$(readlink "/proc/$(cat "$pidfile")/exe" || true)" in */dockerd* | */containerd*) ;; *) rm -f "$pidfile" ;; esac
  done
  options=()
  # Bit 24 is CAP_SYS_RESOURCE. Where this machine lacks it, runc can't grant it to privileged containers (as kind's are).
  if (((0x$(sed -n 's/^CapBnd:\s*//p' /proc/self/status) >> 24 & 1) == 0)); then
    install -m 755 "$HERE/runc-without-cap-sys-resource" "$REFOLD_CACHE/bin/"
    options=(--add-runtime "limited=$REFOLD_CACHE/bin/runc-without-cap-sys-resource" --default-runtime limited)
  fi
  say "starting dockerd (2 s), log in $REFOLD_CACHE/log/dockerd.log"
  # Detached, so that it outlives this shell; without the lock of up.sh (descriptor 9).
  setsid nohup dockerd "${options[@]}" >"$REFOLD_CACHE/log/dockerd.log" 2>&1 </dev/null 9>&- &
fi

for _ in {1..120}; do
  docker info >/dev/null 2>&1 && exit 0
  sleep 0.5
done
tail -n 20 "$REFOLD_CACHE/log/dockerd.log" >&2 || true
die "dockerd didn't answer within 60 s"
