//! An API server behind TLS, as every real one is.

use std::net::SocketAddr;
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
use crate::certificates::Certificates;

fn certificate(certificates: &Certificates, name: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(certificates.path(name)).unwrap()
}

/// Makes a server look like one with TLS that wants a certificate of ours.
async fn before(certificates: &Certificates, server: SocketAddr) -> (SocketAddr, Task<()>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut roots = RootCertStore::empty();
    roots.add(certificate(certificates, "ca.crt")).unwrap();
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
    let key = PrivateKeyDer::from_pem_file(certificates.path("server.key")).unwrap();
    let config = ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate(certificates, "server.crt")], key)
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

#[tokio::test]
async fn certificates_and_a_token_from_files_let_a_node_in() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    bed.server.behave(|behaviour| behaviour.token = Some("first".into()));
    let certificates = Certificates::new();
    let inside: SocketAddr = bed.server.url().strip_prefix("http://").unwrap().parse().unwrap();
    let (at, _serving) = before(&certificates, inside).await;
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
