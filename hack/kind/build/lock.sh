#!/usr/bin/env bash
# Writes the go.mod and go.sum files of this directory anew from versions.sh. For maintainers, after a change of version.
set -euo pipefail
# shellcheck source=../common.sh
. "$(dirname "$0")/../common.sh"
go=$("$HERE/build/go.sh")

begin() { # MODULE: starts its go.mod
  cd "$HERE/build/$1"
  rm -f go.mod go.sum
  printf 'module refold.dev/hack/kind/build/%s\n\ngo %s\n' "$1" "$GO" >go.mod
}

begin kubernetes
"$go" mod edit -require "k8s.io/kubernetes@v$KUBERNETES" -godebug default=go1.24 # as Kubernetes' own go.mod says
# Kubernetes replaces its staging repositories by folders; where it is not the main module they need versions.
upstream=$("$go" mod download -json "k8s.io/kubernetes@v$KUBERNETES" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
grep -oE 'k8s.io/[a-z0-9-]+ => ./staging' "$upstream" | cut -d' ' -f1 | while read -r module; do
  "$go" mod edit -replace "$module=$module@v0.${KUBERNETES#1.}"
done
"$go" mod tidy

begin etcd
"$go" get "go.etcd.io/etcd/server/v3@v$ETCD"
"$go" mod tidy

begin coredns
"$go" get "github.com/coredns/coredns@v$COREDNS"
"$go" mod tidy

begin kind
"$go" get "sigs.k8s.io/kind@v$KIND"
"$go" mod tidy

begin helm
"$go" get "helm.sh/helm/v3/cmd/helm@v$HELM"
"$go" mod tidy

begin metrics-server
"$go" get "sigs.k8s.io/metrics-server/cmd/metrics-server@v$METRICS_SERVER"
"$go" mod tidy

begin keda
"$go" get "github.com/kedacore/keda/v2@v$KEDA"
"$go" mod tidy

begin pause
"$go" mod tidy
