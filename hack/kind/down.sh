#!/usr/bin/env bash
# Deletes the cluster. Images, tools and caches stay, and so does the engine.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

if docker container inspect "$NODE" >/dev/null 2>&1; then
  say "deleting cluster $CLUSTER"
  kind delete cluster --quiet --name "$CLUSTER"
fi
