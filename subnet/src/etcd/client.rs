//! The connection to etcd: endpoints, TLS, passwords, and what its errors mean to us.
//!
//! One endpoint is used at a time and the next one after a failure: tonic balances over several by
//! sending a share of the requests to each, dead ones included.

use std::collections::BTreeSet;
use std::error::Error;
use std::future::Future;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use super::EtcdOptions;
use super::reason::{self, Reason};
use super::tls::Tls;
use crate::store::{StoreError, random_below, with_causes};
use crate::text::{shortened, shortened_to};

/// After this long without an answer a request has failed.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A name server that knows a name tells it sooner than this.
const NAME_WITHIN: Duration = Duration::from_secs(1);
/// A connection that is silent is probed this often; etcd's server forbids less than 5 s.
const PROBE_EVERY: Duration = Duration::from_secs(20);
/// A probe that is not answered for this long means that the connection is dead.
const PROBE_WITHIN: Duration = Duration::from_secs(10);

/// Requests to etcd. Connects when first used, and again after each failure.
pub(super) struct EtcdConnection {
    endpoints: Vec<String>,
    tls: Tls,
    user: Option<(String, String)>,
    prefix: String,
    /// The store in words, without secrets.
    pub(super) described: String,
    state: Mutex<State>,
    /// Counts how often this node's addresses have changed.
    moves: watch::Sender<u64>,
}

struct State {
    client: Option<Client>,
    /// The addresses that the client connected from were the latest at this count.
    moves: u64,
    /// Counts the clients, so that a late failure of an old one does not end a new one.
    generation: u64,
    /// Which endpoint is in use.
    endpoint: usize,
}

impl EtcdConnection {
    /// Checks the options; nothing is sent yet.
    pub(super) fn new(options: &EtcdOptions) -> Result<Self, StoreError> {
        crate::tls::install();
        let tls = Tls { cert: options.cert.clone(), key: options.key.clone(), ca: options.ca.clone() };
        let endpoints: Vec<String> = options
            .endpoints
            .iter()
            .map(|text| text.trim())
            .filter(|text| !text.is_empty())
            .map(|text| endpoint(text, tls.has_identity()))
            .collect::<Result<_, _>>()?;
        if endpoints.is_empty() {
            return Err(StoreError::Unusable(
                "no etcd endpoint is given: set --etcd-endpoints, for example http://127.0.0.1:2379".into(),
            ));
        }
        if endpoints.iter().any(|url| url.starts_with(HTTPS)) {
            tls.load()?;
        }
        let user = options.username.clone().filter(|name| !name.is_empty());
        let state = State { client: None, moves: 0, generation: 0, endpoint: random_below(endpoints.len()) };
        Ok(Self {
            described: format!("etcd at {}", endpoints.join(",")),
            endpoints,
            tls,
            prefix: options.prefix.clone(),
            user: user.map(|name| (name, options.password.clone().unwrap_or_default())),
            state: Mutex::new(state),
            moves: watch::Sender::new(0),
        })
    }

    /// This node has other addresses: nothing that is sent from an old one is answered any more, which TCP
    /// would find out after a quarter of an hour. What is under way fails or is sent again at once.
    pub(super) fn readdressed(&self) {
        self.moves.send_modify(|moves| *moves += 1);
    }

    /// Hears of every change of addresses from now on.
    pub(super) fn moves(&self) -> watch::Receiver<u64> {
        self.moves.subscribe()
    }

    /// Sends one request, to each endpoint in turn until one answers. It may be carried out twice.
    pub(super) async fn call<T, F>(&self, request: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut moves = self.moves();
        let mut failed: Vec<StoreError> = Vec::new();
        loop {
            match self.once(&request).await {
                Err(StoreError::Unreachable { .. }) if moves.has_changed().unwrap_or(false) => {
                    moves.mark_unchanged();
                    failed.clear();
                }
                Err(error @ (StoreError::Unreachable { .. } | StoreError::Denied { .. })) => {
                    failed.push(error);
                    if failed.len() >= self.endpoints.len() {
                        return Err(all_of(failed));
                    }
                }
                outcome => return outcome,
            }
        }
    }

