//go:build tools

// Package tools pins kind, which tools.sh builds.
package tools

import _ "sigs.k8s.io/kind"
