# shellcheck shell=bash disable=SC2034  # sourced; the variables are used by the scripts that source it
# The versions of all that the kind flow installs or builds. After a change here run `hack/kind/build/lock.sh`,
# which writes the go.mod and go.sum files anew.

# What is built where no container registry is in reach.
GO=1.26.0                    # the least Go that the modules below build with
KUBERNETES=1.34.4
ETCD=3.6.16
COREDNS=1.12.1
# The names under which this kubeadm asks for the images of its control plane (`kubeadm config images list`).
ETCD_IMAGE=registry.k8s.io/etcd:3.6.5-0
COREDNS_IMAGE=registry.k8s.io/coredns/coredns:v1.12.1
PAUSE_IMAGE=registry.k8s.io/pause:3.10.1

# Where a registry is in reach: the node image that belongs to this release of kind.
KIND_NODE_IMAGE=kindest/node:v1.34.11@sha256:44e222ee2132dab25ff87301682f89eb82c7880ea3a1bf543bfe9708fd08d67d

# Tools, built if the machine has none, or an older one than the second line of each pair.
KIND=0.33.0
KIND_LEAST=0.33.0            # a node image belongs to one release of kind
HELM=3.22.0
HELM_LEAST=3.14.0
KUBECTL_LEAST=1.33.0         # kubectl may differ from the API server by one minor version

# What scales on the cluster where autoscalers.sh was asked for it.
METRICS_SERVER=0.9.0
KEDA=2.21.0

BASE_IMAGE=debian:bookworm-slim
