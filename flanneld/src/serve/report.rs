//! `/metrics`, `/status` and `/peers`: views of how this node stands, made on a thread that may block.

use std::net::IpAddr;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Response, StatusCode};
use tokio::sync::Semaphore;

use super::{Health, response, text};
use crate::status::{Depth, metrics};

/// So many are put together at a time; others wait. The agent's own work goes on threads of the same pool.
const AT_ONCE: usize = 2;

static TURNS: Semaphore = Semaphore::const_new(AT_ONCE);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resource {
    Metrics,
    Status(Depth),
    Peers,
}

impl Resource {
    /// The view at this path.
    pub(super) fn of(path: &str, query: Option<&str>) -> Option<Self> {
        Some(match (path, query) {
            ("/metrics", _) => Self::Metrics,
            ("/status", Some("look")) => Self::Status(Depth::Kernel),
            ("/status", _) => Self::Status(Depth::Known),
            ("/peers", _) => Self::Peers,
            _ => return None,
        })
    }
}

/// Everybody may scrape; what names nodes and addresses is for this host and the nodes of the cluster.
pub(super) async fn answer(health: &Health, view: Resource, client: IpAddr) -> Response<Full<Bytes>> {
    if view != Resource::Metrics && !health.board().published().sources.admit(client) {
        return text(StatusCode::FORBIDDEN, "only this host and the nodes of the cluster may ask for this\n");
    }
    let turn = TURNS.acquire().await;
    let health = health.clone();
    let made = tokio::task::spawn_blocking(move || match view {
        Resource::Metrics => metrics::text(health.status(Depth::Known)).into_bytes(),
        Resource::Status(depth) => serde_json::to_vec(&health.status(depth)).unwrap_or_default(),
        Resource::Peers => serde_json::to_vec(&health.peers()).unwrap_or_default(),
    });
    let made = made.await;
    drop(turn);
    let media_type = if view == Resource::Metrics { metrics::MEDIA_TYPE } else { "application/json" };
    match made {
        Ok(body) => response(StatusCode::OK, media_type, Bytes::from(body)),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the status could not be put together\n"),
    }
}
