//! Tasks beside the loop: each ends with its handle.

use tokio::task::JoinHandle;

/// A task that ends with its handle.
pub(super) struct Task<T>(JoinHandle<T>);

impl<T: Send + 'static> Task<T> {
    pub(super) fn spawn(future: impl Future<Output = T> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }

    /// The result; never there without a task. A task ends early only with the process.
    pub(super) async fn of(task: &mut Option<Self>) -> T {
        loop {
            let Some(running) = task else { return std::future::pending().await };
            let result = (&mut running.0).await;
            *task = None;
            if let Ok(result) = result {
                return result;
            }
        }
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
