#!/usr/bin/env bash
# build.sh MODULE MESSAGE PACKAGE...: builds Go commands at the versions that build/MODULE/go.mod pins into a folder of the
# cache named after the module's contents, if they aren't there; says MESSAGE before it does. Prints that folder. A command
# is named as its package's folder.
set -euo pipefail
# shellcheck source=../common.sh
. "$(dirname "$0")/../common.sh"

module=$1
message=$2
shift 2
cd "$HERE/build/$module"
out=$REFOLD_CACHE/build/$module-$(content_key .)
missing=()
for package in "$@"; do
  name=$(basename "$package")
  [ "$package" = . ] && name=$module
  [ -x "$out/$name" ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  say "$message"
  go=$("$HERE/build/go.sh")
  flags=(-s -w)
  if [ "$module" = kubernetes ]; then
    grep -qF "k8s.io/kubernetes v$KUBERNETES" go.mod || die "build/kubernetes/go.mod is not at $KUBERNETES: run hack/kind/build/lock.sh"
    version=k8s.io/component-base/version
    flags+=(-X "$version.gitVersion=v$KUBERNETES" -X "$version.gitMajor=1" -X "$version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES")"
      -X "$version.gitTreeState=clean" -X "$version.gitCommit=none" -X "$version.buildDate=1970-01-01T00:00:00Z")
  fi
  # Into another folder first, so that what is in `out` is whole.
  mkdir -p "$out"
  tmp=$(mktemp -d "$REFOLD_CACHE/build/tmp.XXXXXX")
  trap 'rm -rf "$tmp"' EXIT
  CGO_ENABLED=0 "$go" build -mod=readonly -buildvcs=false -trimpath -ldflags "${flags[*]}" -o "$tmp/" "${missing[@]}" \
    >"$REFOLD_CACHE/log/go-$module.log" 2>&1 || { tail -n 20 "$REFOLD_CACHE/log/go-$module.log" >&2; die "building $module failed"; }
  mv "$tmp"/* "$out/"
fi
echo "$out"
