#!/usr/bin/env bash
# Builds Refold's images (refold/refold:dev, refold/postgres:dev, refold/kafka:dev, refold/redis:dev), each unless its sources are
# unchanged, and loads those into the cluster that it doesn't hold yet. With arguments (refold, postgres, kafka, redis): only these.
# Prints a line per image: its name in the cluster, refold/NAME:dev-ID, which changes with its contents.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

label=dev.refold.sources
cd "$ROOT"
"$HERE/base-image.sh"
base=$(docker image inspect -f '{{.Id}}' "$BASE_IMAGE")

# build NAME CONTEXT TIME SOURCE...: builds refold/NAME:dev if base or sources differ from those that it was built from
build() {
  local name=$1 context=$2 time=$3 key
  shift 3
  key=$base-$(content_key "images/$name" "$@")
  [ "$(docker image inspect -f "{{index .Config.Labels \"$label\"}}" "refold/$name:dev" 2>/dev/null || true)" = "$key" ] && return
  say "building refold/$name:dev ($time)"
  docker_build -t "refold/$name:dev" --label "$label=$key" -f "images/$name/Dockerfile" "$context"
}

# load NAME: under a tag that names the contents, so that whatever runs an older image is replaced by an upgrade
load() {
  local id image archive loaded
  id=$(docker image inspect -f '{{.Id}}' "refold/$1:dev")
  image=refold/$1:dev-${id:7:12}
  loaded=$(docker exec "$NODE" ctr -n k8s.io images ls -q)
  if ! grep -qxF "docker.io/$image" <<<"$loaded"; then
    say "loading $image into the cluster (3 s)"
    archive=$(mktemp "$REFOLD_CACHE/$1.XXXXXX.tar")
    docker tag "refold/$1:dev" "$image"
    docker save -o "$archive" "$image"
    kind load image-archive --name "$CLUSTER" "$archive" || { rm -f "$archive"; die "loading $image failed"; }
    docker rmi "$image" >/dev/null
    rm -f "$archive"
  fi
  echo "$image"
}

[ $# -gt 0 ] || set -- refold postgres kafka redis
for image in "$@"; do
  case $image in
    refold) build refold . "60 s, 10 s after a change of code" .dockerignore pyproject.toml uv.lock README.md services operator ;;
    postgres) build postgres images/postgres "30 s once" ;;
    kafka) build kafka images/kafka "60 s once" ;;
    redis) build redis images/redis "15 s once" ;;
    *) die "no image named $image: refold, postgres, kafka, redis" ;;
  esac
  load "$image"
done
