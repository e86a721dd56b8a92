"""A real cluster on this machine: API server, controllers, scheduler, and nodes with containerd, kubelet and kube-proxy.

The control plane has a network namespace of its own, and so has each node; a bridge in the first one is what connects them. Nodes are process
namespaces, too, so that all of a node ends with its first process. Needs root and control groups of version 1, which this version of
kubelet expects."""

import base64
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tarfile
import time

HERE = pathlib.Path(__file__).resolve().parent
TOOLS = "localhost/tools:1"
POD_NETWORK = "10.244.0.0/16"
SERVICES = "10.96.0.0/16"
API = "https://192.0.2.1:6443"


def run(*command, **options):
    """Runs a command that has to succeed; gives its output."""
    done = subprocess.run([str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}: code {done.returncode}\n{done.stdout}")
    return done.stdout


def wait(what, condition, limit=120):
    """Waits until the condition holds; gives its value. What it raises is the reason if it never does."""
    end, reason = time.monotonic() + limit, None
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except RuntimeError as error:
            reason = error
        time.sleep(0.2)
    raise RuntimeError(f"not within {limit} s: {what}\n{reason or ''}")


def tools_image(path):
    """An archive of an image that has busybox alone, and sleeps."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(shutil.which("busybox"), "bin/busybox")
        for name in ("sh", "ping", "httpd", "sleep", "nc", "ip", "cat", "mkdir", "timeout"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    config = json.dumps({
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64", "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()]},
    }).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [TOOLS], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in (("layer.tar", layer.getvalue()), ("config.json", config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


class Program:
    """A program in the background, with its output in a file."""

    def __init__(self, command, log, **options):
        self.log = pathlib.Path(log)
        with self.log.open("a") as output:
            self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Cluster:
    """The control plane, and nodes that have the image."""

    def __init__(self, programs, image, directory):
        self.programs, self.directory = pathlib.Path(programs), pathlib.Path(directory)
        self.prefix = f"k8s-{os.getpid()}-"
        self.running, self.nodes = {}, {}
        self.images = self.directory / "images"
        self.image = image

    def start(self, names):
        """Starts it; what is there after an error is ended by `close`."""
        self.images.mkdir(parents=True)
        shutil.copy(self.image, self.images / "flannel.tar")
        tools_image(self.images / "tools.tar")
        self._network(self.prefix + "hub", "192.0.2.1")
        self._certificates()
        self._kubeconfig(self.directory / "admin.kubeconfig", "admin-token")
        self.start_etcd()
        self.start_api()
        self._controllers()
        self._for_nodes()
        for number, name in enumerate(names, 11):
            self.start_node(name, f"192.0.2.{number}")

    # ---- the network

    def _network(self, namespace, address):
        """A namespace with `eth0` on the bridge of the first one, which is the router of the others."""
        run("ip", "netns", "add", namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        hub = self.prefix + "hub"
        if namespace == hub:
            run("ip", "-n", hub, "link", "add", "eth0", "type", "bridge")
        else:
            port = f"v{address.rsplit('.', 1)[1]}"
            run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            run("ip", "-n", hub, "link", "set", port, "master", "eth0", "up")
        run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        if namespace != hub:
            run("ip", "-n", namespace, "route", "add", "default", "via", "192.0.2.1")

    # ---- the control plane

    def _certificates(self):
        at = self.directory
        run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=test", "-keyout", at / "ca.key", "-out", at / "ca.crt")
        run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kube-apiserver", "-keyout", at / "api.key", "-out", at / "api.csr")
        (at / "api.ext").write_text("subjectAltName=IP:192.0.2.1,IP:10.96.0.1,IP:127.0.0.1\n")
        run("openssl", "x509", "-req", "-in", at / "api.csr", "-CA", at / "ca.crt", "-CAkey", at / "ca.key", "-CAcreateserial", "-days", "30",
            "-extfile", at / "api.ext", "-out", at / "api.crt")
        run("openssl", "genrsa", "-out", at / "accounts.key", "2048")
        (at / "tokens").write_text('admin-token,admin,admin,"system:masters"\n')

    def _kubeconfig(self, path, token):
        authority = base64.b64encode((self.directory / "ca.crt").read_bytes()).decode()
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": API, "certificate-authority-data": authority}}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        }))

    def _start(self, name, command, namespace="hub", **options):
        inside = ["nsenter", f"--net=/run/netns/{self.prefix}{namespace}", *command]
        self.running[name] = Program(inside, self.directory / f"{name}.log", **options)

    def start_etcd(self):
        self._start("etcd", ["etcd", f"--data-dir={self.directory}/etcd", "--listen-client-urls=http://127.0.0.1:2379",
                             "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
                             "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380",
                             "--unsafe-no-fsync"])

    def start_api(self):
        """Starts the API server, and waits until it answers."""
        at = self.directory
        self._start("kube-apiserver", [
            self.programs / "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--advertise-address=192.0.2.1", "--bind-address=0.0.0.0",
            "--secure-port=6443", f"--tls-cert-file={at}/api.crt", f"--tls-private-key-file={at}/api.key", f"--service-cluster-ip-range={SERVICES}",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={at}/accounts.key",
            f"--service-account-signing-key-file={at}/accounts.key", "--authorization-mode=Node,RBAC", f"--token-auth-file={at}/tokens",
            f"--client-ca-file={at}/ca.crt", "--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP", "--v=1"])
        wait("the API server", lambda: self.kubectl("get", "--raw", "/readyz"))

    def stop(self, name, number=signal.SIGTERM):
        self.running.pop(name).stop(number)

    def _controllers(self):
        at, config = self.directory, f"--kubeconfig={self.directory}/admin.kubeconfig"
        self._start("kube-controller-manager", [
            self.programs / "kube-controller-manager", config, f"--cluster-cidr={POD_NETWORK}", "--allocate-node-cidrs=true",
            f"--service-account-private-key-file={at}/accounts.key", f"--root-ca-file={at}/ca.crt", "--node-monitor-grace-period=1h",
            "--leader-elect=false"])
        self._start("kube-scheduler", [self.programs / "kube-scheduler", config, "--leader-elect=false"])

    def kubectl(self, *arguments, **options):
        command = ["nsenter", f"--net=/run/netns/{self.prefix}hub", self.programs / "kubectl", f"--kubeconfig={self.directory}/admin.kubeconfig"]
        return run(*command, *arguments, **options)

    def get(self, *arguments):
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects):
        return self.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    # ---- nodes

    def _for_nodes(self):
        (self.directory / "containerd.toml").write_text(f"""version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{TOOLS}"
# Not every machine lets root lower the score.
restrict_oom_score_adj = true
""")
        (self.directory / "kube-proxy.yaml").write_text(json.dumps({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "iptables", "clusterCIDR": POD_NETWORK,
            "clientConnection": {"kubeconfig": f"{self.directory}/admin.kubeconfig"},
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}}))

    def start_node(self, name, address):
        """Starts a node, with what it kept if it was there before."""
        namespace, at = self.prefix + name, self.directory / name
        if name not in self.nodes:
            at.mkdir()
            self._network(namespace, address)
            (at / "address").write_text(address)
            self._kubeconfig(at / "kubelet.kubeconfig", "admin-token")
            (at / "kubelet.yaml").write_text(json.dumps({
                "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "failSwapOn": False, "cgroupDriver": "cgroupfs",
                "cgroupsPerQOS": False, "enforceNodeAllocatable": [], "authentication": {"anonymous": {"enabled": True},
                "webhook": {"enabled": False}}, "authorization": {"mode": "AlwaysAllow"}, "evictionHard": {"nodefs.available": "0%"},
                "imageGCHighThresholdPercent": 100, "localStorageCapacityIsolation": False, "resolvConf": "", "syncFrequency": "5s",
                "nodeStatusReportFrequency": "10s", "nodeStatusUpdateFrequency": "5s", "featureGates": {"LocalStorageCapacityIsolation": False}}))
        path = f"{self.programs}:{os.environ['PATH']}"
        self._start(name, ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", HERE / "node", at, self.directory],
                    namespace=name, env={**os.environ, "PATH": path})
        self.nodes[name] = address
        wait(f"node {name}", lambda: self.kubectl("get", "node", name))

    def inside(self, name, *command, **options):
        """Runs a command in all namespaces of a node."""
        children = pathlib.Path(f"/proc/{self.running[name].process.pid}/task/{self.running[name].process.pid}/children").read_text().split()
        return run("nsenter", "--all", f"--target={children[0]}", *command, **options)

    def logs(self, name):
        """The end of what the containers of flanneld on a node said."""
        return subprocess.run(f"tail -n 30 {self.directory}/{name}/var/log/pods/kube-flannel_*/kube-flannel/*.log", shell=True, text=True,
                              capture_output=True, check=False).stdout

    def ready(self, name):
        conditions = self.get("node", name)["status"]["conditions"]
        return next(each["status"] == "True" for each in conditions if each["type"] == "Ready")

    def close(self):
        """Ends everything, the last first."""
        for program in reversed(list(self.running.values())):
            program.stop(signal.SIGKILL if program is not self.running.get("etcd") else signal.SIGTERM)
        for name in [*self.nodes, "hub"]:
            subprocess.run(["ip", "netns", "del", self.prefix + name], check=False)
        # Containers are gone, and their groups are empty.
        for group in pathlib.Path("/sys/fs/cgroup").glob("*/k8s.io"):
            for directory, _, _ in os.walk(group, topdown=False):
                try:
                    os.rmdir(directory)
                except OSError:
                    print(f"  {directory} is in use and stays", flush=True)
