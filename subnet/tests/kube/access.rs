//! Finding the API server, being let in, and knowing who one is.

use subnet::kube::{Kube, KubeOptions};
use subnet::testing::{Refusal, node};
use subnet::{Family, LeaseStore, StoreError};

use crate::bed::{Bed, DUAL, Follower, MAC, VXLAN, acquire, acquire_v4, public, soon, vxlan};

async fn refused(options: KubeOptions) -> String {
    let error = Kube::new(options).await.unwrap_err();
    assert!(matches!(error, StoreError::Unusable(_)), "{error}");
    error.to_string()
}

#[tokio::test]
async fn wrong_options_are_named_with_what_would_do() {
    let bed = Bed::new(VXLAN);
    let with = |change: &dyn Fn(&mut KubeOptions)| {
        let mut options = bed.options("n1");
        change(&mut options);
        options
    };
    let error = refused(with(&|options| options.annotation_prefix = "org/x".into())).await;
    assert!(error.contains("--kube-annotation-prefix: \"org/x\""), "{error}");
    let error = refused(with(&|options| options.node_name = Some("Node 1".into()))).await;
    assert!(error.contains("NODE_NAME: \"Node 1\""), "{error}");
    let error = refused(with(&|options| options.node_name = Some(String::new()))).await;
    assert!(error.contains("NODE_NAME") && error.contains("POD_NAMESPACE"), "{error}");
    let error = refused(with(&|options| options.pod = Some(("../x".into(), "y".into())))).await;
    assert!(error.contains("POD_NAMESPACE: \"../x\""), "{error}");
    let error = refused(with(&|options| options.api_url = Some("ftp://x".into()))).await;
    assert!(error.contains("--kube-api-url: \"ftp://x\""), "{error}");
    let error = refused(with(&|options| options.api_url = None)).await;
    assert!(error.contains("--kubeconfig-file or --kube-api-url"), "{error}");
    let error = refused(with(&|options| options.kubeconfig = Some("/nonexistent/config".into()))).await;
    assert!(error.contains("--kubeconfig-file /nonexistent/config"), "{error}");
    let broken = bed.write("broken", "clusters: 7");
    let error = refused(with(&|options| options.kubeconfig = Some(broken.clone()))).await;
    assert!(error.contains("--kubeconfig-file") && error.contains("broken"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_away_is_no_error_at_first_and_a_sentence_later() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    bed.server.behave(|behaviour| behaviour.down = true);
    let store = bed.store("n1").await;
    assert_eq!(store.describe(), format!("Kubernetes at {}, node n1", bed.server.url()));
    assert_eq!(store.network().await.unwrap().networks().to_string(), "10.244.0.0/16");
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    bed.server.behave(|behaviour| behaviour.down = false);
    acquire_v4(&store, 1).await;
}

#[tokio::test]
async fn a_node_is_found_by_its_pod() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let mut options = bed.options("");
    options.pod = Some(("kube-flannel".into(), "kube-flannel-ds-x7k2p".into()));
    let store = Kube::new(options).await.unwrap();
    let before = store.describe();
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err().to_string();
    assert!(error.contains("kube-flannel-ds-x7k2p"), "{error}");
    bed.server.put_pod("kube-flannel", "kube-flannel-ds-x7k2p", "");
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err().to_string();
    assert!(error.contains("has no node yet"), "{error}");
    bed.server.put_pod("kube-flannel", "kube-flannel-ds-x7k2p", "n1");
    acquire_v4(&store, 1).await;
    let asked = bed.server.requests().iter().filter(|request| request.path.contains("/pods/")).count();
    acquire_v4(&store, 3).await;
    let again = bed.server.requests().iter().filter(|request| request.path.contains("/pods/")).count();
    assert_eq!(again, asked, "a pod stays where it is");
    assert_eq!(store.describe(), before, "it is the same at each start");
}

#[tokio::test]
async fn a_refusal_names_what_is_not_allowed_and_the_remedy() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    for (method, path, status, message, parts) in [
        (
            "PATCH",
            "/status",
            403,
            "nodes \"n1\" is forbidden: User \"x\" cannot patch resource \"nodes/status\"",
            &["cannot patch resource", "ClusterRole", "nodes/status"][..],
        ),
        ("GET", "/nodes", 403, "nodes is forbidden", &["nodes is forbidden", "list and watch"]),
        ("GET", "/nodes", 401, "Unauthorized", &["Unauthorized", "--kubeconfig-file"]),
        ("GET", "/nodes", 503, "etcd is away", &["does not answer", "etcd is away (503)"]),
        ("PATCH", "/status", 422, "annotation is invalid", &["annotation is invalid (422)"]),
    ] {
        let refusal = Refusal { method, path: path.into(), status, message: message.into() };
        bed.server.behave(|behaviour| behaviour.refusals = vec![refusal]);
        let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err();
        assert_eq!(matches!(error, StoreError::Denied { .. }), matches!(status, 401 | 403), "{error}");
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}

fn kubeconfig(url: &str, token: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: c\n  cluster:\n    server: {url}\ncontexts:\n- name: c\n  context:\n    cluster: c\n    user: u\nusers:\n- name: u\n  user:\n    token: {token}\n"
    )
}