    /// Sends one request once.
    pub(super) async fn once<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut moves = self.moves();
        let answer = async {
            let (client, generation, endpoint) = self.client().await?;
            let error = match timeout(ANSWER_WITHIN, request(client)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => self.understood(&error, &endpoint).await,
                Err(_) => self.silent(&endpoint).await,
            };
            self.failed(generation).await;
            Err(error)
        };
        tokio::select! {
            biased;
            outcome = answer => outcome,
            _ = moves.changed() => Err(self.unreachable("this node's addresses have changed".into())),
        }
    }

    /// The error for a server that keeps quiet, or a name server on the way to it.
    async fn silent(&self, endpoint: &str) -> StoreError {
        let authority = endpoint.rsplit("://").next().unwrap_or_default();
        if timeout(NAME_WITHIN, tokio::net::lookup_host(authority)).await.is_err() {
            return self.unreachable(format!(
                "the name in {endpoint} can't be resolved, for no name server answers: look at /etc/resolv.conf, or give an \
                 address in --etcd-endpoints"
            ));
        }
        self.unreachable(SILENT.to_owned())
    }

    /// Gives the client of this generation up, and its endpoint.
    async fn failed(&self, generation: u64) {
        let mut state = self.state.lock().await;
        if state.generation == generation && state.client.take().is_some() {
            state.endpoint = (state.endpoint + 1) % self.endpoints.len();
        }
    }

    async fn client(&self) -> Result<(Client, u64, String), StoreError> {
        let mut state = self.state.lock().await;
        let moves = *self.moves.borrow();
        if state.moves != moves {
            state.client = None;
            state.moves = moves;
        }
        if let Some(client) = &state.client {
            return Ok((client.clone(), state.generation, self.endpoints[state.endpoint].clone()));
        }
        let endpoint = self.endpoints[state.endpoint].as_str();
        match self.connect(endpoint).await {
            Ok(client) => {
                state.generation += 1;
                state.client = Some(client.clone());
                Ok((client, state.generation, endpoint.to_owned()))
            }
            Err(error) => {
                state.endpoint = (state.endpoint + 1) % self.endpoints.len();
                Err(error)
            }
        }
    }

    async fn connect(&self, endpoint: &str) -> Result<Client, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(5))
            .with_keep_alive(PROBE_EVERY, PROBE_WITHIN)
            // etcd ends connections that are probed without a request open.
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some(authority) = endpoint.strip_prefix(HTTPS) {
            // Read again each time: certificates are renewed under a running node.
            let mut tls = self.tls.load().map_err(|error| self.unreachable(error.to_string()))?;
            // A name in a certificate has no brackets.
            if let Some((literal, _)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
                tls = tls.domain_name(literal);
            }
            options = options.with_tls(tls);
        }
        let connect =
            async |options| match timeout(ANSWER_WITHIN, Client::connect([endpoint], Some(options))).await {
                Ok(Ok(client)) => Ok(client),
                Ok(Err(error)) => Err(self.understood(&error, endpoint).await),
                Err(_) => Err(self.silent(endpoint).await),
            };
        let Some((name, password)) = &self.user else { return connect(options).await };
        match connect(options.clone().with_user(name, password)).await {
            // Go's client goes on without the password too.
            Err(StoreError::Unreachable { why, .. }) if why.contains("authentication is not enabled") => {
                connect(options).await
            }
            outcome => outcome,
        }
    }

    /// What an error of a request means, found out by a connection of our own if it does not tell.
    async fn understood(&self, error: &etcd_client::Error, endpoint: &str) -> StoreError {
        let told = self.told(error, endpoint);
        let reason = match told {
            Some(reason) => Some(reason),
            None if is_of_transport(error) => reason::probed(endpoint, &self.tls).await,
            None => None,
        };
        match reason {
            Some(reason) => self.because(reason),
            None => self.unreachable(explain(error)),
        }
    }

    /// What an error of the client means, as far as it tells.
    pub(super) fn meaning(&self, error: &etcd_client::Error) -> StoreError {
        match self.told(error, &self.endpoints.join(",")) {
            Some(reason) => self.because(reason),
            None => self.unreachable(explain(error)),
        }
    }

    fn told(&self, error: &etcd_client::Error, endpoint: &str) -> Option<Reason> {
        let identified = self.tls.has_identity();
        match error {
            etcd_client::Error::GRpcStatus(status) => {
                let user = self.user.as_ref().map(|(name, _)| name.as_str());
                reason::of_status(status.code() as i32, status.message(), user, &self.prefix)
                    .or_else(|| reason::plain(status, endpoint, identified))
            }
            etcd_client::Error::TransportError(error) => reason::plain(error, endpoint, identified),
            _ => None,
        }
    }

    fn because(&self, reason: Reason) -> StoreError {
        match reason {
            Reason::Refused(why) => StoreError::Denied { store: self.described.clone(), why },
            Reason::Away(why) => self.unreachable(why),
        }
    }

    /// What the reason means that etcd gives for ending a watch.
    pub(super) fn cancelled(&self, reason: &str) -> StoreError {
        let user = self.user.as_ref().map(|(name, _)| name.as_str());
        if reason.contains("permission denied") {
            return self.because(Reason::Refused(reason::denied(user, &self.prefix)));
        }
        if ["auth token", "user name"].iter().any(|text| reason.contains(text)) {
            let told = reason::of_status(16, reason, user, &self.prefix);
            return self.because(told.unwrap_or(Reason::Refused(shortened(reason))));
        }
        let reason = if reason.is_empty() { "the watch was cancelled" } else { reason };
        self.unreachable(shortened_to(reason, 200))
    }

    /// Whether etcd may refuse this node something that it was allowed before.
    pub(super) fn may_refuse(&self) -> bool {
        self.user.is_some() || self.tls.has_identity()
    }

    /// The error for a store that can't be used at the moment.
    pub(super) fn unreachable(&self, why: String) -> StoreError {
        StoreError::Unreachable { store: self.described.clone(), why }
    }
}

