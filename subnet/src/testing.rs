//! A Kubernetes API server that does as it is told, for tests, demo and bench; and how tests write programs.
//!
//! It knows nodes, namespaces, pods, network policies and events, and of the API what a Flannel agent uses: lists in pages, watches with
//! bookmarks, strategic merge patches, versions that are too old. It does not know users, admission or
//! etcd. Everything is in memory and gone with the value.

mod forms;
mod http;
mod nodes;
mod objects;
mod program;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

pub use nodes::{announced, fattened, node};
use objects::{Objects, Resource};
pub use program::write_program;

/// What the server does wrong, and how it does the rest.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Connections are closed as soon as they are made.
    pub down: bool,
    /// Requests are taken and not answered.
    pub silent: bool,
    /// What each request has to bring along.
    pub token: Option<String>,
    /// Requests that are refused.
    pub refusals: Vec<Refusal>,
    /// Lists stop after this many nodes until this is changed.
    pub lists_stop_after: Option<usize>,
    /// Lists in pages also where a real server answers from its cache, in one piece.
    pub always_pages: bool,
    /// No more nodes than this on a page, also when the client asks for more.
    pub largest_page: Option<usize>,
    /// How often each watch gets a bookmark; never, if there is none.
    pub bookmark_every: Option<Duration>,
    /// Every watch ends after this long.
    pub watches_end_after: Option<Duration>,
    /// Watches bring whole objects also where metadata was asked for.
    pub whole_objects: bool,
    /// Watches bring metadata in JSON also where protobuf was asked for.
    pub no_protobuf: bool,
    /// Watches in protobuf bring this instead of each event.
    pub garbled_protobuf: Option<&'static [u8]>,
    /// Any other form of an answer than whole objects is refused, as by a proxy: 406.
    pub no_other_form: bool,
}

/// Requests that are refused, and how.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// `GET`, `PATCH` or `POST`.
    pub method: &'static str,
    /// What the path and query contain.
    pub path: String,
    /// The HTTP status.
    pub status: u16,
    /// The message in the body.
    pub message: String,
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// `Content-Type`, or nothing.
    pub content_type: String,
    /// `Accept`, or nothing.
    pub accept: String,
    /// The body.
    pub body: String,
}

/// A server in a thread of its own, until it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    objects: Mutex<Objects>,
    requests: Mutex<Vec<Request>>,
    behaviour: watch::Sender<Behaviour>,
    /// The version of the last change.
    version: watch::Sender<u64>,
    /// Counts what ends connections: at each change all that are open do.
    connections: watch::Sender<u64>,
    /// Counts what deafens watches: at each change all that are open never say anything again.
    watches: watch::Sender<u64>,
    /// How many watches are open.
    watching: watch::Sender<usize>,
    stop: watch::Sender<bool>,
}

impl ApiServer {
    /// Serves on this socket, which may be in any network namespace.
    ///
    /// # Errors
    /// Of the operating system.
    pub fn start(listener: TcpListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            objects: Mutex::new(Objects::default()),
            requests: Mutex::new(Vec::new()),
            behaviour: watch::Sender::new(Behaviour::default()),
            version: watch::Sender::new(0),
            connections: watch::Sender::new(0),
            watches: watch::Sender::new(0),
            watching: watch::Sender::new(0),
            stop: watch::Sender::new(false),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("api-server".into())
            .spawn(move || runtime.block_on(http::serve(listener, serving)))?;
        Ok(Self { shared, address, thread: Some(thread) })
    }

    /// A server on a free port of the loopback device.
    ///
    /// # Errors
    /// Of the operating system.
    pub fn local() -> std::io::Result<Self> {
        Self::start(TcpListener::bind("127.0.0.1:0")?)
    }

    /// Where it is: `http://ADDRESS:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Creates a node, or replaces the one with the same name, however it likes.
    pub fn put_node(&self, node: Value) {
        self.change(|objects| objects.put(node));
    }

    /// Changes a node by hand; nothing happens if there is none of this name.
    pub fn edit_node(&self, name: &str, change: impl FnOnce(&mut Value)) {
        self.change(|objects| {
            if let Some(mut node) = objects.get(name) {
                change(&mut node);
                objects.put(node);
            }
        });
    }

