//! A value that blocking threads borrow for pieces of work, so that its owner answers meanwhile.

/// What is lent for one piece of work at a time.
pub(crate) struct Lent<T>(Option<T>);

impl<T: Send + 'static> Lent<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// Lends the value to a thread that may block. If the future is dropped before the work is done, the value is
    /// gone: to be awaited by the owner's loop itself, not beside other things.
    pub(crate) async fn to<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> R {
        let mut value = self.0.take().expect("only one piece of work has the value at a time");
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&mut value);
            (value, result)
        });
        let (value, result) = done.await.expect("work on the host does not panic");
        self.0 = Some(value);
        result
    }

    pub(crate) fn get(&self) -> &T {
        self.0.as_ref().expect("no piece of work has the value")
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("no piece of work has the value")
    }
}
