//! `/healthz` and `/readyz` over HTTP: what an orchestrator decides by (contract §1.6); and `/metrics`, `/status` and
//! `/peers`: how this node stands.
//!
//! Bodies and codes of success are Flannel's; a failure says in JSON what is wrong. Clients can't exhaust
//! anything: there are few connections, each of them short, and the newest one counts.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

pub(crate) use health::Health;

mod health;
mod report;
#[cfg(test)]
mod tests;

/// A server that has its port and waits to be run.
#[derive(Debug)]
pub(crate) struct Server {
    listener: TcpListener,
    limits: Limits,
}

/// What a client can take at most.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Open connections; one more closes the oldest.
    connections: usize,
    /// Time for sending a request's head.
    head: Duration,
    /// Time for everything on one connection.
    connection: Duration,
    /// Time for answers that are due when the server is stopped.
    grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            head: Duration::from_secs(5),
            connection: Duration::from_secs(10),
            grace: Duration::from_secs(3),
        }
    }
}

/// The address can't be listened on.
#[derive(Debug, thiserror::Error)]
#[error("health can't be served on {at}: {source}: {remedy}")]
pub(crate) struct BindError {
    at: SocketAddr,
    remedy: String,
    source: io::Error,
}

impl BindError {
    fn new(at: SocketAddr, source: io::Error) -> Self {
        let port = at.port();
        let remedy = match source.kind() {
            io::ErrorKind::AddrInUse => format!(
                "another process holds the port, perhaps another flanneld (`ss -ltnp sport = :{port}` names it): \
                 stop it, or choose another --healthz-port"
            ),
            io::ErrorKind::AddrNotAvailable => {
                "no interface of this host has the address: give one that it has as --healthz-ip, or 0.0.0.0 for all"
                    .to_owned()
            }
            io::ErrorKind::PermissionDenied => {
                "choose a --healthz-port above 1023, or add the capability NET_BIND_SERVICE".to_owned()
            }
            _ => "choose another --healthz-ip or --healthz-port".to_owned(),
        };
        Self { at, remedy, source }
    }
}

impl Server {
    /// Takes the port. Clients wait from now on, and are answered by [`run`](Self::run).
    ///
    /// # Errors
    /// [`BindError`] with the remedy.
    pub(crate) async fn bind(at: SocketAddr) -> Result<Self, BindError> {
        let listener = listen(at).map_err(|error| BindError::new(at, error))?;
        Ok(Self { listener, limits: Limits::default() })
    }

    /// Where it listens; of interest when port 0 was asked for.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `stop` is there, and then for as long as answers are due, at most 3 s.
    pub(crate) async fn run(self, health: Health, stop: impl Future<Output = ()>) {
        let Self { listener, limits } = self;
        let (stopping, stopped) = watch::channel(());
        let mut connections = Connections::default();
        let mut complained: Option<Instant> = None;
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                Some(_) = connections.tasks.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, client)) => {
                        connections.make_room(limits.connections);
                        connections.add(serve(stream, client.ip(), health.clone(), limits, stopped.clone()));
                    }
                    Err(error) => {
                        if complained.is_none_or(|at| at.elapsed() > Duration::from_secs(60)) {
                            tracing::warn!(%error, "no connection to the health server can be accepted");
                            complained = Some(Instant::now());
                        }
                        // Out of file descriptors, most likely: the next attempt would fail at once.
                        sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        drop((listener, stopped));
        // The signal is that the sender is gone. Connections that outlive their time end with the set.
        drop(stopping);
        let finished = async { while connections.tasks.join_next().await.is_some() {} };
        if timeout(limits.grace, finished).await.is_err() {
            tracing::debug!("health connections were cut off");
        }
    }
}

