//! A cluster of one API server that follows a script, and the stores of its nodes.

use std::sync::Arc;
use std::time::Duration;

use subnet::kube::{Kube, KubeOptions};
use subnet::testing::{ApiServer, Request};
use tempfile::TempDir;

pub(crate) use crate::common::{
    DUAL, Follower, MAC, PREFIX, Task, VXLAN, acquire, acquire_v4, not_while, public, soon, spawn, vxlan,
};

pub(crate) struct Bed {
    pub(crate) server: ApiServer,
    directory: TempDir,
}

impl Bed {
    pub(crate) fn new(config: &str) -> Self {
        let bed = Self {
            server: ApiServer::local().unwrap(),
            directory: tempfile::Builder::new().prefix("flannel-test-kube-").tempdir().unwrap(),
        };
        bed.write("net-conf.json", config);
        bed
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> std::path::PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn options(&self, name: &str) -> KubeOptions {
        KubeOptions {
            node_name: Some(name.to_owned()),
            pod: None,
            kubeconfig: None,
            api_url: Some(self.server.url()),
            annotation_prefix: PREFIX.into(),
            net_config_path: self.directory.path().join("net-conf.json"),
            set_network_unavailable: true,
        }
    }

    pub(crate) async fn store(&self, name: &str) -> Arc<Kube> {
        Arc::new(Kube::new(self.options(name)).await.unwrap())
    }

    /// The patches so far.
    pub(crate) fn patches(&self) -> Vec<Request> {
        self.server.requests().into_iter().filter(|request| request.method == "PATCH").collect()
    }

    /// Their bodies, with `f` instead of the annotations' prefix.
    pub(crate) fn bodies(&self) -> Vec<String> {
        self.patches().into_iter().map(|request| request.body.replace(PREFIX, "f")).collect()
    }

    pub(crate) fn annotation(&self, node: &str, name: &str) -> Option<String> {
        let node = self.server.node(node)?;
        Some(node["metadata"]["annotations"][format!("{PREFIX}/{name}")].as_str()?.to_owned())
    }

    pub(crate) fn annotate(&self, node: &str, name: &str, value: Option<&str>) {
        self.server.annotate(node, &format!("{PREFIX}/{name}"), value);
    }
}

/// Waits until this holds of something that can't be waited for.
pub(crate) async fn poll(what: &str, mut condition: impl FnMut() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