#[tokio::test]
async fn credentials_that_are_renewed_are_read_again() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    bed.server.behave(|behaviour| behaviour.token = Some("first".into()));
    let mut options = bed.options("n1");
    options.api_url = None;
    options.kubeconfig = Some(bed.write("kubeconfig", &kubeconfig(&bed.server.url(), "first")));
    let store = std::sync::Arc::new(Kube::new(options).await.unwrap());
    acquire_v4(&store, 1).await;
    let mut follower = Follower::of(&store);
    follower.words(1).await;

    bed.server.behave(|behaviour| behaviour.token = Some("second".into()));
    bed.server.disconnect();
    let known = follower.until("refused", |known| known.trouble.is_some()).await;
    let trouble = known.trouble.unwrap();
    assert!(trouble.contains("refuses access") || trouble.contains("does not answer"), "{trouble}");
    assert!(!trouble.contains("first"), "{trouble}");
    assert_eq!(known.leases.unwrap().leases.len(), 1, "silence is not deletion");
    bed.write("kubeconfig", &kubeconfig(&bed.server.url(), "second"));
    follower.until("let in", |known| known.trouble.is_none()).await;
    acquire_v4(&store, 2).await;
}

#[tokio::test]
async fn an_address_given_besides_a_kubeconfig_wins() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    bed.server.behave(|behaviour| behaviour.token = Some("secret".into()));
    let mut options = bed.options("n1");
    options.kubeconfig = Some(bed.write("kubeconfig", &kubeconfig("http://127.0.0.1:1", "secret")));
    let store = Kube::new(options).await.unwrap();
    acquire_v4(&store, 1).await;
    assert!(!format!("{store:?}").contains("secret"));
}

#[tokio::test]
async fn the_configuration_is_read_from_the_file_with_the_rules_for_kubernetes() {
    let bed = Bed::new(
        r#"{"Network":"10.244.0.0/16","SubnetLen":99,"SubnetMin":"x","Backend":{"Type":"host-gw"}}"#,
    );
    bed.server.put_node(node("n1", &["10.244.3.0/26"]));
    let store = bed.store("n1").await;
    let network = store.network().await.unwrap();
    assert_eq!(network.range(Family::V4).unwrap().subnet_len, 26, "the length of the own podCIDR");
    let requests = bed.server.requests().len();
    assert_eq!(store.network().await.unwrap(), network);
    assert_eq!(bed.server.requests().len(), requests, "which is asked for once");

    let path = bed.write("net-conf.json", r#"{"Network":"10.244.0.0"}"#);
    let error = store.network().await.unwrap_err();
    assert!(matches!(error, StoreError::BadConfig { .. }));
    let text = format!("{error}");
    assert!(text.contains(path.to_str().unwrap()) && text.contains("\"10.244.0.0\""), "{text}");
    std::fs::remove_file(&path).unwrap();
    let error = store.network().await.unwrap_err();
    assert!(matches!(error, StoreError::NoConfig { .. }), "{error}");
}

/// A web server that answers every request with a page and this status: its address, while the task lives.
async fn web(status: &'static str) -> (std::net::SocketAddr, crate::bed::Task<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = crate::bed::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 2048];
            let _ = stream.read(&mut request).await;
            let page = "<html>[{}]</html>";
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{page}",
                page.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (address, task)
}

#[tokio::test]
async fn something_else_than_an_api_server_is_recognised() {
    for (status, remedy) in
        [("200 OK", ""), ("404 Not Found", "--kube-api-url"), ("502 Bad Gateway", "--kube-api-url")]
    {
        let (address, _web) = web(status).await;
        let bed = Bed::new(VXLAN);
        let mut options = bed.options("n1");
        options.api_url = Some(format!("http://{address}"));
        let store = std::sync::Arc::new(Kube::new(options).await.unwrap());
        let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err().to_string();
        assert!(error.contains("does not answer") && error.contains(remedy), "{status}: {error}");
        assert!(!error.contains("<html>"), "{status}: {error}");
        let mut follower = Follower::of(&store);
        follower.until("trouble", |known| known.trouble.is_some()).await;
        assert!(follower.known.borrow().leases.is_none());
    }
}

#[tokio::test]
async fn a_configuration_that_changes_is_noticed() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    store.network().await.unwrap();
    bed.write("unrelated", "x");
    bed.write("net-conf.json", VXLAN);
    bed.write("net-conf.json", DUAL);
    soon("the change", store.network_changed()).await;
    assert_eq!(store.network().await.unwrap().ranges().count(), 2);
    tokio::join!(soon("the next change", store.network_changed()), async {
        tokio::task::yield_now().await;
        bed.write("net-conf.json", VXLAN);
    });
    assert_eq!(store.network().await.unwrap().ranges().count(), 1);
}