/// One error for what several members have to say: the same at each attempt, whichever of them was asked first. A
/// refusal tells more than silence.
fn all_of(failed: Vec<StoreError>) -> StoreError {
    let refused = failed.iter().any(|error| matches!(error, StoreError::Denied { .. }));
    let (mut reasons, mut at) = (BTreeSet::new(), String::new());
    for error in failed {
        match error {
            StoreError::Denied { store, why } => {
                at = store;
                reasons.insert(why);
            }
            StoreError::Unreachable { store, why } => {
                at = store;
                if !refused {
                    reasons.insert(why);
                }
            }
            other => return other,
        }
    }
    let why = reasons.into_iter().collect::<Vec<_>>().join("; ");
    if refused { StoreError::Denied { store: at, why } } else { StoreError::Unreachable { store: at, why } }
}

/// Whether a connection broke, or never came about: who says so may not know why.
fn is_of_transport(error: &etcd_client::Error) -> bool {
    match error {
        etcd_client::Error::TransportError(_) => true,
        // gRPC's codes: 1 cancelled, 2 unknown, 13 internal, 14 unavailable. What etcd itself says begins so.
        etcd_client::Error::GRpcStatus(status) => {
            matches!(status.code() as i32, 1 | 2 | 13 | 14) && !status.message().starts_with("etcdserver")
        }
        _ => false,
    }
}

const HTTP: &str = "http://";
const HTTPS: &str = "https://";

/// An endpoint with its scheme. Without one, TLS is used if this node has a certificate, as Go does.
fn endpoint(text: &str, has_identity: bool) -> Result<String, StoreError> {
    let wrong = |why| {
        // What stands before an @ may be a password.
        let shown = shortened(text.rsplit('@').next().unwrap_or_default());
        StoreError::Unusable(format!(
            "--etcd-endpoints: {shown:?} {why}: give http://HOST:PORT or https://HOST:PORT"
        ))
    };
    if text.contains('@') {
        return Err(wrong("has a user before it, which belongs into --etcd-username"));
    }
    let url = match text.split_once("://") {
        None => format!("{}{text}", if has_identity { HTTPS } else { HTTP }),
        Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
            scheme @ ("http" | "https") => format!("{scheme}://{rest}"),
            "unix" | "unixs" => return Err(wrong("is a unix socket, which flanneld can't use")),
            _ => return Err(wrong("has an unknown scheme")),
        },
    };
    let authority = url.split_once("://").map_or("", |(_, rest)| rest.trim_end_matches('/'));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]%".contains(c);
    if authority.is_empty() || !authority.chars().all(plain) {
        return Err(wrong("is not an address"));
    }
    Ok(url.trim_end_matches('/').to_owned())
}

/// What went wrong: tonic hides the cause behind "transport error", and a status has more than its message.
fn explain(error: &etcd_client::Error) -> String {
    let text = match error {
        etcd_client::Error::GRpcStatus(status) => with_causes(status.message().to_owned(), status.source()),
        etcd_client::Error::TransportError(error) => with_causes(error.to_string(), error.source()),
        error => error.to_string(),
    };
    // The client's libraries tell of silence and of the end of a connection in many words, and in others each time.
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    if has(&["deadline has elapsed", "timed out", "Timeout expired"]) && !text.starts_with("etcdserver") {
        return SILENT.to_owned();
    }
    if has(&["broken pipe", "connection reset", "operation was canceled", "tls handshake eof"]) {
        return "the connection broke off".to_owned();
    }
    shortened_to(&text, 300)
}

/// What is said of a server that keeps quiet.
const SILENT: &str = "it keeps silent: look at etcd and at the network in between";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_decides_about_tls_and_a_certificate_only_where_there_is_none() {
        let url = |text, identity| endpoint(text, identity).unwrap();
        assert_eq!(url("http://10.0.0.1:2379", true), "http://10.0.0.1:2379");
        assert_eq!(url("https://etcd.example:2379/", false), "https://etcd.example:2379");
        assert_eq!(url("[fd00::1]:2379", false), "http://[fd00::1]:2379");
        assert_eq!(url("etcd:2379", true), "https://etcd:2379");
        assert_eq!(url("HTTPS://etcd:2379//", false), "https://etcd:2379");
    }

    #[test]
    fn wrong_endpoints_are_named_without_their_password() {
        for (text, part) in [
            ("ftp://10.0.0.1", "unknown scheme"),
            ("unix:///run/etcd.sock", "unix socket"),
            ("http://", "is not an address"),
            ("http://a b:1", "is not an address"),
            ("http://root:hunter2@etcd:2379", "etcd:2379"),
        ] {
            let error = endpoint(text, false).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("hunter2"), "{error}");
        }
    }
}
