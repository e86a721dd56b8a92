//! What is decided elsewhere: the configuration, and this node's public addresses in the store.

use std::sync::Arc;
use std::time::Duration;

use subnet::{LeaseStore, NetworkConfig, PublicAddrs};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::claim;
use super::task::Task;

/// Time between attempts to read what is known to have changed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Something that was decided elsewhere.
pub(super) enum NewsItem {
    /// The configuration was read again, or can't be used.
    Configuration(Box<Result<NetworkConfig, String>>),
    /// The public addresses that the store gives to this node.
    Public(PublicAddrs),
}

/// What is heard of others' decisions, from tasks that end with it.
#[derive(Default)]
pub(super) struct News {
    told: Option<mpsc::Receiver<NewsItem>>,
    _tasks: Vec<Task<()>>,
}

impl News {
    /// Begins to listen.
    pub(super) fn of<S: LeaseStore>(store: &Arc<S>) -> Self {
        let (tell, told) = mpsc::channel(1);
        let configuration = watch_configuration(Arc::clone(store), tell.clone());
        let public = watch_public(Arc::clone(store), tell);
        Self { told: Some(told), _tasks: vec![Task::spawn(configuration), Task::spawn(public)] }
    }

    pub(super) async fn next(&mut self) -> NewsItem {
        if let Some(told) = &mut self.told
            && let Some(news) = told.recv().await
        {
            return news;
        }
        std::future::pending().await
    }
}

async fn watch_configuration<S: LeaseStore>(store: Arc<S>, tell: mpsc::Sender<NewsItem>) {
    loop {
        let read = loop {
            match store.network().await {
                Ok(network) => break Ok(network),
                Err(error) if claim::is_away(&error) => {
                    tracing::debug!(%error, "the configuration can't be read again yet");
                    sleep(RETRY_INTERVAL).await;
                }
                Err(error) => break Err(error.to_string()),
            }
        };
        if tell.send(NewsItem::Configuration(Box::new(read))).await.is_err() {
            return;
        }
        store.network_changed().await;
    }
}

async fn watch_public<S: LeaseStore>(store: Arc<S>, tell: mpsc::Sender<NewsItem>) {
    loop {
        let public = loop {
            match store.node_public().await {
                Ok(public) => break public,
                Err(error) => {
                    tracing::debug!(%error, "what the store says about this node can't be read yet")
                }
            }
            sleep(RETRY_INTERVAL).await;
        };
        if tell.send(NewsItem::Public(public)).await.is_err() {
            return;
        }
        store.stirred().await;
    }
}
