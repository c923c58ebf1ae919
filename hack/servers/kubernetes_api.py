"""A private Kubernetes API server on 127.0.0.1 (kube-apiserver and etcd, no nodes and no controllers).

The programs are those that hack/kind builds where there is no container registry. Nothing runs pods here: a test says
how far a Deployment is, so that it decides what the operator sees and when.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hack.servers.process import Process, accepts, cache, free_port

TOKEN = "local"  # of a throw-away API server on 127.0.0.1


def programs() -> tuple[Path, Path] | None:
    """Return etcd and kube-apiserver, where they were built."""
    patterns = ("build/etcd-*/etcd", "build/kubernetes-*/kube-apiserver")
    etcd, server = (next(iter(sorted(cache().glob(pattern))), None) for pattern in patterns)
    kubectl = shutil.which("kubectl", path=_path())
    return (etcd, server) if etcd and server and kubectl else None


def _path() -> str:
    return f"{cache()}/bin:{os.environ['PATH']}"


class ApiServer:
    """An API server with data of its own; `kubectl` works with it as administrator."""

    def __init__(self) -> None:
        """Choose folder and ports."""
        found = programs()
        assert found is not None, "ask programs() first"
        self._folder = Path(tempfile.mkdtemp(prefix="refold-kubernetes-"))
        self.port, client, peer = free_port(), free_port(), free_port()
        (self._folder / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        self.key = key = self._folder / "sa.key"  # signs the tokens of ServiceAccounts
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        self.authority = self._folder / "certs" / "apiserver.crt"
        self.kubeconfig = self._folder / "kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [
                        {
                            "name": "private",
                            "cluster": {
                                "server": f"https://127.0.0.1:{self.port}",
                                "certificate-authority": str(self.authority),
                            },
                        }
                    ],
                    "users": [{"name": "admin", "user": {"token": TOKEN}}],
                    "contexts": [{"name": "private", "context": {"cluster": "private", "user": "admin"}}],
                    "current-context": "private",
                }
            )
        )
        etcd, server = found
        self._etcd = Process(
            [
                str(etcd), "--data-dir", str(self._folder / "etcd"), "--unsafe-no-fsync",
                "--listen-client-urls", f"http://127.0.0.1:{client}",
                "--advertise-client-urls", f"http://127.0.0.1:{client}",
                "--listen-peer-urls", f"http://127.0.0.1:{peer}",
                "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                "--initial-cluster", f"default=http://127.0.0.1:{peer}",
            ],
            self._folder / "etcd.log",
        )  # fmt: skip
        self._server = Process(
            [
                str(server), f"--etcd-servers=http://127.0.0.1:{client}", f"--cert-dir={self._folder / 'certs'}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
                f"--token-auth-file={self._folder / 'tokens.csv'}", "--authorization-mode=RBAC",
                "--disable-admission-plugins=ServiceAccount", "--service-cluster-ip-range=10.0.0.0/24",
                f"--secure-port={self.port}", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
            ],
            self._folder / "kube-apiserver.log",
        )  # fmt: skip
        self._client_port = client

    def start(self) -> None:
        """Start and wait until requests are answered."""
        self._etcd.start(lambda: accepts(self._client_port))
        self.start_server()

    def start_server(self) -> None:
        """Start the API server alone, after `stop_server`."""
        self._server.start(
            lambda: (
                self.kubectl("get", "--raw", "/readyz", check=False) == "ok"
                and "services" in self.kubectl("api-resources", "-o", "name", check=False)
            )
        )

    def stop_server(self) -> None:
        """Stop the API server; its data stays."""
        self._server.stop()

    def kill_server(self) -> None:
        """Kill with -9 the API server; its data stays."""
        self._server.kill()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the API server's process with SIGSTOP: it accepts requests and answers none."""
        self._server.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self._server.send(signal.SIGCONT)

    def remove(self) -> None:
        """Kill both and delete their data."""
        self._server.kill()
        self._etcd.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl and return what it printed; on a failure with `check`, raise with what it said."""
        done = subprocess.run(
            ["kubectl", f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin, text=True, capture_output=True, check=False, env={"PATH": _path(), "HOME": str(self._folder)},
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip()

    def get(self, *arguments: str) -> dict[str, Any]:
        """Return `kubectl get … -o json`."""
        answer: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return answer

    def apply(self, *manifests: dict[str, Any]) -> str:
        """Apply objects."""
        return self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))
