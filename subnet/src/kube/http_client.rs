//! The HTTP client: what `kube` puts together by itself, over connections of our own ([`Stream`]) and without its tracing and repetition of
//! requests.

use std::io;
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{ClientBuilder, ConfigExt};
use kube::{Client, Config};
use tokio::time::timeout;
use tower::{BoxError, ServiceBuilder, ServiceExt, service_fn};

use super::stream::Stream;

/// What is read at once at most: in a start among thousands of nodes a few reads more, and while heartbeats come less memory.
const READ_BUFFER: usize = 64 << 10;

/// A client for the server of `config`; nothing is sent yet.
pub(super) fn new(config: &Config) -> Result<Client, kube::Error> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    let https = config.rustls_https_connector_with_connector(http.map_response(Stream::new))?;
    let within = config.connect_timeout.unwrap_or(Duration::MAX);
    let connect = service_fn(move |to: Uri| {
        let connecting = https.clone().oneshot(to);
        Box::pin(async move {
            match timeout(within, connecting).await {
                Ok(connected) => connected,
                Err(_) => {
                    let why = format!("no connection within {} s", within.as_secs());
                    Err(io::Error::new(io::ErrorKind::TimedOut, why).into())
                }
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
