//! A network path to a server that can be cut and mended.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

/// Forwards connections from an address of its own.
pub(crate) struct Proxy {
    from: SocketAddr,
    to: String,
    task: Mutex<Option<JoinHandle<()>>>,
    frozen: watch::Sender<bool>,
}

impl Proxy {
    pub(crate) async fn new(to: String) -> Self {
        let from = format!("{}:2379", super::etcd_server::own_address()).parse().unwrap();
        let proxy = Self { from, to, task: Mutex::new(None), frozen: watch::Sender::new(false) };
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

    /// Connections stay open, and nothing comes through any more, as when a router forgets them.
    pub(crate) fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    pub(crate) async fn mend(&self) {
        self.frozen.send_replace(false);
        let listener = listener(self.from).await;
        let (to, frozen) = (self.to.clone(), self.frozen.subscribe());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((mut near, _)) = listener.accept().await else { continue };
                let (to, mut frozen) = (to.clone(), frozen.clone());
                connections.spawn(async move {
                    let Ok(mut far) = TcpStream::connect(to).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                        _ = frozen.wait_for(|frozen| *frozen) => {}
                    }
                    std::future::pending::<()>().await;
                });
                while connections.try_join_next().is_some() {}
            }
        });
        *self.task.lock().unwrap() = Some(task);
    }
}

/// A listener there. Its predecessor is closed, but a program that another test starts at this moment has it until it is executed.
async fn listener(at: SocketAddr) -> TcpListener {
    for _ in 0..1000 {
        match TcpListener::bind(at).await {
            Err(error) if error.kind() == ErrorKind::AddrInUse => sleep(Duration::from_millis(10)).await,
            listener => return listener.unwrap(),
        }
    }
    panic!("{at} is in use for ten seconds");
}
