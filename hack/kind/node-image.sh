#!/usr/bin/env bash
# The image of the cluster's node: upstream's where a registry is in reach, else built from Go modules and Debian's
# packages (no systemd: node/entrypoint starts containerd and kubelet). Prints its name.
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

if docker image inspect "$KIND_NODE_IMAGE" >/dev/null 2>&1; then
  echo "$KIND_NODE_IMAGE"
  exit 0
fi
built=refold/node:v$KUBERNETES-$(cd "$HERE" && content_key node build/{kubernetes,etcd,coredns,pause})
if docker image inspect "$built" >/dev/null 2>&1; then
  echo "$built"
  exit 0
fi
if registry_in_reach; then
  say "pulling $KIND_NODE_IMAGE"
  if docker pull -q "$KIND_NODE_IMAGE" >/dev/null; then
    echo "$KIND_NODE_IMAGE"
    exit 0
  fi
  say "the pull failed"
fi

"$HERE/base-image.sh"
kubernetes=$("$HERE/build/build.sh" kubernetes "building Kubernetes $KUBERNETES from its Go modules (5 to 7 min once)" \
  k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kube-proxy,kubelet,kubeadm,kubectl})
etcd=$("$HERE/build/build.sh" etcd "building etcd $ETCD from its Go modules (30 s once)" .)
coredns=$("$HERE/build/build.sh" coredns "building CoreDNS $COREDNS from its Go modules (60 s once)" .)
pause=$("$HERE/build/build.sh" pause "building the pause command (1 s once)" .)

say "building the node image $built (40 s once)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# static BINARY IMAGE: an image of one static binary, under the name by which kubeadm asks for it
static() {
  local context=$work/static name
  name=$(basename "$1")
  rm -rf "$context"
  mkdir "$context"
  ln "$1" "$context/" 2>/dev/null || cp "$1" "$context/"
  printf 'FROM scratch\nCOPY %s /usr/local/bin/\nENV PATH=/usr/local/bin\nENTRYPOINT ["/usr/local/bin/%s"]\n' "$name" "$name" >"$context/Dockerfile"
  docker_build -t "$2" "$context"
  images+=("$2")
}
images=()
for command in kube-apiserver kube-controller-manager kube-scheduler; do
  static "$kubernetes/$command" "registry.k8s.io/$command:v$KUBERNETES"
done
static "$etcd/etcd" "$ETCD_IMAGE"
static "$coredns/coredns" "$COREDNS_IMAGE"
static "$pause/pause" "$PAUSE_IMAGE"

mkdir "$work/kube-proxy" "$work/node" "$work/node/images"
cp "$kubernetes/kube-proxy" "$HERE/node/kube-proxy.Dockerfile" "$work/kube-proxy/"
docker_build -t "registry.k8s.io/kube-proxy:v$KUBERNETES" -f "$work/kube-proxy/kube-proxy.Dockerfile" "$work/kube-proxy"
images+=("registry.k8s.io/kube-proxy:v$KUBERNETES")

docker save -o "$work/node/images/control-plane.tar" "${images[@]}"
cp "$kubernetes"/{kubeadm,kubelet,kubectl} "$HERE"/node/{entrypoint,config.toml,10-bridge.conflist} "$work/node/"
echo "v$KUBERNETES" >"$work/node/version"
docker_build -t "$built" -f "$HERE/node/Dockerfile" "$work/node"
docker image rm "${images[@]}" >/dev/null # they are in the node's image
echo "$built"