/// A listener on this address; the unspecified one of either family means both families, as with Go, where
/// the host has IPv6.
fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    if at.ip().is_unspecified() {
        match listen_on((Ipv6Addr::UNSPECIFIED, at.port()).into()) {
            Err(error) if lacks_ipv6(&error) => {}
            outcome => return outcome,
        }
        return listen_on((Ipv4Addr::UNSPECIFIED, at.port()).into());
    }
    listen_on(at)
}

fn listen_on(at: SocketAddr) -> io::Result<TcpListener> {
    const BACKLOG: i32 = 1024;
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // A restart is not kept waiting by connections of the run before.
    socket.set_reuse_address(true)?;
    if at.is_ipv6() {
        // Independent of net.ipv6.bindv6only.
        socket.set_only_v6(!at.ip().is_unspecified())?;
    }
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Whether the kernel has no IPv6 (`ipv6.disable=1`).
fn lacks_ipv6(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = 97;
    error.raw_os_error() == Some(EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

/// The open connections, oldest first.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    order: VecDeque<AbortHandle>,
}

impl Connections {
    fn add(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        self.order.push_back(self.tasks.spawn(connection));
    }

    /// Closes the oldest connections rather than refuse the newest: somebody who holds all of them then
    /// can't keep an orchestrator from being answered, which would get this process killed.
    fn make_room(&mut self, limit: usize) {
        if self.order.len() >= limit {
            self.order.retain(|task| !task.is_finished());
        }
        while self.order.len() >= limit {
            let Some(oldest) = self.order.pop_front() else { return };
            oldest.abort();
        }
    }
}

/// One connection with one request.
async fn serve(
    stream: TcpStream,
    client: IpAddr,
    health: Health,
    limits: Limits,
    mut stopped: watch::Receiver<()>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let health = health.clone();
        async move {
            let (path, query) = (request.uri().path(), request.uri().query());
            let response = match report::Resource::of(path, query) {
                Some(view) => report::answer(&health, view, client).await,
                None => answer(&health, path, query),
            };
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .keep_alive(false)
        .max_buf_size(8192)
        .serve_connection(TokioIo::new(stream), service);
    let whole = async {
        tokio::pin!(connection);
        tokio::select! {
            result = connection.as_mut() => return result,
            _ = stopped.changed() => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    };
    if let Ok(Err(error)) = timeout(limits.connection, whole).await {
        tracing::trace!(%error, "a health connection failed");
    }
}

fn answer(health: &Health, path: &str, query: Option<&str>) -> Response<Full<Bytes>> {
    match path {
        "/readyz" if query == Some("verbose") => verbose(health),
        "/healthz" => match health.alive() {
            Ok(()) => text(StatusCode::OK, "flanneld is running"),
            Err(reason) => unavailable(&json!({ "alive": false, "reason": reason })),
        },
        "/readyz" => match health.ready() {
            Ok(()) => text(StatusCode::OK, "flanneld is ready"),
            Err(unmet) => {
                let reasons: Vec<_> = unmet
                    .iter()
                    .map(|(condition, reason)| json!({ "condition": condition, "reason": reason }))
                    .collect();
                unavailable(&json!({ "ready": false, "reasons": reasons }))
            }
        },
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

/// Every condition, met or not, and what else an operator should know.
fn verbose(health: &Health) -> Response<Full<Bytes>> {
    let (conditions, notes) = health.all();
    let ready = conditions.values().all(Result::is_ok);
    let conditions: serde_json::Map<_, _> = conditions
        .into_iter()
        .map(|(condition, state)| {
            (condition.to_owned(), state.err().unwrap_or_else(|| "met".to_owned()).into())
        })
        .collect();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "ready": ready, "conditions": conditions, "notes": notes });
    response(status, "application/json", Bytes::from(body.to_string()))
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", Bytes::from_static(body.as_bytes()))
}

fn unavailable(body: &serde_json::Value) -> Response<Full<Bytes>> {
    response(StatusCode::SERVICE_UNAVAILABLE, "application/json", Bytes::from(body.to_string()))
}

fn response(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
