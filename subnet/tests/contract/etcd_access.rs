//! Being let into etcd, and being refused: TLS, client certificates, passwords.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use etcd_client::{Permission, PermissionType};
use subnet::etcd::{Etcd, EtcdOptions};
use subnet::{LeaseStore, StoreError};

use super::bed::options;
use super::etcd_server::Server;
use super::nodes::{Follower, acquire, hold, value, within};
use super::sentences::CONFIG;

const HOUR: Duration = Duration::from_secs(3600);

/// Certificates of a test authority, made with the openssl program.
fn certify(server: &Server) {
    let run = |arguments: &str| {
        let output = Command::new("openssl").args(arguments.split(' ')).output();
        let output = output.expect("openssl is missing: install the package openssl");
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let path = |name: &str| server.path(name);
    std::fs::write(path("ext-server"), format!("subjectAltName=IP:{}", server.host)).unwrap();
    std::fs::write(path("ext-client"), "extendedKeyUsage=clientAuth").unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for ca in ["ca", "stranger"] {
        run(&format!(
            "req -x509 {key} -keyout {0} -out {1} -subj /CN={ca}",
            path(&format!("{ca}.key")),
            path(ca)
        ));
    }
    for (name, ca) in [("server", "ca"), ("client", "ca")] {
        let (own, csr) = (path(&format!("{name}.key")), path(&format!("{name}.csr")));
        run(&format!("req {key} -keyout {own} -out {csr} -subj /CN={name}"));
        run(&format!(
            "x509 -req -in {csr} -CA {} -CAkey {} -CAcreateserial -out {} -extfile {}",
            path(ca),
            path(&format!("{ca}.key")),
            path(name),
            path(&format!("ext-{name}")),
        ));
    }
}

#[tokio::test]
async fn tls_needs_the_right_authority_and_the_client_certificate() {
    let server = Server::prepare();
    certify(&server);
    let arguments = vec![
        format!("--cert-file={}", server.path("server")),
        format!("--key-file={}", server.path("server.key")),
        format!("--trusted-ca-file={}", server.path("ca")),
        "--client-cert-auth".into(),
    ];
    let server = server.with(arguments);
    server.start();
    let file = |name: &str| std::fs::read_to_string(server.path(name)).unwrap();
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(file("ca")))
        .identity(Identity::from_pem(file("client"), file("client.key")));
    let mut client = server.answering(Some(ConnectOptions::new().with_tls(tls))).await;
    client.put("/coreos.com/network/config", CONFIG, None).await.unwrap();

    let path = |name: &str| Some(server.path(name).into());
    let right = EtcdOptions {
        cert: path("client"),
        key: path("client.key"),
        ca: path("ca"),
        ..options(format!("https://{}", server.address()), HOUR)
    };
    let node = Arc::new(Etcd::new(right.clone()).unwrap());
    within(node.network()).await.unwrap();
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    Follower::of(node).leases(|leases| leases.leases.contains_key(&lease.subnets)).await;
    // An endpoint without a scheme is a TLS endpoint for a node with a certificate.
    let bare = EtcdOptions { endpoints: vec![server.address()], ..right.clone() };
    within(Etcd::new(bare).unwrap().network()).await.unwrap();

    let refused =
        async |options: EtcdOptions| within(Etcd::new(options).unwrap().network()).await.unwrap_err();
    let error = refused(EtcdOptions { ca: path("stranger"), ..right.clone() }).await;
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("certificate"), "{error}");
    // Half an identity is none, as in Go flannel.
    let error = refused(EtcdOptions { key: None, ..right.clone() }).await;
    assert!(matches!(error, StoreError::Denied { .. } | StoreError::Unreachable { .. }), "{error}");
    let plain = EtcdOptions { endpoints: vec![format!("http://{}", server.address())], ..right };
    let error = refused(plain).await;
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
}

#[tokio::test]
async fn an_authority_alone_is_enough_for_a_server_that_asks_for_no_certificate() {
    let server = Server::prepare();
    certify(&server);
    let arguments = vec![
        format!("--cert-file={}", server.path("server")),
        format!("--key-file={}", server.path("server.key")),
    ];
    let server = server.with(arguments);
    server.start();
    let ca = std::fs::read_to_string(server.path("ca")).unwrap();
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
    server.answering(Some(ConnectOptions::new().with_tls(tls))).await;
    let url = format!("https://{}", server.address());
    let right = EtcdOptions { ca: Some(server.path("ca").into()), ..options(url, HOUR) };
    let error = within(Etcd::new(right.clone()).unwrap().network()).await.unwrap_err();
    assert!(matches!(error, StoreError::NoConfig { .. }), "{error}");
    let error = within(Etcd::new(EtcdOptions { ca: None, ..right }).unwrap().network()).await.unwrap_err();
    assert!(!matches!(error, StoreError::NoConfig { .. }), "{error}");
}

#[tokio::test]
async fn a_user_needs_the_password_and_a_token_that_is_void_is_replaced() {
    let server = Arc::new(Server::prepare());
    server.start();
    let mut root = server.answering(None).await;
    root.user_add("root", "rootsecret", None).await.unwrap();
    root.role_add("root").await.unwrap();
    root.user_grant_role("root", "root").await.unwrap();
    root.user_add("flannel", "hunter2", None).await.unwrap();
    root.role_add("flannel").await.unwrap();
    let permission = Permission::new(PermissionType::Readwrite, "/coreos.com/").with_prefix();
    root.role_grant_permission("flannel", permission).await.unwrap();
    root.user_grant_role("flannel", "flannel").await.unwrap();
    root.put("/coreos.com/network/config", CONFIG, None).await.unwrap();

    let right = EtcdOptions {
        username: Some("flannel".into()),
        password: Some("hunter2".into()),
        ..options(format!("http://{}", server.address()), HOUR)
    };
    // A password that the server doesn't ask for does no harm.
    within(Etcd::new(right.clone()).unwrap().network()).await.unwrap();
    root.auth_enable().await.unwrap();

    let node = Arc::new(Etcd::new(right.clone()).unwrap());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let _holding = hold(&node);
    let mut follower = Follower::of(node.clone());
    follower.leases(|leases| leases.leases.contains_key(&lease.subnets)).await;

    for (name, password) in [(Some("flannel"), Some("wrong")), (Some("flannel"), None), (None, None)] {
        let wrong = EtcdOptions {
            username: name.map(str::to_owned),
            password: password.map(str::to_owned),
            ..right.clone()
        };
        let error = within(Etcd::new(wrong).unwrap().network()).await.unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains("wrong"), "{error:?}");
    }
    let elsewhere = EtcdOptions { prefix: "/other".into(), ..right.clone() };
    let elsewhere = Arc::new(Etcd::new(elsewhere).unwrap());
    let error = within(elsewhere.network()).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    let known = Follower::of(elsewhere).until(|known| known.trouble.is_some()).await;
    assert!(known.trouble.unwrap().contains("permission denied"));

    // etcd forgets its tokens when it starts.
    server.kill();
    follower.until(|known| known.trouble.is_some()).await;
    server.start();
    let options = ConnectOptions::new().with_user("root", "rootsecret");
    let mut root = server.answering(Some(options)).await;
    within(node.network()).await.unwrap();
    root.put("/coreos.com/network/subnets/10.3.255.0-24", value(2), None).await.unwrap();
    follower.until(|known| known.trouble.is_none() && known.leases.as_ref().unwrap().leases.len() == 2).await;
    acquire(&*node, CONFIG, 1).await.unwrap();
}
