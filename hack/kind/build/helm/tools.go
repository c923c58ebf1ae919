//go:build tools

// Package tools pins Helm, which tools.sh builds.
package tools

import _ "helm.sh/helm/v3/cmd/helm"
