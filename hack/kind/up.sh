#!/usr/bin/env bash
# The cluster, from whatever this machine has: engine, tools, node image, then a kind cluster named refold (kubectl context
# kind-refold). Does nothing if it is up and healthy; replaces it if it isn't (its engine was restarted, for one).
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

# One at a time on a machine.
exec 9>"$REFOLD_CACHE/up.lock"
flock 9

healthy() {
  [ "$(docker container inspect -f '{{.State.Running}}' "$NODE" 2>/dev/null)" = true ] &&
    kubectl --context "$CONTEXT" --request-timeout=5s get --raw /readyz >/dev/null 2>&1 &&
    kubectl --context "$CONTEXT" --request-timeout=5s wait --for=condition=Ready node --all --timeout=10s >/dev/null 2>&1
}

"$HERE/engine.sh"
"$HERE/tools.sh"
if healthy; then
  say "cluster $CLUSTER is up (context $CONTEXT)"
  exit 0
fi

node=$("$HERE/node-image.sh")
config=$HERE/kind.yaml
if [ "$node" != "$KIND_NODE_IMAGE" ]; then
  config=$REFOLD_CACHE/kind.yaml
  cat "$HERE/kind.yaml" "$HERE/kind-built-node.yaml" >"$config"
fi
if docker container inspect "$NODE" >/dev/null 2>&1; then
  say "cluster $CLUSTER doesn't answer: replacing it"
  kind delete cluster --quiet --name "$CLUSTER"
fi
say "creating cluster $CLUSTER of $node (25 s)"
kind create cluster --quiet --name "$CLUSTER" --image "$node" --config "$config" --wait 180s >&2
kubectl --context "$CONTEXT" -n kube-system rollout status deployment/coredns --timeout=120s >/dev/null
say "cluster $CLUSTER is up (context $CONTEXT)"
