#!/usr/bin/env bash
# kind, kubectl and Helm: the machine's own where they are recent enough, else built from their Go modules and linked into
# the cache's bin folder.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

# tool NAME LEAST HAVE MODULE PACKAGE TIME: builds a tool unless the version on the PATH, HAVE, is LEAST or later
tool() {
  at_least "$3" "$2" && return
  local message="building $1 from its Go modules, since the machine has ${3:-none} ($6)"
  ln -sf "$("$HERE/build/build.sh" "$4" "$message" "$5")/$1" "$REFOLD_CACHE/bin/$1"
}

tool kind "$KIND_LEAST" "$(kind version -q 2>/dev/null || true)" kind sigs.k8s.io/kind "45 s once"
tool helm "$HELM_LEAST" "$(helm version --template '{{.Version}}' 2>/dev/null | sed -n 's/^v\([0-9.]*\).*/\1/p')" helm helm.sh/helm/v3/cmd/helm "70 s once"
tool kubectl "$KUBECTL_LEAST" "$(kubectl version --client 2>/dev/null | sed -n 's/^Client Version: v\([0-9.]*\).*/\1/p')" kubernetes k8s.io/kubernetes/cmd/kubectl "2 min once"
