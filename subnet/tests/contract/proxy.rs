//! A network path to a server that can be cut and mended.

use std::net::SocketAddr;
use std::sync::Mutex;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Forwards connections from an address of its own.
pub(crate) struct Proxy {
    from: SocketAddr,
    to: String,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Proxy {
    pub(crate) async fn new(to: String) -> Self {
        let from = format!("{}:2379", super::etcd_server::own_address()).parse().unwrap();
        let proxy = Self { from, to, task: Mutex::new(None) };
        proxy.mend().await;
        proxy
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.from)
    }

    /// Ends all connections and refuses new ones.
    pub(crate) async fn cut(&self) {
        let task = self.task.lock().unwrap().take();
        if let Some(task) = task {
            task.abort();
            let _ = task.await;
        }
    }

    pub(crate) async fn mend(&self) {
        let listener = TcpListener::bind(self.from).await.unwrap();
        let to = self.to.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((mut near, _)) = listener.accept().await else { continue };
                let to = to.clone();
                connections.spawn(async move {
                    if let Ok(mut far) = TcpStream::connect(to).await {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        *self.task.lock().unwrap() = Some(task);
    }
}
