#!/usr/bin/env bash
# Builds Refold's images (refold/refold:dev, refold/postgres:dev, refold/kafka:dev), each unless its sources are unchanged,
# and loads those into the cluster that it doesn't hold yet. With arguments (refold, postgres, kafka): only these.
# Prints a line per image: its name and its id, which changes with its contents.
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

# load NAME: the id of the loaded image stands as a label on the node's, and goes when that goes
load() {
  local id reference=docker.io/refold/$1:dev archive
  id=$(docker image inspect -f '{{.Id}}' "refold/$1:dev")
  if ! docker exec "$NODE" ctr -n k8s.io images ls "name==$reference" | grep -qF "$label=$id"; then
    say "loading refold/$1:dev into the cluster (3 s)"
    archive=$(mktemp "$REFOLD_CACHE/$1.XXXXXX.tar")
    docker save -o "$archive" "refold/$1:dev"
    kind load image-archive --name "$CLUSTER" "$archive" || { rm -f "$archive"; die "loading refold/$1:dev failed"; }
    rm -f "$archive"
    docker exec "$NODE" ctr -n k8s.io images label "$reference" "$label=$id" >/dev/null
  fi
  echo "refold/$1:dev $id"
}

[ $# -gt 0 ] || set -- refold postgres kafka
for image in "$@"; do
  case $image in
    refold) build refold . "60 s, 10 s after a change of code" .dockerignore pyproject.toml uv.lock README.md services operator ;;
    postgres) build postgres images/postgres "30 s once" ;;
    kafka) build kafka images/kafka "60 s once" ;;
    *) die "no image named $image: refold, postgres, kafka" ;;
  esac
  load "$image"
done
