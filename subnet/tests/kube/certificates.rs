//! Authorities and certificates for servers behind TLS.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

/// Made with the openssl program: the authorities `ca` and `stranger`, and of the former a server at 127.0.0.1
/// and a client.
pub(crate) struct Certificates(tempfile::TempDir);

impl Certificates {
    pub(crate) fn new() -> Self {
        let all = Self(tempfile::Builder::new().prefix("flannel-test-kube-tls-").tempdir().unwrap());
        for authority in ["ca", "stranger"] {
            let (key, crt) = (all.text(&format!("{authority}.key")), all.text(&format!("{authority}.crt")));
            openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {crt} -days 2 -subj /CN={authority}"
            ));
        }
        std::fs::write(all.path("names"), "subjectAltName=IP:127.0.0.1").unwrap();
        for name in ["server", "client"] {
            let (key, csr, crt) = (
                all.text(&format!("{name}.key")),
                all.text(&format!("{name}.csr")),
                all.text(&format!("{name}.crt")),
            );
            openssl(&format!(
                "req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {csr} -subj /CN={name}"
            ));
            openssl(&format!(
                "x509 -req -in {csr} -CA {} -CAkey {} -CAcreateserial -days 2 -extfile {} -out {crt}",
                all.text("ca.crt"),
                all.text("ca.key"),
                all.text("names")
            ));
        }
        openssl(&format!("ec -in {} -pubout -out {}", all.text("server.key"), all.text("server.pub")));
        all
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn kubeconfig(&self, at: SocketAddr, ca: &str, user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: c\n  cluster:\n    server: https://{at}\n    certificate-authority: {}\ncontexts:\n- name: c\n  context:\n    cluster: c\n    user: u\nusers:\n- name: u\n  user: {user}\n",
            self.text(ca)
        )
    }
}

fn openssl(arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).output();
    let output = output.expect("openssl is missing: install the package openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
