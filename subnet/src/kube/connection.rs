//! The way to the API server: where it is, how to be let in, requests, and what its errors mean to us.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::BodyExt;
use kube::client::Body;
use kube::config::AuthInfo;
use kube::{Client, Config};
use serde::Deserialize;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};

use super::kubeconfig::{KubeCluster, Kubeconfig};
use super::reason::{explain, in_words};
use super::{credentials, exec, http_client, kubeconfig};
use crate::store::StoreError;
use crate::text::{shortened, shortened_to};

/// After this long without an answer a request has failed. Generous, because a listing of a large
/// cluster takes its time on the server too.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Parts of one answer follow each other faster than this.
pub(super) const PART_WITHIN: Duration = Duration::from_secs(30);
/// Credentials that were read this long ago may be others by now: kubelet replaces tokens, plugins give them an end.
const MAY_BE_RENEWED: Duration = Duration::from_secs(30);
/// How much of an error's text is read.
const ERROR_TEXT: usize = 64 << 10;

/// Asks for whole objects.
pub(super) const OBJECTS: &str = "application/json";
/// Asks for the metadata of objects alone, in protobuf or else in JSON. A server that can't do that sends whole objects.
pub(super) const METADATA: &str = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,\
     application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";
/// The same without protobuf.
pub(super) const METADATA_IN_JSON: &str =
    "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";
