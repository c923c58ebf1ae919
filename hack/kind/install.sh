#!/usr/bin/env bash
# Installs (or upgrades) the chart in the kind cluster, namespace refold-system, with the images that images.sh built and
# embedded PostgreSQL, Kafka and Redis, waits until it runs (60 s the first time), and makes a caller for demo and tests. Arguments
# go to helm.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

images=$("$HERE/images.sh")
tag() { sed -n "s|^refold/$1:||p" <<<"$images"; }

kubectl --context "$CONTEXT" create namespace refold-system --dry-run=client -o yaml |
  kubectl --context "$CONTEXT" apply -f - >/dev/null
kubectl --context "$CONTEXT" label namespace refold-system --overwrite pod-security.kubernetes.io/enforce=restricted >/dev/null
say "installing the chart into refold-system (60 s the first time)"
helm --kube-context "$CONTEXT" upgrade --install refold "$ROOT/charts/refold" -n refold-system \
  -f "$HERE/values.yaml" --set "image.tag=$(tag refold)" \
  --set "embedded.postgres.image=refold/postgres:$(tag postgres)" --set "embedded.kafka.image=refold/kafka:$(tag kafka)" \
  --set "embedded.redis.image=refold/redis:$(tag redis)" \
  --wait --timeout 5m "$@" >/dev/null
kubectl --context "$CONTEXT" apply -f "$HERE/caller.yaml" >/dev/null
say "Refold runs: event store on 127.0.0.1:30080, try \`kubectl --context $CONTEXT get evs,proj -A\`"
