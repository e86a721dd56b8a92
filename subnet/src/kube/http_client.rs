//! The HTTP client: what `kube` puts together by itself, over connections of our own ([`Stream`]) and without its tracing and repetition of
//! requests.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use hyper_util::rt::TokioExecutor;
use kube::client::{ClientBuilder, ConfigExt};
use kube::{Client, Config};
use tokio::time::timeout;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, service_fn};

use super::stream::Stream;

/// What is read at once at most: in a start among thousands of nodes a few reads more, and while heartbeats come less memory.
const READ_BUFFER: usize = 64 << 10;
/// How long a name server may take to tell which addresses were tried.
const NAME_WITHIN: Duration = Duration::from_secs(1);

/// A client for the server of `config`; nothing is sent yet.
pub(super) fn new(config: &Config) -> Result<Client, kube::Error> {
    with_resolver(config, GaiResolver::new())
}

fn with_resolver<R>(config: &Config, resolver: R) -> Result<Client, kube::Error>
where
    R: Service<Name, Response: Iterator<Item = SocketAddr>, Error: Into<BoxError>, Future: Send + 'static>,
    R: Clone + Send + Sync + 'static,
{
    let within = config.connect_timeout.unwrap_or(Duration::MAX);
    let mut http = HttpConnector::new_with_resolver(resolver);
    http.enforce_http(false);
    // The addresses of a name share this time, so that those behind one that drops packets are tried too. The rest is for the name and TLS.
    http.set_connect_timeout(config.connect_timeout.map(|within| within * 4 / 5));
    let https = config.rustls_https_connector_with_connector(http.map_response(Stream::new))?;
    let connect = service_fn(move |to: Uri| {
        let connecting = https.clone().oneshot(to.clone());
        Box::pin(async move {
            match timeout(within, connecting).await {
                Ok(Err(error)) if timed_out(&*error) => Err(no_answer(&to, within).await),
                Ok(connected) => connected,
                Err(_) => Err(no_answer(&to, within).await),
            }
        })
    });
    let http = legacy::Client::builder(TokioExecutor::new()).http1_max_buf_size(READ_BUFFER).build(connect);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service::<legacy::Client<_, kube::client::Body>>(http);
    Ok(ClientBuilder::new(service, config.default_namespace.clone()).build())
}

fn timed_out(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The error for a server from which nothing comes back, with all addresses that were tried.
async fn no_answer(to: &Uri, within: Duration) -> BoxError {
    let host = to.host().unwrap_or_default();
    let port = to.port_u16().unwrap_or(if to.scheme_str() == Some("http") { 80 } else { 443 });
    let bare = host.trim_matches(['[', ']']);
    let mut at = format!("{host}:{port}");
    if bare.parse::<std::net::IpAddr>().is_err()
        && let Ok(Ok(addresses)) = timeout(NAME_WITHIN, tokio::net::lookup_host((bare, port))).await
    {
        let addresses: Vec<String> = addresses.map(|address| address.ip().to_string()).collect();
        at = format!("{at} ({})", addresses.join(", "));
    }
    let why = format!(
        "no connection to {at} within {} s, since no packet comes back from there: look at routes and firewalls on the way, and at \
         --kube-api-url or server in --kubeconfig-file",
        within.as_secs()
    );
    io::Error::new(io::ErrorKind::TimedOut, why).into()
}

/// What an answer says that has no status of Kubernetes: its text, but of a web page what it means.
pub(super) fn plain_text(answer: &[u8]) -> String {
    if answer.trim_ascii_start().starts_with(b"<") {
        "a web page is the answer: what listens there is no API server, or a proxy that does not reach one; look at --kube-api-url \
         or server in --kubeconfig-file"
            .to_owned()
    } else {
        String::from_utf8_lossy(answer).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use http::Request;
    use kube::client::Body;
    use tokio::net::TcpSocket;

    use super::super::reason::{explain, in_words};
    use super::*;

    const DEAD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

    /// An address whose first packets are dropped: its queue of connections is full, and nobody accepts any.
    async fn drops_packets(port: u16) -> impl Sized {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((DEAD, port).into()).unwrap();
        let listener = socket.listen(0).unwrap();
        let at = (DEAD, port).into();
        let queue = tokio::task::spawn_blocking(move || {
            let mut queue = Vec::new();
            while let Ok(stream) = TcpStream::connect_timeout(&at, Duration::from_millis(300)) {
                queue.push(stream);
            }
            queue
        });
        (listener, queue.await.unwrap())
    }

    /// A client for a server whose name has these addresses.
    fn client(addresses: &'static [Ipv4Addr], port: u16, within: Duration) -> Client {
        crate::tls::install();
        let mut config = Config::new(format!("http://api.invalid:{port}").parse().unwrap());
        config.root_cert = Some(Vec::new());
        config.connect_timeout = Some(within);
        let resolver = service_fn(move |_: Name| {
            ready(Ok::<_, io::Error>(addresses.iter().map(|address| SocketAddr::from((*address, 0)))))
        });
        with_resolver(&config, resolver).unwrap()
    }

    fn request() -> Request<Body> {
        Request::get("/api/v1/nodes").body(Body::empty()).unwrap()
    }

    #[tokio::test]
    async fn the_second_address_of_a_name_is_reached_when_the_first_drops_packets() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 2048]).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        });
        let _dead = drops_packets(port).await;
        let client = client(&[DEAD, Ipv4Addr::LOCALHOST], port, Duration::from_secs(10));
        assert_eq!(client.send(request()).await.unwrap().status(), 200);
        server.join().unwrap();
    }

    #[tokio::test]
    async fn a_server_from_which_no_packet_comes_back_is_named_with_the_remedy() {
        let free = TcpListener::bind((DEAD, 0)).unwrap().local_addr().unwrap().port();
        let _dead = drops_packets(free).await;
        let error = client(&[DEAD, DEAD], free, Duration::from_secs(2)).send(request()).await.unwrap_err();
        let (refused, why) = in_words(&explain(&error));
        assert!(
            !refused && why.starts_with(&format!("no connection to api.invalid:{free} within 2 s")),
            "{why}"
        );
        assert!(why.contains(": look at routes and firewalls on the way"), "{why}");
    }
}