/// How an answer in protobuf is called, without its parameters.
pub(super) const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) struct Failure {
    /// The HTTP status, if there was an answer; 0 otherwise.
    pub(super) status: u16,
    pub(super) error: StoreError,
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

/// Requests to the API server.
pub(super) struct Connection {
    source: Source,
    /// The store in words.
    pub(super) described: String,
    client: Mutex<Option<Made>>,
    /// Counts how often they have changed.
    moves: watch::Sender<u64>,
}

/// A client with the credentials that there were.
struct Made {
    client: Client,
    at: Instant,
    /// How often this node's addresses had changed when it was made.
    moves: u64,
}

/// What is known about the way to the API server.
struct Source {
    kubeconfig: Option<PathBuf>,
    url: Option<http::Uri>,
}

impl Connection {
    /// Reads how to reach the API server; nothing is sent yet.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] naming the option or the file.
    pub(super) async fn new(kubeconfig: Option<PathBuf>, url: Option<&str>) -> Result<Self, StoreError> {
        crate::tls::install();
        let url = url.filter(|url| !url.is_empty()).map(address).transpose();
        let url = url.map_err(|why| StoreError::Unusable(format!("--kube-api-url: {why}")))?;
        let source = Source { kubeconfig, url };
        let config = source.config().await?;
        let described = format!("Kubernetes at {}", config.cluster_url);
        let made = Made { client: client(&config)?, at: Instant::now(), moves: 0 };
        let client = Mutex::new(Some(made));
        let described = described.trim_end_matches('/').to_owned();
        Ok(Self { source, described, client, moves: watch::Sender::new(0) })
    }

    /// This node has other addresses: nothing is heard any more on connections from the old ones. What is
    /// under way on them fails at once.
    pub(super) fn readdressed(&self) {
        self.moves.send_modify(|moves| *moves += 1);
    }

    /// Reads one object.
    pub(super) async fn get(&self, path: &str) -> Result<Vec<u8>, Failure> {
        let answer = self.send(Method::GET, path, OBJECTS, None).await?;
        self.whole(answer).await
    }

    /// Changes one object by a strategic merge patch.
    pub(super) async fn patch(&self, path: &str, patch: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let content = Some(("application/strategic-merge-patch+json", patch));
        let answer = self.send(Method::PATCH, path, OBJECTS, content).await?;
        self.whole(answer).await
    }

    /// Creates one object.
    pub(super) async fn post(&self, path: &str, object: Vec<u8>) -> Result<(), Failure> {
        let answer = self.send(Method::POST, path, OBJECTS, Some(("application/json", object))).await?;
        self.whole(answer).await.map(drop)
    }

    /// Tells of each change of this node's addresses.
    pub(super) fn moves(&self) -> watch::Receiver<u64> {
        self.moves.subscribe()
    }

    /// Sends a request; once more if the credentials are refused and may have been renewed since they were read.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &'static str,
        content: Option<(&'static str, Vec<u8>)>,
    ) -> Result<Response<Body>, Failure> {
        let begun = Instant::now();
        let read = self.client.lock().await.as_ref().map(|made| made.at);
        match self.attempt(method.clone(), path, accept, content.clone()).await {
            Err(failure) if failure.status == 401 && read.is_some_and(|at| begun - at >= MAY_BE_RENEWED) => {
                self.attempt(method, path, accept, content).await
            }
            outcome => outcome,
        }
    }

    async fn attempt(
        &self,
        method: Method,
        path: &str,
        accept: &'static str,
        content: Option<(&'static str, Vec<u8>)>,
    ) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder().method(method).uri(path).header(header::ACCEPT, accept);
        let body = match content {
            None => Body::empty(),
            Some((kind, content)) => {
                request = request.header(header::CONTENT_TYPE, kind);
                Body::from(content)
            }
        };
        let request = request.body(body).map_err(|error| self.away(error.to_string()))?;
        let mut moves = self.moves();
        let client = tokio::select! {
            biased;
            client = self.client() => client?,
            _ = moves.changed() => return Err(self.moved()),
        };
        let answer = tokio::select! {
            biased;
            answer = timeout(ANSWER_WITHIN, client.send(request)) => answer,
            _ = moves.changed() => return Err(self.moved()),
        };
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(self.meaning(&error)),
            Err(_) => return Err(self.away(format!("no answer within {} s", ANSWER_WITHIN.as_secs()))),
        };
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let text = self.error_text(answer.into_body()).await;
        if status == http::StatusCode::UNAUTHORIZED {
            // Perhaps the credentials were renewed since they were read.
            self.client.lock().await.take();
        }
        Err(self.refusal(status.as_u16(), path, &text))
    }

    async fn client(&self) -> Result<Client, Failure> {
        let mut current = self.client.lock().await;
        let moves = *self.moves.borrow();
        if let Some(made) = current.as_ref().filter(|made| made.moves == moves) {
            return Ok(made.client.clone());
        }
        let new = async { client(&self.source.config().await?) };
        let client = new.await.map_err(|error: StoreError| Failure { status: 0, error })?;
        *current = Some(Made { client: client.clone(), at: Instant::now(), moves });
        Ok(client)
    }

    async fn whole(&self, answer: Response<Body>) -> Result<Vec<u8>, Failure> {
        match timeout(PART_WITHIN, answer.into_body().collect()).await {
            Ok(Ok(whole)) => Ok(whole.to_bytes().to_vec()),
            Ok(Err(error)) => Err(self.meaning(&error)),
            Err(_) => Err(self.away("an answer has no end".into())),
        }
    }

    async fn error_text(&self, mut body: Body) -> Vec<u8> {
        let mut text = Vec::new();
        while let Ok(Some(Ok(frame))) = timeout(PART_WITHIN, body.frame()).await
            && text.len() < ERROR_TEXT
        {
            text.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        }
        text
    }

    /// What it means that the server answers with this status.
    fn refusal(&self, status: u16, path: &str, text: &[u8]) -> Failure {
        #[derive(Default, Deserialize)]
        struct Status {
            #[serde(default)]
            message: String,
        }
        let message = serde_json::from_slice::<Status>(text).unwrap_or_default().message;
        let message = if message.is_empty() { http_client::plain_text(text) } else { message };
        let message = shortened_to(&message, 500);
        let store = self.described.clone();
        let error = match status {
            401 => StoreError::Denied {
                store,
                why: format!(
                    "{message} (401): the token or the certificate that flanneld has is not accepted; look at its service \
                     account or at --kubeconfig-file"
                ),
            },
            403 => StoreError::Denied { store, why: format!("{message} (403): {}", missing_right(path)) },
            404 | 408..=410 | 429 | 500.. => {
                StoreError::Unreachable { store, why: format!("{message} ({status})") }
            }
            _ => StoreError::Unusable(format!("{store} refuses a request: {message} ({status})")),
        };
        Failure { status, error }
    }

    /// The failure of a request that got no answer.
    pub(super) fn away(&self, why: String) -> Failure {
        Failure { status: 0, error: StoreError::Unreachable { store: self.described.clone(), why } }
    }

    /// The failure of what was under way when the node's addresses changed.
    pub(super) fn moved(&self) -> Failure {
        self.away("this node's addresses have changed".into())
    }

    /// What an error of the client means.
    pub(super) fn meaning(&self, error: &kube::Error) -> Failure {
        let (denied, why) = in_words(&explain(error));
        if denied || matches!(error, kube::Error::Auth(_)) {
            let error = StoreError::Denied { store: self.described.clone(), why };
            return Failure { status: 0, error };
        }
        self.away(why)
    }
}

