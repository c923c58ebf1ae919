# shellcheck shell=bash
# Source this to use the kind flow's tools (kind, kubectl, helm) and caches. It changes nothing on the machine.
#
#   REFOLD_CACHE   everything that the flow builds, outside the repository
#   PATH           the tools that were built come before the machine's own

export REFOLD_CACHE="${REFOLD_CACHE:-$HOME/.cache/refold}"
case ":$PATH:" in
  *":$REFOLD_CACHE/bin:"*) ;;
  *) export PATH="$REFOLD_CACHE/bin:$PATH" ;;
esac
