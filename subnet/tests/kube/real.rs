//! A real API server: `kube-apiserver` and `etcd` of the directory that `KUBEBUILDER_ASSETS` names.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ::kube::Config;
use http::Method;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use tempfile::TempDir;

use crate::certificates::Certificates;
use crate::world::World;

/// How long a server may take to start.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Where both programs are.
pub(crate) struct Programs(PathBuf);

impl Programs {
    /// Those in this directory.
    ///
    /// # Errors
    /// A sentence with what is missing and where it comes from.
    pub(crate) fn find(directory: Option<OsString>) -> Result<Self, String> {
        let whence = "a directory with the programs kube-apiserver and etcd: `make test-kube` builds them";
        let Some(directory) = directory.filter(|directory| !directory.is_empty()) else {
            return Err(format!("KUBEBUILDER_ASSETS is not set: it has to name {whence}"));
        };
        let directory = PathBuf::from(directory);
        for program in ["kube-apiserver", "etcd"] {
            if !directory.join(program).is_file() {
                let at = directory.display();
                return Err(format!(
                    "KUBEBUILDER_ASSETS={at}: there is no {program} in it; it has to name {whence}"
                ));
            }
        }
        Ok(Self(directory))
    }

    /// The minor version of Kubernetes 1.
    fn minor(&self) -> u32 {
        let output = Command::new(self.0.join("kube-apiserver")).arg("--version").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let minor = text.split_once("v1.").and_then(|(_, rest)| rest.split('.').next());
        minor
            .and_then(|minor| minor.parse().ok())
            .unwrap_or_else(|| panic!("kube-apiserver --version says {text:?}"))
    }

    /// A program of these, whose output goes to a file of its name.
    fn start(&self, program: &'static str, files: &Path, arguments: &[String]) -> Program {
        let log = files.join(format!("{program}.log"));
        let output = File::create(&log).unwrap();
        let child = Command::new(self.0.join(program))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn();
        let child = child.unwrap_or_else(|error| panic!("{program} can't be started: {error}"));
        Program { program, child, log }
    }
}

/// A running program; it is killed on drop.
struct Program {
    program: &'static str,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// An error with the end of what it said, once it has ended.
    fn ensure_alive(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            ended => Err(format!("{} has ended ({ended:?}):\n{}", self.program, self.said())),
        }
    }

    fn said(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail only when it has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both servers with their files, in the order in which they have to end.
struct Servers {
    api: Program,
    etcd: Program,
    certificates: Certificates,
    files: TempDir,
    port: u16,
}

/// A cluster of its own, with one user who may do all and one who has the rights of the manifest.
///
/// # Errors
/// What does not start, and what it said.
pub(crate) async fn world(programs: &Programs) -> Result<World, String> {
    let mut servers = Servers::start(programs);
    let (admin, flannel) = (servers.config("admin"), servers.kubeconfig("flannel"));
    let probe = World::new(admin.clone(), None, None, Box::new(()));
    let begun = Instant::now();
    loop {
        servers.api.ensure_alive()?;
        servers.etcd.ensure_alive()?;
        if probe.hand.ask(Method::GET, "/readyz", "application/json", None).await.is_ok() {
            break;
        }
        if begun.elapsed() > TIMEOUT {
            return Err(format!("kube-apiserver is not ready after {TIMEOUT:?}:\n{}", servers.api.said()));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // As in kube-flannel.yml.
    let rules = json!([
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
    ]);
    let group = "/apis/rbac.authorization.k8s.io/v1";
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "flannel"}, "rules": rules});
    probe.hand.create(&format!("{group}/clusterroles"), &role).await;
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "flannel"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "flannel"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "flannel"}]});
    probe.hand.create(&format!("{group}/clusterrolebindings"), &binding).await;
    Ok(World::new(admin, Some(flannel), None, Box::new(servers)))
}

impl Servers {
    fn start(programs: &Programs) -> Self {
        let files = tempfile::Builder::new().prefix("flannel-test-api-").tempdir().unwrap();
        let certificates = Certificates::new();
        let (client, peer, port) = (free_port(), free_port(), free_port());
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let at = |name: &str| files.path().join(name).display().to_string();
        let etcd = programs.start(
            "etcd",
            files.path(),
            &[
                format!("--data-dir={}", at("etcd")),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=default={peer}"),
            ],
        );
        fs::write(
            at("tokens"),
            "admin-token,admin,admin,\"system:masters\"\nflannel-token,flannel,flannel\n",
        )
        .unwrap();
        let key = certificates.text("server.key");
        // A node has one subnet before 1.21, unless this is switched on; later versions do not know the switch.
        let dual_stack = (programs.minor() < 21).then(|| "--feature-gates=IPv6DualStack=true".to_owned());
        let api = programs.start(
            "kube-apiserver",
            files.path(),
            &[
                format!("--etcd-servers={client}"),
                "--bind-address=127.0.0.1".into(),
                "--advertise-address=127.0.0.1".into(),
                format!("--secure-port={port}"),
                format!("--tls-cert-file={}", certificates.text("server.crt")),
                format!("--tls-private-key-file={key}"),
                "--service-cluster-ip-range=10.96.0.0/16".into(),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                format!("--service-account-key-file={}", certificates.text("server.pub")),
                format!("--service-account-signing-key-file={key}"),
                "--authorization-mode=RBAC".into(),
                format!("--token-auth-file={}", at("tokens")),
                "--disable-admission-plugins=ServiceAccount".into(),
            ]
            .into_iter()
            .chain(dual_stack)
            .collect::<Vec<_>>(),
        );
        Self { api, etcd, certificates, files, port }
    }

    /// With which this user reaches the server.
    fn config(&self, user: &str) -> Config {
        let mut config = Config::new(format!("https://127.0.0.1:{}", self.port).parse().unwrap());
        let authority = CertificateDer::from_pem_file(self.certificates.path("ca.crt")).unwrap();
        config.root_cert = Some(vec![authority.to_vec()]);
        config.auth_info.token = Some(format!("{user}-token").into());
        config
    }

    /// A file with which this user reaches the server.
    fn kubeconfig(&self, user: &str) -> PathBuf {
        let at = ([127, 0, 0, 1], self.port).into();
        let text = self.certificates.kubeconfig(at, "ca.crt", &format!("{{token: {user}-token}}"));
        let path = self.files.path().join(user);
        fs::write(&path, text).unwrap();
        path
    }
}

/// A port that is free at the moment.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
