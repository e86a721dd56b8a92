//! An API server behind TLS, as every real one is.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use subnet::StoreError;
use subnet::kube::{Kube, KubeOptions};
use subnet::testing::node;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::bed::{Bed, Follower, MAC, Task, VXLAN, acquire, acquire_v4, public, spawn, vxlan};
use crate::certificates::Certificates;
use crate::follow::{changes_among_heartbeats_are_seen, peers};

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
    let text = error.to_string();
    assert!(text.contains("not trusted here: look at certificate-authority in --kubeconfig-file"), "{text}");

    let nobody = certificates.kubeconfig(at, "ca.crt", "{token: second}");
    options.kubeconfig = Some(bed.write("kubeconfig", &nobody));
    let store = Kube::new(options.clone()).await.unwrap();
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err();
    // The connection may end before the server's reason arrives.
    assert!(matches!(error, StoreError::Denied { .. } | StoreError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn changes_among_many_heartbeats_are_seen_behind_tls() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 20);
    let certificates = Certificates::new();
    let inside: SocketAddr = bed.server.url().strip_prefix("http://").unwrap().parse().unwrap();
    let (at, _serving) = before(&certificates, inside).await;
    let user = format!(
        "{{client-certificate: {}, client-key: {}}}",
        certificates.text("client.crt"),
        certificates.text("client.key")
    );
    let kubeconfig = Some(bed.write("kubeconfig", &certificates.kubeconfig(at, "ca.crt", &user)));
    let options = KubeOptions { api_url: None, kubeconfig, ..bed.options("p0019") };
    let mut follower = Follower::of(&Arc::new(Kube::new(options).await.unwrap()));
    follower.words(20).await;
    changes_among_heartbeats_are_seen(&bed, &mut follower).await;
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

fn base64(certificates: &Certificates, name: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(std::fs::read(certificates.path(name)).unwrap())
}

/// Options with this kubeconfig and no address besides.
fn with_kubeconfig(bed: &Bed, text: &str) -> KubeOptions {
    let kubeconfig = Some(bed.write("kubeconfig", text));
    KubeOptions { api_url: None, kubeconfig, ..bed.options("n1") }
}

/// A kubeconfig with these members of its cluster and its user, each a line of YAML.
fn written(at: &str, cluster: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- name: c\n  context: {{cluster: c, user: u}}\nclusters:\n- name: c\n  cluster:\n    server: {at}\n    {cluster}\nusers:\n- name: u\n  user:\n    {user}\n"
    )
}

/// A file of base64 with line ends, as a block of YAML.
fn wrapped(certificates: &Certificates, name: &str) -> String {
    let lines: Vec<String> = base64(certificates, name)
        .as_bytes()
        .chunks(76)
        .map(|line| String::from_utf8(line.to_vec()).unwrap())
        .collect();
    format!("|\n      {}", lines.join("\n      "))
}

/// A program that prints the file that `CREDENTIAL` names: one with the client's certificate is beside it.
fn credential_plugin(certificates: &Certificates) -> String {
    let script = certificates.text("plugin");
    let credential = serde_json::json!({
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {
            "clientCertificateData": std::fs::read_to_string(certificates.path("client.crt")).unwrap(),
            "clientKeyData": std::fs::read_to_string(certificates.path("client.key")).unwrap(),
        },
    });
    std::fs::write(certificates.path("credential"), credential.to_string()).unwrap();
    subnet::testing::write_program(script.as_ref(), "#!/bin/sh\nexec cat \"$CREDENTIAL\"\n").unwrap();
    script
}

