//! What the suite needs of a cluster, from whichever API server: a hand that makes, changes and removes nodes
//! over the API, and stores of nodes that have no more rights than the manifest gives.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

use ::kube::{Client, Config};
use http::{Method, Request};
use serde_json::{Value, json};
use subnet::kube::{Kube, KubeOptions};
use tempfile::TempDir;

use crate::common::{PREFIX, soon};

const NODES: &str = "/api/v1/nodes";

/// An API server with nothing in it.
pub(crate) struct World {
    pub(crate) hand: Hand,
    /// How stores reach it.
    kubeconfig: Option<PathBuf>,
    url: Option<String>,
    files: TempDir,
    pub(crate) _server: Box<dyn Any>,
}

impl World {
    /// A server on which the hand has all rights, reached by `config`, and stores reach it by a kubeconfig or an
    /// address. `server` ends with this value.
    pub(crate) fn new(
        config: Config,
        kubeconfig: Option<PathBuf>,
        url: Option<String>,
        server: Box<dyn Any>,
    ) -> Self {
        let files = tempfile::Builder::new().prefix("flannel-test-world-").tempdir().unwrap();
        Self { hand: Hand(Client::try_from(config).unwrap()), kubeconfig, url, files, _server: server }
    }

    /// The store of a node, with this network configuration.
    pub(crate) async fn store(&self, node: &str, network: &str) -> Arc<Kube> {
        let net_config_path = self.files.path().join("net-conf.json");
        std::fs::write(&net_config_path, network).unwrap();
        let options = KubeOptions {
            node_name: Some(node.to_owned()),
            pod: None,
            kubeconfig: self.kubeconfig.clone(),
            api_url: self.url.clone(),
            annotation_prefix: PREFIX.into(),
            net_config_path,
            set_network_unavailable: true,
        };
        Arc::new(Kube::new(options).await.unwrap())
    }
}

/// Does what kubelet, controllers and operators do.
pub(crate) struct Hand(Client);

impl Hand {
    /// One request: the answer, or the error in words.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Option<&Value>,
    ) -> Result<Value, ::kube::Error> {
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let request =
            Request::builder().method(method).uri(path).header("content-type", kind).body(body).unwrap();
        let text = soon(&format!("an answer to {path}"), self.0.request_text(request)).await?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(crate) async fn create(&self, path: &str, object: &Value) {
        self.ask(Method::POST, path, "application/json", Some(object)).await.unwrap();
    }

    /// Registers a node.
    pub(crate) async fn put_node(&self, node: &Value) {
        self.create(NODES, node).await;
    }

    /// Changes a node, but for its status.
    pub(crate) async fn merge(&self, name: &str, patch: &Value) {
        let path = format!("{NODES}/{name}");
        self.ask(Method::PATCH, &path, "application/merge-patch+json", Some(patch)).await.unwrap();
    }

    /// Sets an annotation of Flannel's or removes it.
    pub(crate) async fn annotate(&self, name: &str, key: &str, value: Option<&str>) {
        self.merge(name, &json!({"metadata": {"annotations": {format!("{PREFIX}/{key}"): value}}})).await;
    }

    /// Sets a condition, as kubelet does with each heartbeat.
    pub(crate) async fn condition(&self, name: &str, kind: &str, status: &str, at: &str) {
        let condition = json!({"type": kind, "status": status, "lastHeartbeatTime": at, "lastTransitionTime": at,
            "reason": "Tested", "message": "as the test wants it"});
        let patch = json!({"status": {"conditions": [condition]}});
        let path = format!("{NODES}/{name}/status");
        self.ask(Method::PATCH, &path, "application/strategic-merge-patch+json", Some(&patch)).await.unwrap();
    }

    pub(crate) async fn delete_node(&self, name: &str) {
        self.ask(Method::DELETE, &format!("{NODES}/{name}"), "application/json", None).await.unwrap();
    }

    /// A node as it is now.
    pub(crate) async fn node(&self, name: &str) -> Value {
        self.ask(Method::GET, &format!("{NODES}/{name}"), "application/json", None).await.unwrap()
    }

    /// Flannel's annotations of a node, without their prefix.
    pub(crate) async fn annotations(&self, name: &str) -> Vec<(String, String)> {
        let node = self.node(name).await;
        let all = node["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
        let ours = all.into_iter().filter_map(|(key, value)| {
            let name = key.strip_prefix(PREFIX)?.strip_prefix('/')?;
            Some((name.to_owned(), value.as_str()?.to_owned()))
        });
        ours.collect()
    }

    /// Waits until an annotation has this value.
    pub(crate) async fn sees(&self, node: &str, key: &str, value: &str) {
        self.until(&format!("{key}: {value}"), node, async |hand| {
            hand.annotations(node).await.iter().any(|(name, found)| name == key && found == value)
        })
        .await;
    }

    /// Waits until this holds.
    pub(crate) async fn until(&self, what: &str, node: &str, condition: impl AsyncFn(&Self) -> bool) {
        soon(&format!("{what} at {node}"), async {
            while !condition(self).await {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}