    /// Sets an annotation of a node, or removes it.
    pub fn annotate(&self, name: &str, key: &str, value: Option<&str>) {
        let patch = json!({"metadata": {"annotations": {key: value}}});
        self.edit_node(name, |node| objects::merge(node, &patch));
    }

    /// What kubelet does every few minutes: the node changes and says nothing new.
    pub fn heartbeat(&self, name: &str) {
        self.change(|objects| objects.touch(name));
    }

    /// Removes a node.
    pub fn delete_node(&self, name: &str) {
        self.change(|objects| objects.remove(name));
    }

    /// A node as it is now.
    pub fn node(&self, name: &str) -> Option<Value> {
        self.objects().get(name)
    }

    /// The names of all nodes.
    pub fn names(&self) -> Vec<String> {
        self.objects().names()
    }

    /// Says on which node a pod of the host's network runs.
    pub fn put_pod(&self, namespace: &str, name: &str, node: &str) {
        let metadata = json!({"namespace": namespace, "name": name});
        self.put_pod_object(json!({"metadata": metadata, "spec": {"nodeName": node, "hostNetwork": true}}));
    }

    /// Creates a pod, or replaces the one with the same name.
    pub fn put_pod_object(&self, pod: Value) {
        self.change(|objects| objects.put_in(Resource::Pods, pod));
    }

    /// Removes a pod.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        self.change(|objects| objects.remove_from(Resource::Pods, &format!("{namespace}/{name}")));
    }

    /// Creates a namespace with these labels, or gives it these.
    pub fn put_namespace(&self, name: &str, labels: &[(&str, &str)]) {
        let mut labels: serde_json::Map<String, Value> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        labels.insert("kubernetes.io/metadata.name".into(), name.into());
        let namespace = json!({"metadata": {"name": name, "labels": labels}});
        self.change(|objects| objects.put_in(Resource::Namespaces, namespace));
    }

    /// Removes a namespace.
    pub fn delete_namespace(&self, name: &str) {
        self.change(|objects| objects.remove_from(Resource::Namespaces, name));
    }

    /// Creates a network policy with this `spec`, or replaces the one with the same name.
    pub fn put_policy(&self, namespace: &str, name: &str, spec: Value) {
        let policy = json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec});
        self.change(|objects| objects.put_in(Resource::Policies, policy));
    }

    /// Removes a network policy.
    pub fn delete_policy(&self, namespace: &str, name: &str) {
        self.change(|objects| objects.remove_from(Resource::Policies, &format!("{namespace}/{name}")));
    }

    /// Creates a Service with these addresses, or replaces the one with the same name.
    pub fn put_service(&self, namespace: &str, name: &str, addresses: &[&str]) {
        let spec = json!({"clusterIP": addresses.first(), "clusterIPs": addresses});
        let service = json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec});
        self.change(|objects| objects.put_in(Resource::Services, service));
    }

    /// The version of the last change.
    pub fn version(&self) -> u64 {
        self.objects().version()
    }

    /// Events that were created.
    pub fn events(&self) -> Vec<Value> {
        self.objects().events().to_vec()
    }

    /// Forgets all history: watches from an older version and lists that are under way can't go on.
    pub fn compact(&self) {
        self.objects().compact();
    }

    /// Changes how the server behaves.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        self.shared.behaviour.send_modify(change);
        if self.shared.behaviour.borrow().down {
            self.disconnect();
        }
    }

    /// Ends all connections.
    pub fn disconnect(&self) {
        self.shared.connections.send_modify(|count| *count += 1);
    }

    /// The watches that are open stay open and never say anything again, as behind a dead network path.
    pub fn deafen(&self) {
        self.shared.watches.send_modify(|count| *count += 1);
    }

    /// The requests so far, in their order.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests().clone()
    }

    /// How many watches are open at the moment.
    pub fn watching(&self) -> usize {
        *self.shared.watching.borrow()
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.shared.objects()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Objects) -> T) -> T {
        self.shared.change(change)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // The client that asked has seen a panic of the server.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn requests(&self) -> MutexGuard<'_, Vec<Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Objects) -> T) -> T {
        let mut objects = self.objects();
        let result = change(&mut objects);
        let version = objects.version();
        drop(objects);
        self.version.send_replace(version);
        result
    }
}
