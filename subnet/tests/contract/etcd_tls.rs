//! Certificates as they are in the field, and each refusal in words: over a real etcd.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use subnet::etcd::{Etcd, EtcdOptions};
use subnet::{LeaseStore, StoreError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bed::options;
use super::etcd_server::{Server, own_address};
use super::nodes::within;
use super::sentences::CONFIG;

const HOUR: Duration = Duration::from_secs(3600);
const P256: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
const P384: &str = "-newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes";

fn openssl(arguments: &str) {
    let output = Command::new("openssl").args(arguments.split_whitespace()).output();
    let output = output.expect("openssl is missing: install the package openssl");
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A server behind TLS with a certificate of `ca`, and files beside it.
struct Site(Server);

impl Site {
    async fn new(ca_key: &str, digest: &str, server_key: &str, wants_client: bool) -> Self {
        let site = Self(Server::prepare());
        site.authority("ca", ca_key, digest);
        let names = format!("subjectAltName=IP:{}", site.0.host);
        site.certificate("server", server_key, "ca", Some(&names), digest);
        let mut arguments = vec![
            format!("--cert-file={}", site.at("server")),
            format!("--key-file={}", site.at("server.key")),
        ];
        if wants_client {
            arguments.push("--client-cert-auth".into());
            arguments.push(format!("--trusted-ca-file={}", site.at("ca")));
        }
        let site = Self(site.0.with(arguments));
        site.0.start();
        site.certificate("admin", P256, "ca", Some("extendedKeyUsage=clientAuth"), "sha256");
        site
    }

    /// Waits until it answers, and writes the configuration.
    async fn configured(self) -> Self {
        let file = |name: &str| std::fs::read_to_string(self.at(name)).unwrap();
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(file("ca")))
            .identity(Identity::from_pem(file("admin"), file("admin.key")));
        let mut client = self.0.answering(Some(ConnectOptions::new().with_tls(tls))).await;
        client.put("/coreos.com/network/config", CONFIG, None).await.unwrap();
        self
    }

    fn at(&self, name: &str) -> String {
        self.0.path(name)
    }

    fn authority(&self, name: &str, key: &str, digest: &str) {
        let (own, out) = (self.at(&format!("{name}.key")), self.at(name));
        openssl(&format!("req -x509 {key} -{digest} -keyout {own} -out {out} -subj /CN={name} -days 2"));
    }

    fn certificate(&self, name: &str, key: &str, ca: &str, extensions: Option<&str>, digest: &str) {
        let (own, csr) = (self.at(&format!("{name}.key")), self.at(&format!("{name}.csr")));
        openssl(&format!("req {key} -keyout {own} -out {csr} -subj /CN={name}"));
        let with = extensions.map(|extensions| {
            std::fs::write(self.at("extensions"), extensions).unwrap();
            format!("-extfile {}", self.at("extensions"))
        });
        openssl(&format!(
            "x509 -req -in {csr} -CA {} -CAkey {} -CAcreateserial -days 2 -{digest} -out {} {}",
            self.at(ca),
            self.at(&format!("{ca}.key")),
            self.at(name),
            with.unwrap_or_default()
        ));
    }

    fn options(&self, client: Option<&str>) -> EtcdOptions {
        EtcdOptions {
            cert: client.map(|name| self.at(name).into()),
            key: client.map(|name| self.at(&format!("{name}.key")).into()),
            ca: Some(self.at("ca").into()),
            ..options(format!("https://{}", self.0.address()), HOUR)
        }
    }

    fn change(&self, name: &str, change: impl FnOnce(String) -> String) {
        let text = std::fs::read_to_string(self.at(name)).unwrap();
        std::fs::write(self.at(name), change(text)).unwrap();
    }
}

async fn let_in(options: EtcdOptions) {
    if let Err(error) = within(Etcd::new(options).unwrap().network()).await {
        panic!("{error}");
    }
}

async fn refused(options: EtcdOptions) -> String {
    let store = Etcd::new(options).unwrap();
    let error = within(store.network()).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error:?}");
    let first = error.to_string();
    for _ in 0..5 {
        let again = within(store.network()).await.unwrap_err().to_string();
        assert_eq!(again, first, "one state has one text");
    }
    first
}