impl Source {
    /// The same order as Go flannel: a kubeconfig or an address, or else the pod's own account.
    async fn config(&self) -> Result<Config, StoreError> {
        let mut config = match (&self.kubeconfig, &self.url) {
            (Some(path), url) => config_of_file(path, url.as_ref()).await?,
            (None, Some(url)) => Config::new(url.clone()),
            (None, None) => Config::incluster().map_err(|error| {
                StoreError::Unusable(format!(
                    "this is not a pod with a service account ({}): give --kubeconfig-file or --kube-api-url, or run \
                     flanneld as the pod of a DaemonSet",
                    explain(&error)
                ))
            })?,
        };
        if config.cluster_url.scheme_str() == Some("http") {
            // No certificate is to be trusted, so there need not be a list of authorities: there is none in a
            // small image.
            config.root_cert = Some(Vec::new());
            config.root_cert_file = None;
        }
        credentials::read_token(&mut config.auth_info).map_err(|why| {
            let source = self
                .kubeconfig
                .as_ref()
                .map_or("service account".into(), |path| format!("--kubeconfig-file {}", path.display()));
            StoreError::Unusable(format!("{source}: {why}"))
        })?;
        config.connect_timeout = Some(Duration::from_secs(10));
        // Retries are paced by those who know what they wait for.
        config.default_retry = false;
        let agent = concat!("flanneld/", env!("CARGO_PKG_VERSION"));
        config.headers.push((header::USER_AGENT, HeaderValue::from_static(agent)));
        Ok(config)
    }
}

/// What a kubeconfig file says, with the credentials of its programs; at `url` if that is given.
async fn config_of_file(path: &Path, url: Option<&http::Uri>) -> Result<Config, StoreError> {
    let refused = |why: String| StoreError::Unusable(format!("--kubeconfig-file {}: {why}", path.display()));
    let Kubeconfig { cluster, mut user } = kubeconfig::read(path).map_err(refused)?;
    if cluster.proxy.is_some() {
        return Err(refused(
            "proxy-url is not supported: remove it, and give the address by which this node reaches the API \
             server itself"
                .into(),
        ));
    }
    let url = match url {
        Some(url) => url.clone(),
        None => server(&cluster, &user).map_err(refused)?,
    };
    let authorities = credentials::authorities(&cluster).map_err(refused)?;
    exec::credentials(&mut user).await.map_err(refused)?;
    credentials::check(&user).map_err(refused)?;
    let mut config = Config::new(url);
    config.root_cert = authorities;
    config.accept_invalid_certs = cluster.skip_verify;
    config.tls_server_name = cluster.server_name;
    config.auth_info = user;
    Ok(config)
}

/// The address of a cluster's API server.
fn server(cluster: &KubeCluster, user: &AuthInfo) -> Result<http::Uri, String> {
    let Some(server) = &cluster.server else {
        return Err("its cluster has no server: give https://HOST:PORT".into());
    };
    // As in Go, what only TLS needs asks for TLS.
    let certificates = [&cluster.authority, &cluster.authority_data];
    let certificates =
        certificates.into_iter().chain([&user.client_certificate, &user.client_certificate_data]);
    let tls = cluster.skip_verify || certificates.into_iter().any(Option::is_some);
    let full = if tls && !server.contains("://") { format!("https://{server}") } else { server.clone() };
    address(&full).map_err(|why| format!("server: {why}"))
}

