#!/usr/bin/env bash
# Prints the path of a Go command that is recent enough: the machine's, or the one fetched before, or (Debian, root) the
# toolchain that the Go module proxy serves, fetched and verified by Debian's older Go.
set -euo pipefail
# shellcheck source=../common.sh
. "$(dirname "$0")/../common.sh"

go_version() { GOTOOLCHAIN=local "$1" version 2>/dev/null | sed -n 's/^go version go\([0-9.]*\).*/\1/p'; }

fetched=$REFOLD_CACHE/go-$GO/bin/go
for go in "$(command -v go || true)" "$fetched"; do
  if [ -x "$go" ] && at_least "$(go_version "$go")" "$GO"; then
    echo "$go"
    exit 0
  fi
done

if ! command -v go >/dev/null; then
  is_debian_root || die "Go $GO or later is missing. It is installed for you only on Debian, as root."
  say "installing Debian's golang-go, to fetch Go $GO with (20 s once)"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends golang-go ca-certificates >/dev/null
fi
say "fetching Go $GO (20 s once)"
# A toolchain is a module; a Go from before 1.21 can download it, too.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
printf 'module fetch\n' >go.mod
toolchain=v0.0.1-go$GO.$(go env GOOS)-$(go env GOARCH)
folder=$(go mod download -json "golang.org/toolchain@$toolchain" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
[ -n "$folder" ] || die "Go $GO couldn't be fetched from the Go module proxy"
rm -rf "$REFOLD_CACHE/go-$GO"
cp -r --no-preserve=mode "$folder" "$REFOLD_CACHE/go-$GO"
chmod -R +x "$REFOLD_CACHE/go-$GO/bin" "$REFOLD_CACHE/go-$GO/pkg/tool"
echo "$fetched"