#[tokio::test]
async fn client_certificates_that_etcdctl_takes_let_a_node_in() {
    let site = Site::new(P256, "sha256", P256, true).await.configured().await;
    // Version 1: openssl makes it where no extensions are asked for, if it is told so.
    site.certificate("v1", P256, "ca", None, "sha256");
    let text =
        Command::new("openssl").args(["x509", "-in", &site.at("v1"), "-noout", "-text"]).output().unwrap();
    let is_v1 = String::from_utf8_lossy(&text.stdout).contains("Version: 1");
    if !is_v1 {
        // OpenSSL 3.2 and later make version 3 unless told otherwise.
        let csr = site.at("v1.csr");
        openssl(&format!(
            "x509 -req -x509v1 -in {csr} -CA {} -CAkey {} -days 2 -out {}",
            site.at("ca"),
            site.at("ca.key"),
            site.at("v1")
        ));
    }
    let_in(site.options(Some("v1"))).await;
    for (name, key) in [
        ("p384", P384),
        ("ed25519", "-newkey ed25519 -nodes"),
        ("rsa2048", "-newkey rsa:2048 -nodes"),
        ("rsa4096", "-newkey rsa:4096 -nodes"),
    ] {
        site.certificate(name, key, "ca", Some("extendedKeyUsage=clientAuth"), "sha512");
        let_in(site.options(Some(name))).await;
    }
    // The same key in the other forms of PEM.
    let (rsa, ec) = (site.at("rsa2048.key"), site.at("admin.key"));
    openssl(&format!("rsa -in {rsa} -traditional -out {rsa}"));
    openssl(&format!("ec -in {ec} -out {ec}"));
    assert!(std::fs::read_to_string(&rsa).unwrap().contains("BEGIN RSA PRIVATE KEY"));
    assert!(std::fs::read_to_string(&ec).unwrap().contains("BEGIN EC PRIVATE KEY"));
    let_in(site.options(Some("rsa2048"))).await;
    let_in(site.options(Some("admin"))).await;
    // Parameters before the key, words before the certificate, DOS line ends, and a chain.
    openssl(&format!("ecparam -name prime256v1 -out {}", site.at("parameters")));
    let parameters = std::fs::read_to_string(site.at("parameters")).unwrap();
    site.change("admin.key", |text| parameters + &text);
    let authority = std::fs::read_to_string(site.at("ca")).unwrap();
    site.change("admin", |text| format!("subject=CN = admin\n{text}{authority}").replace('\n', "\r\n"));
    site.change("ca", |text| format!("An authority:\r\n{}{authority}", text.replace('\n', "\r\n")));
    let_in(site.options(Some("admin"))).await;
}

#[tokio::test]
async fn authorities_with_other_curves_and_digests_are_followed() {
    let site = Site::new(P384, "sha384", P384, false).await.configured().await;
    let_in(site.options(None)).await;
    let site = Site::new("-newkey rsa:3072 -nodes", "sha512", "-newkey rsa:2048 -nodes", false)
        .await
        .configured()
        .await;
    let_in(site.options(None)).await;
}

#[tokio::test]
async fn keys_that_cannot_be_used_are_refused_at_the_start_with_file_reason_and_remedy() {
    let site = Site(Server::prepare());
    for ca in ["ca", "other"] {
        site.authority(ca, P256, "sha256");
    }
    let refused = |name: &str| Etcd::new(site.options(Some(name))).unwrap_err().to_string();
    site.certificate("p521", "-newkey ec -pkeyopt ec_paramgen_curve:secp521r1 -nodes", "ca", None, "sha256");
    let error = refused("p521");
    for part in ["--etcd-keyfile", "p521.key", "P-521", "P-256"] {
        assert!(error.contains(part), "{error}");
    }
    site.certificate("short", "-newkey rsa:1024 -nodes", "ca", None, "sha256");
    let error = refused("short");
    assert!(error.contains("fewer than 2048") && error.contains("short.key"), "{error}");
    site.certificate("one", P256, "ca", None, "sha256");
    site.certificate("two", P256, "ca", None, "sha256");
    std::fs::copy(site.at("two.key"), site.at("one.key")).unwrap();
    let error = refused("one");
    for part in
        ["--etcd-keyfile", "one.key", "--etcd-certfile", "/one: give", "is not that of the certificate"]
    {
        assert!(error.contains(part), "{error}");
    }
    let two = site.at("two.key");
    openssl(&format!("pkcs8 -topk8 -in {two} -out {two}.encrypted -passout pass:secret"));
    std::fs::rename(format!("{two}.encrypted"), &two).unwrap();
    let error = refused("two");
    assert!(error.contains("passphrase") && error.contains("two.key"), "{error}");
}

