#!/usr/bin/env bash
# Installs metrics-server and KEDA (without its webhooks) in the kind cluster and waits until they run: their published images
# where a registry is in reach, else images built from their Go modules. Their manifests come from the modules, too. Changes
# nothing of Refold; what it installs goes with the cluster.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

go=$("$HERE/build/go.sh")
work=$(mktemp -d "$REFOLD_CACHE/autoscalers.XXXXXX")
trap 'rm -rf "$work"' EXIT

# sources MODULE PATH: the folder of a Go module at the version that build/MODULE/go.mod pins
sources() { (cd "$HERE/build/$1" && "$go" mod download "$2" && "$go" list -mod=readonly -m -f '{{.Dir}}' "$2"); }

# built NAME MODULE PROGRAM USER MESSAGE PACKAGE: an image refold-kind/NAME that holds one program of a module, in the cluster.
# Prints its name.
built() {
  local folder image archive
  folder=$("$HERE/build/build.sh" "$2" "$5" "${@:6}")
  image=refold-kind/$1:$(content_key "$HERE/build/$2")
  if ! docker exec "$NODE" ctr -n k8s.io images ls -q | grep -qxF "docker.io/$image"; then
    say "making $image and loading it into the cluster (20 s)"
    rm -rf "$work/context"
    mkdir "$work/context"
    cp "$folder/$(basename "$6")" "$work/context/$3"
    printf 'FROM %s\nCOPY %s /%s\nUSER %s\nENTRYPOINT ["/%s"]\n' "$BASE_IMAGE" "$3" "$3" "$4" "$3" >"$work/context/Dockerfile"
    docker_build -t "$image" "$work/context"
    archive=$work/image.tar
    docker save -o "$archive" "$image"
    kind load image-archive --name "$CLUSTER" "$archive" >&2 || die "loading $image failed"
    rm -f "$archive"
    docker rmi "$image" >/dev/null
  fi
  echo "$image"
}

if registry_in_reach; then
  server=registry.k8s.io/metrics-server/metrics-server:v$METRICS_SERVER
  operator=ghcr.io/kedacore/keda:$KEDA
  adapter=ghcr.io/kedacore/keda-metrics-apiserver:$KEDA
else
  "$HERE/base-image.sh"
  keda=github.com/kedacore/keda/v2/cmd
  message="building KEDA from its Go modules (30 min once)"
  server=$(built metrics-server metrics-server metrics-server 1000 "building metrics-server from its Go modules (5 min once)" \
    sigs.k8s.io/metrics-server/cmd/metrics-server)
  operator=$(built keda keda keda 1000 "$message" "$keda/operator" "$keda/adapter")
  adapter=$(built keda-adapter keda keda-adapter 1000 "$message" "$keda/adapter" "$keda/operator")
fi

cp -r --no-preserve=mode "$(sources metrics-server sigs.k8s.io/metrics-server)/manifests/base" "$work/metrics-server"
cp -r --no-preserve=mode "$(sources keda github.com/kedacore/keda/v2)/config" "$work/keda"
# In kind the kubelet's certificate is signed by nobody; and what they ask for would leave the tests no room on a small node.
cat >"$work/kustomization.yaml" <<YAML
resources: [metrics-server, keda/minimal]
images:
  - {name: gcr.io/k8s-staging-metrics-server/metrics-server, newName: "${server%:*}", newTag: "${server##*:}"}
  - {name: ghcr.io/kedacore/keda, newName: "${operator%:*}", newTag: "${operator##*:}"}
  - {name: ghcr.io/kedacore/keda-metrics-apiserver, newName: "${adapter%:*}", newTag: "${adapter##*:}"}
patches:
  - target: {kind: Deployment, name: metrics-server}
    patch: |
      - {op: add, path: /spec/template/spec/containers/0/args/-, value: --kubelet-insecure-tls}
      - {op: remove, path: /spec/template/spec/containers/0/resources}
  - target: {kind: Deployment, namespace: keda}
    patch: |
      - {op: replace, path: /spec/template/spec/containers/0/imagePullPolicy, value: IfNotPresent}
      - {op: remove, path: /spec/template/spec/containers/0/resources}
YAML
say "installing metrics-server and KEDA (60 s)"
# On the server's side: KEDA's definitions are larger than the annotation that a client would keep them in.
apply() { kubectl --context "$CONTEXT" apply --server-side --force-conflicts -f "$1" >/dev/null; }
kubectl --context "$CONTEXT" kustomize "$work" >"$work/all.yaml" 2>/dev/null
awk -v RS='---\n' -v ORS='---\n' '/\nkind: APIService\n/' "$work/all.yaml" >"$work/apis.yaml"
awk -v RS='---\n' -v ORS='---\n' '!/\nkind: APIService\n/' "$work/all.yaml" >"$work/others.yaml"
apply "$work/others.yaml"
kubectl --context "$CONTEXT" -n kube-system rollout status deployment/metrics-server --timeout=180s >/dev/null
kubectl --context "$CONTEXT" -n keda rollout status deployment --timeout=180s >/dev/null
# The API server asks them as soon as they are registered and keeps the connection: so only once their Services are routed.
apply "$work/apis.yaml"
kubectl --context "$CONTEXT" wait apiservice v1beta1.metrics.k8s.io v1beta1.external.metrics.k8s.io --for=condition=Available \
  --timeout=120s >/dev/null
say "metrics-server and KEDA run"