fn client(config: &Config) -> Result<Client, StoreError> {
    http_client::new(config).map_err(|error| {
        StoreError::Unusable(format!(
            "Kubernetes at {} can't be asked: {}",
            config.cluster_url,
            explain(&error)
        ))
    })
}

/// The remedy where a request for `path` is not allowed.
fn missing_right(path: &str) -> &'static str {
    let path = path.split('?').next().unwrap_or_default();
    let policies =
        path.ends_with("/networkpolicies") || path.ends_with("/pods") || path.ends_with("/namespaces");
    if policies {
        "with --network-policy the ClusterRole of flanneld has to allow get, list and watch of networkpolicies, namespaces \
         and pods: apply kube-flannel-network-policy.yml, or start flanneld with --network-policy=off"
    } else {
        "the ClusterRole of flanneld has to allow list and watch of nodes and patch of nodes/status, and without \
         NODE_NAME also get of pods"
    }
}

/// `--kube-api-url`, checked.
///
/// # Errors
/// What is wrong with it, without a password that may be in it, and the form that it needs.
pub(super) fn address(text: &str) -> Result<http::Uri, String> {
    let wrong = || {
        // What stands before an @ may be a password.
        let shown = shortened(text.rsplit('@').next().unwrap_or_default());
        format!("{shown:?} is not an address: give http://HOST:PORT or https://HOST:PORT")
    };
    // Go takes an address without a scheme for http.
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let url: http::Uri = full.parse().map_err(|_| wrong())?;
    let plain = matches!(url.scheme_str(), Some("http" | "https")) && !full.contains('@');
    if plain && url.host().is_some_and(|host| !host.is_empty()) { Ok(url) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_without_a_scheme_has_that_of_what_else_is_said() {
        let nobody = AuthInfo::default();
        let certified = AuthInfo { client_certificate: Some("/c".into()), ..AuthInfo::default() };
        let at = |server: &str| KubeCluster { server: Some(server.into()), ..KubeCluster::default() };
        let skipping = |server: &str| KubeCluster { skip_verify: true, ..at(server) };
        let trusting = |server: &str| KubeCluster { authority: Some("/a".into()), ..at(server) };
        for (cluster, user, url) in [
            (at("https://[fd00::1]:6443"), &nobody, Ok("https://[fd00::1]:6443/")),
            (at("http://10.0.0.1:8080/k8s/c-1"), &certified, Ok("http://10.0.0.1:8080/k8s/c-1")),
            (at("10.0.0.1:8080"), &nobody, Ok("http://10.0.0.1:8080/")),
            (at("10.0.0.1:6443"), &certified, Ok("https://10.0.0.1:6443/")),
            (skipping("api"), &nobody, Ok("https://api/")),
            (trusting("api"), &nobody, Ok("https://api/")),
            (KubeCluster::default(), &nobody, Err("no server")),
            (at("ftp://10.0.0.1"), &nobody, Err("server: \"ftp://10.0.0.1\" is not an address")),
            (at("https://me:secret@10.0.0.1"), &nobody, Err("HOST:PORT")),
        ] {
            match (server(&cluster, user), url) {
                (Ok(read), Ok(url)) => assert_eq!(read.to_string(), url),
                (Err(error), Err(part)) => {
                    assert!(error.contains(part) && !error.contains("secret"), "{error}");
                }
                (read, url) => panic!("{read:?} instead of {url:?}"),
            }
        }
    }

    #[test]
    fn addresses_are_checked_and_passwords_are_not_shown() {
        assert_eq!(address("10.0.0.1:8080").unwrap().to_string(), "http://10.0.0.1:8080/");
        assert_eq!(address("https://[fd00::1]:6443").unwrap().to_string(), "https://[fd00::1]:6443/");
        for text in ["ftp://10.0.0.1", "http://", "https://root:hunter2@10.0.0.1", "a b"] {
            let error = address(text).unwrap_err();
            assert!(error.contains("https://HOST:PORT") && !error.contains("hunter2"), "{error}");
        }
    }
}