#[tokio::test]
async fn a_server_with_a_key_that_cannot_be_checked_is_named() {
    let p521 = "-newkey ec -pkeyopt ec_paramgen_curve:secp521r1 -nodes";
    for (ca, digest, server) in [(P256, "sha256", p521), (P384, "sha512", P256), (p521, "sha512", P256)] {
        let site = Site::new(ca, digest, server, false).await;
        // Until it listens.
        while tokio::net::TcpStream::connect(site.0.address()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let error = refused(site.options(None)).await;
        assert!(error.contains("P-521") && error.contains("P-256"), "{error}");
    }
}

#[tokio::test]
async fn each_refusal_of_tls_has_one_text_that_names_the_flag() {
    let site = Site::new(P256, "sha256", P256, true).await.configured().await;
    site.authority("stranger", P256, "sha256");
    site.certificate("foreign", P256, "stranger", Some("extendedKeyUsage=clientAuth"), "sha256");
    let right = site.options(Some("admin"));
    let error = refused(EtcdOptions { ca: Some(site.at("stranger").into()), ..right.clone() }).await;
    assert!(
        error.contains("signed by an authority that is not trusted") && error.contains("--etcd-cafile"),
        "{error}"
    );
    let error = refused(site.options(None)).await;
    assert!(error.contains("--etcd-certfile and --etcd-keyfile"), "{error}");
    let error = refused(site.options(Some("foreign"))).await;
    assert!(
        error.contains("refuses this node's certificate") && error.contains("--etcd-certfile"),
        "{error}"
    );
    let plain = EtcdOptions { endpoints: vec![format!("http://{}", site.0.address())], ..right.clone() };
    let error = refused(plain).await;
    assert!(error.contains("is it https?"), "{error}");
    // No name of the certificate.
    let elsewhere = EtcdOptions { endpoints: vec![format!("https://localhost.{}", "invalid:1")], ..right };
    let error = within(Etcd::new(elsewhere).unwrap().network()).await.unwrap_err().to_string();
    assert!(error.contains("can't be resolved") && error.contains("--etcd-endpoints"), "{error}");
}

/// What a store says that does not answer, the same each time.
async fn one_text(store: &Etcd, times: usize) -> String {
    let mut texts = std::collections::BTreeSet::new();
    for _ in 0..times {
        let error = within(store.network()).await.unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
        texts.insert(error.to_string());
    }
    assert_eq!(texts.len(), 1, "one state has one text: {texts:?}");
    texts.pop_first().unwrap()
}

#[tokio::test]
async fn a_plain_server_and_none_at_all_are_told_apart() {
    let server = Server::shared().await;
    let site = Site(Server::prepare());
    site.authority("ca", P256, "sha256");
    let tls = |address: &str| EtcdOptions {
        ca: Some(site.at("ca").into()),
        ..options(format!("https://{address}"), HOUR)
    };
    let error = refused(tls(&server.address())).await;
    assert!(error.contains("is it http?"), "{error}");
    let nobody = format!("{}:2379", own_address());
    let store = Etcd::new(EtcdOptions {
        endpoints: vec![format!("http://{nobody}"), nobody.replace("2379", "2378")],
        ..options(String::new(), HOUR)
    })
    .unwrap();
    let text = one_text(&store, 6).await;
    assert!(text.contains("is etcd running?") && text.contains("--lease-store=file:DIR"), "{text}");
}

#[tokio::test]
async fn what_answers_and_is_no_etcd_is_named_by_one_text() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let proxy = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 2048]).await;
            let answer =
                b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            let _ = stream.write_all(answer).await;
        }
    });
    let store = Etcd::new(options(endpoint.clone(), HOUR)).unwrap();
    // The etcd behind a proxy may be away for a moment.
    let text = one_text(&store, 4).await;
    proxy.abort();
    assert!(text.contains(&endpoint) && text.contains("503") && text.contains("--etcd-endpoints"), "{text}");
}

#[tokio::test]
async fn a_literal_ipv6_address_is_a_name_in_a_certificate() {
    let site = Site(Server::prepare());
    site.authority("ca", P256, "sha256");
    site.certificate("server", P256, "ca", Some("subjectAltName=IP:::1"), "sha256");
    let options = EtcdOptions { ca: Some(site.at("ca").into()), ..options("https://[::1]:9".into(), HOUR) };
    let error = within(Arc::new(Etcd::new(options).unwrap()).network()).await.unwrap_err().to_string();
    assert!(!error.contains("name") || error.contains("nothing listens"), "{error}");
}
