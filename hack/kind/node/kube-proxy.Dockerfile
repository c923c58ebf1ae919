# kube-proxy with the programs that it calls.
FROM debian:bookworm-slim
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iptables nftables conntrack kmod >/dev/null \
    && rm -rf /var/lib/apt/lists/*
COPY kube-proxy /usr/local/bin/