#[tokio::test]
async fn a_kubeconfig_is_read_as_leniently_as_kubectl_reads_it() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let certificates = Certificates::new();
    let inside: SocketAddr = bed.server.url().strip_prefix("http://").unwrap().parse().unwrap();
    let (at, _serving) = before(&certificates, inside).await;
    let at = format!("https://{at}");
    let files = format!(
        "client-certificate: {}\n    client-key: {}",
        certificates.text("client.crt"),
        certificates.text("client.key")
    );
    let authority = format!("certificate-authority: {}", certificates.text("ca.crt"));
    let script = credential_plugin(&certificates);
    for (what, cluster, user) in [
        (
            "base64 with line ends",
            format!("certificate-authority-data: {}", wrapped(&certificates, "ca.crt")),
            format!(
                "client-certificate-data: {}\n    client-key-data: {}",
                wrapped(&certificates, "client.crt"),
                wrapped(&certificates, "client.key")
            ),
        ),
        (
            "members that are empty",
            format!(
                "{authority}\n    certificate-authority-data: \"\"\n    proxy-url: \"\"\n    tls-server-name: \"\""
            ),
            format!(
                "{files}\n    client-certificate-data: \"\"\n    client-key-data: \"\"\n    tokenFile: \"\"\n    token: \"\""
            ),
        ),
        (
            "nobody to trust",
            "certificate-authority: \"\"\n    insecure-skip-tls-verify: true".to_owned(),
            files.clone(),
        ),
        (
            "members that are unknown",
            format!("{authority}\n    disable-compression: true\n    colour: red"),
            files.clone(),
        ),
        (
            "a plugin",
            authority.clone(),
            format!(
                "exec: {{apiVersion: client.authentication.k8s.io/v1, command: {script}, interactiveMode: Never, env: \
                 [{{name: CREDENTIAL, value: {}}}]}}",
                certificates.text("credential")
            ),
        ),
    ] {
        let options = with_kubeconfig(&bed, &written(&at, &cluster, &user));
        let store = Kube::new(options).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let lease = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await;
        lease.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[tokio::test]
async fn what_cannot_work_in_a_kubeconfig_is_named_in_one_sentence_with_the_remedy() {
    let bed = Bed::new(VXLAN);
    let certificates = Certificates::new();
    let ca = format!("certificate-authority: {}", certificates.text("ca.crt"));
    let token = "token: secret";
    let exec =
        |command: &str| format!("exec: {{apiVersion: client.authentication.k8s.io/v1, command: {command}}}");
    let data = |member: &str, value: &str| format!("{member}: {value}");
    let half = format!("client-certificate: {}", certificates.text("client.crt"));
    let other_half = format!("client-key: {}", certificates.text("client.key"));
    let mismatch = format!("{half}\n    client-key: {}", certificates.text("server.key"));
    for (cluster, user, parts) in [
        (
            data("certificate-authority-data", "\"###\""),
            token.to_owned(),
            &["certificate-authority-data is not base64", "base64 -w0"][..],
        ),
        (
            data("certificate-authority-data", "aGVsbG8="),
            token.to_owned(),
            &["certificate-authority-data", "BEGIN CERTIFICATE"],
        ),
        (
            "certificate-authority: /nowhere.crt".to_owned(),
            token.to_owned(),
            &["certificate-authority /nowhere.crt", "No such file"],
        ),
        (
            format!("{ca}\n    proxy-url: http://192.0.2.1:3128"),
            token.to_owned(),
            &["proxy-url is not supported", "remove it"],
        ),
        (
            ca.clone(),
            "auth-provider: {name: gcp, config: {}}".to_owned(),
            &["auth-provider is not supported", "give a token"],
        ),
        (ca.clone(), exec("no-such-plugin"), &["exec: no-such-plugin", "no such program", "install it"]),
        (ca.clone(), exec("\"false\""), &["exec: false", "exit status: 1"]),
        (ca.clone(), exec("id"), &["exec: id", "something else than an ExecCredential"]),
        (ca.clone(), half.clone(), &["client.crt has no key", "client-key"]),
        (ca.clone(), other_half, &["client.key has no certificate", "client-certificate"]),
        (ca.clone(), mismatch, &["server.key is not that of the certificate in", "belong together"]),
        (ca.clone(), "tokenFile: /nowhere".to_owned(), &["tokenFile /nowhere", "No such file"]),
        (ca.clone(), "token: \"two words\"".to_owned(), &["token", "a space"]),
    ] {
        let options = with_kubeconfig(&bed, &written("https://127.0.0.1:1", &cluster, &user));
        let error = Kube::new(options).await.unwrap_err();
        assert!(matches!(error, StoreError::Unusable(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("--kubeconfig-file") && parts.iter().all(|part| text.contains(part)), "{text}");
        assert!(!text.contains("secret") && !text.contains('\n'), "{text}");
    }
}

#[tokio::test]
async fn a_kubeconfig_whose_parts_do_not_fit_together_is_named_in_one_sentence() {
    let bed = Bed::new(VXLAN);
    let certificates = Certificates::new();
    let ca = format!("certificate-authority: {}", certificates.text("ca.crt"));
    let token = "token: secret";
    for (text, parts) in [
        (
            written("https://127.0.0.1:1", &ca, token).replace("current-context: c", ""),
            &["no current-context", "kubectl config use-context"][..],
        ),
        (
            written("https://127.0.0.1:1", &ca, token).replace("current-context: c", "current-context: d"),
            &["\"d\"", "[c]"],
        ),
        (
            written("https://127.0.0.1:1", &ca, token).replace("cluster: c,", "cluster: e,"),
            &["no cluster \"e\""],
        ),
        (
            written("https://127.0.0.1:1", &ca, token).replace("user: u}", "user: v}"),
            &["no user \"v\"", "[u]", "name one of them"],
        ),
        (written("", &ca, token), &["no server", "https://HOST:PORT"]),
        (written("ftp://127.0.0.1", &ca, token), &["server: \"ftp://127.0.0.1\"", "https://HOST:PORT"]),
        (written("https://127.0.0.1:1", &ca, "token: @secret"), &["not YAML", "line 15, column 12"]),
        ("apiVersion: v1\n\tkind: Config\n".to_owned(), &["--kubeconfig-file"]),
    ] {
        let options = with_kubeconfig(&bed, &text);
        let error = Kube::new(options).await.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{error}");
        assert!(error.contains("--kubeconfig-file") && !error.contains("secret"), "{error}");
    }
}
