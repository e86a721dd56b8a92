//! An API server behind TLS, as every real one is.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use subnet::StoreError;
use subnet::kube::Kube;
use subnet::testing::node;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::bed::{Bed, Follower, MAC, Task, VXLAN, acquire, acquire_v4, public, spawn, vxlan};

/// Authorities and certificates, made with the openssl program.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new() -> Self {
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
        all
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn certificate(&self, name: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.path(name)).unwrap()
    }

    /// Makes a server look like one with TLS that wants a certificate of ours.
    async fn before(&self, server: SocketAddr) -> (SocketAddr, Task<()>) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate("ca.crt")).unwrap();
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path("server.key")).unwrap();
        let config = ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate("server.crt")], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut outside) = acceptor.accept(stream).await else { return };
                    let mut inside = TcpStream::connect(server).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
                });
            }
        });
        (address, serving)
    }

    fn kubeconfig(&self, at: SocketAddr, ca: &str, user: &str) -> String {
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

#[tokio::test]
async fn certificates_and_a_token_from_files_let_a_node_in() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    bed.server.behave(|behaviour| behaviour.token = Some("first".into()));
    let certificates = Certificates::new();
    let inside: SocketAddr = bed.server.url().strip_prefix("http://").unwrap().parse().unwrap();
    let (at, _serving) = certificates.before(inside).await;
    let token = bed.write("token", "first");
    let user = format!(
        "{{client-certificate: {}, client-key: {}, tokenFile: {}}}",
        certificates.text("client.crt"),
        certificates.text("client.key"),
        token.display()
    );
    let mut options = bed.options("n1");
    options.api_url = None;
    options.kubeconfig = Some(bed.write("kubeconfig", &certificates.kubeconfig(at, "ca.crt", &user)));
    let store = Arc::new(Kube::new(options.clone()).await.unwrap());
    acquire_v4(&store, 1).await;
    let mut follower = Follower::of(&store);
    follower.words(1).await;

    // The token is replaced, as kubelet does it every hour.
    bed.write("token", "second");
    bed.server.behave(|behaviour| behaviour.token = Some("second".into()));
    bed.server.disconnect();
    bed.annotate("n1", "public-ip", Some("192.0.2.9"));
    follower
        .leases("a change", |all| all.leases.values().any(|lease| lease.public == public("192.0.2.9", "")))
        .await;

    let stranger = certificates.kubeconfig(at, "stranger.crt", &user);
    options.kubeconfig = Some(bed.write("kubeconfig", &stranger));
    let store = Kube::new(options.clone()).await.unwrap();
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("invalid peer certificate"), "{error}");

    let nobody = certificates.kubeconfig(at, "ca.crt", "{token: second}");
    options.kubeconfig = Some(bed.write("kubeconfig", &nobody));
    let store = Kube::new(options.clone()).await.unwrap();
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err();
    // The connection may end before the server's reason arrives.
    assert!(matches!(error, StoreError::Denied { .. } | StoreError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn files_that_are_missing_are_named() {
    let bed = Bed::new(VXLAN);
    let certificates = Certificates::new();
    let mut options = bed.options("n1");
    options.api_url = None;
    for (ca, user, part) in [
        ("nowhere.crt", "{token: x}", "nowhere.crt"),
        ("ca.crt", "{tokenFile: /nonexistent/token}", "/nonexistent/token"),
    ] {
        let at = "127.0.0.1:1".parse().unwrap();
        options.kubeconfig = Some(bed.write("kubeconfig", &certificates.kubeconfig(at, ca, user)));
        let error = Kube::new(options.clone()).await.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
