//! A TCP connection to the API server that can be read in a coalesced way, see [`super::coalesce`].

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::coalesce::{Coalescing, ReadPace};
use super::low_water;

/// While reads are deferred, this many bytes wake nevertheless: about twenty heartbeats.
const DEFERRED_LOW_WATER: i32 = 64 << 10;

/// A connection and when it is read.
#[derive(Debug)]
pub(super) struct Stream {
    tcp: TcpStream,
    coalescing: Coalescing,
    reading: ReadPace,
    /// The end of the window, once there was one.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    pub(super) fn new(tcp: TokioIo<TcpStream>) -> TokioIo<Self> {
        let coalescing = Coalescing::default();
        TokioIo::new(Self { tcp: tcp.into_inner(), coalescing, reading: ReadPace::Quiet, timer: None })
    }

    /// Reads as `reading` says from now on.
    fn set(&mut self, reading: ReadPace) {
        if let ReadPace::Deferred { until, .. } = reading {
            match &mut self.timer {
                Some(timer) if timer.deadline() == until => {}
                Some(timer) => timer.as_mut().reset(until),
                none => *none = Some(Box::pin(sleep_until(until))),
            }
        }
        if reading.is_deferred() != self.reading.is_deferred() {
            let low_water = if reading.is_deferred() { DEFERRED_LOW_WATER } else { 1 };
            if let Err(error) = low_water::set(&self.tcp, low_water) {
                tracing::debug!(%error, "SO_RCVLOWAT: each segment wakes");
            }
            self.coalescing.note(reading);
        }
        self.reading = reading;
    }

    /// Ends the window, if there is one.
    fn hurry(&mut self) {
        if self.reading != ReadPace::Quiet {
            self.set(self.reading.hurried(Instant::now()));
        }
    }

    /// Reads what was left in the socket, at the end of the window.
    fn poll_deferred(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (ReadPace::Deferred { .. }, Some(timer)) = (self.reading, &mut self.timer) else {
            return Poll::Pending;
        };
        if !timer.is_elapsed() {
            ready!(timer.as_mut().poll(context));
        }
        // The runtime has not heard of it, so it would not try.
        if self.receive(buffer)? {
            return Poll::Ready(Ok(()));
        }
        self.set(ReadPace::Quiet);
        // What arrives from now on wakes at once. Old kernels do not tell of what arrived just before.
        if self.receive(buffer)? { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Reads without waiting; false if there is nothing. At the end of the stream nothing is added to the buffer.
    fn receive(&self, buffer: &mut ReadBuf<'_>) -> io::Result<bool> {
        loop {
            match rustix::net::recv(&self.tcp, buffer.initialize_unfilled(), RecvFlags::DONTWAIT) {
                Ok((_, length)) => {
                    buffer.advance(length);
                    return Ok(true);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        let wanted = stream.coalescing.is_wanted();
        if !wanted {
            stream.hurry();
        } else if stream.coalescing.take_news() {
            stream.set(stream.reading.after_news(Instant::now()));
        }
        let outcome = match Pin::new(&mut stream.tcp).poll_read(context, buffer) {
            Poll::Pending => ready!(stream.poll_deferred(context, buffer)),
            Poll::Ready(outcome) => outcome,
        };
        if wanted && outcome.is_ok() {
            stream.set(stream.reading.after_data(Instant::now(), buffer.remaining() == 0));
        }
        Poll::Ready(outcome)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        // Its answer is waited for.
        stream.hurry();
        Pin::new(&mut stream.tcp).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        stream.hurry();
        Pin::new(&mut stream.tcp).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(context)
    }
}

impl Connection for Stream {
    /// Puts the switch into the extensions of each response.
    fn connected(&self) -> Connected {
        Connected::new().extra(self.coalescing.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream as Server};
    use std::thread;
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::time::advance;

    use super::super::coalesce::{Coalesced, LONGEST_WINDOW, WINDOW};
    use super::*;

    /// A stream and what sends into it.
    struct Bed {
        stream: Stream,
        server: Server,
    }

    impl Bed {
        async fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (server, _) = listener.accept().unwrap();
            Self { stream: Stream::new(TokioIo::new(tcp)).into_inner(), server }
        }

        /// One that has just become busy.
        async fn busy() -> (Self, Coalesced) {
            let mut bed = Self::new().await;
            let coalesced = Coalesced::new(bed.stream.coalescing.clone());
            for _ in 0..3 {
                bed.send(b"beat");
                assert_eq!(bed.read().await, 4);
                advance(Duration::from_millis(10)).await;
            }
            assert!(bed.stream.reading.is_deferred() && coalesced.is_deferred());
            (bed, coalesced)
        }

        /// How much has arrived and was not read.
        fn unread(&self) -> usize {
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            rustix::net::recv(&self.stream.tcp, &mut [0; 64][..], peek).map_or(0, |(_, length)| length)
        }

        /// Sends this and waits until it has arrived.
        fn send(&mut self, bytes: &[u8]) {
            let with_it = self.unread() + bytes.len();
            self.server.write_all(bytes).unwrap();
            while self.unread() < with_it {
                thread::sleep(Duration::from_millis(1));
            }
        }

        /// What can be read without waiting: how much; 0 at the end of the stream.
        async fn at_once(&mut self) -> Option<usize> {
            let mut room = [0; 4096];
            poll_fn(|context| {
                let mut buffer = ReadBuf::new(&mut room);
                let outcome = Pin::new(&mut self.stream).poll_read(context, &mut buffer);
                Poll::Ready(match outcome {
                    Poll::Pending => None,
                    Poll::Ready(outcome) => Some(outcome.map(|()| buffer.filled().len()).unwrap()),
                })
            })
            .await
        }

        /// Reads once it can be, without letting time pass on the clock of the stream.
        async fn read(&mut self) -> usize {
            self.read_within(10_000).await.expect("something can be read")
        }

        /// The same; nothing after so many tries, a millisecond apart.
        async fn read_within(&mut self, tries: usize) -> Option<usize> {
            for _ in 0..tries {
                if let Some(length) = self.at_once().await {
                    return Some(length);
                }
                thread::sleep(Duration::from_millis(1));
                tokio::task::yield_now().await;
            }
            None
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_stream_is_read_at_the_end_of_the_window_and_a_quiet_one_at_once() {
        let (mut bed, coalesced) = Bed::busy().await;
        bed.send(b"one");
        bed.send(b"two");
        assert_eq!(bed.at_once().await, None);
        advance(Duration::from_millis(35)).await;
        assert_eq!(bed.at_once().await, None);
        advance(Duration::from_millis(10)).await;
        assert_eq!(bed.read().await, 6, "both at once");
        assert!(coalesced.is_deferred());
        advance(2 * WINDOW + Duration::from_millis(5)).await;
        assert_eq!(bed.at_once().await, None);
        assert!(!coalesced.is_deferred(), "nothing came for a whole window");
        bed.send(b"three");
        assert_eq!(bed.read().await, 5);
    }

    #[tokio::test(start_paused = true)]
    async fn windows_are_long_while_there_is_no_news_and_short_at_once_after_news() {
        let (mut bed, coalesced) = Bed::busy().await;
        for pause in [WINDOW, 2 * WINDOW, LONGEST_WINDOW] {
            bed.send(b"beat");
            advance(pause - Duration::from_millis(15)).await;
            assert_eq!(bed.at_once().await, None);
            advance(Duration::from_millis(20)).await;
            assert_eq!(bed.read().await, 4);
        }
        coalesced.has_news();
        assert_eq!(bed.at_once().await, None);
        bed.send(b"next");
        advance(WINDOW - Duration::from_millis(5)).await;
        assert_eq!(bed.at_once().await, None);
        advance(Duration::from_millis(10)).await;
        assert_eq!(bed.read().await, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_busy_stream_and_what_is_before_it_are_read_at_once() {
        let (mut bed, _coalesced) = Bed::busy().await;
        bed.send(b"last");
        bed.server.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(bed.read().await, 4);
        assert_eq!(bed.read().await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn more_than_a_receive_buffer_does_not_wait_for_a_window_each_time() {
        const LENGTH: usize = 4 << 20;
        let (mut bed, _coalesced) = Bed::busy().await;
        let mut server = bed.server.try_clone().unwrap();
        let sending = thread::spawn(move || server.write_all(&vec![7; LENGTH]).unwrap());
        let (mut received, mut windows) = (0, 0);
        // The rest is less than what wakes.
        while received < LENGTH - DEFERRED_LOW_WATER as usize {
            match bed.read_within(1_000).await {
                Some(length) => received += length,
                // A sender may wait for room for a whole segment while less is unread than what wakes.
                None => {
                    windows += 1;
                    advance(LONGEST_WINDOW).await;
                }
            }
        }
        assert!(windows < 4, "{windows} windows");
        sending.join().unwrap();
        while received < LENGTH {
            advance(LONGEST_WINDOW + Duration::from_millis(5)).await;
            received += bed.read_within(1_000).await.unwrap_or_default();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_ends_the_window() {
        let (mut bed, _coalesced) = Bed::busy().await;
        bed.send(b"before");
        bed.stream.write_all(b"GET").await.unwrap();
        advance(Duration::from_millis(1)).await;
        assert_eq!(bed.read().await, 6);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_reader_is_gone_is_read_at_once() {
        let (mut bed, coalesced) = Bed::busy().await;
        bed.send(b"before");
        drop(coalesced);
        advance(Duration::from_millis(1)).await;
        assert_eq!(bed.read().await, 6);
        advance(Duration::from_millis(1)).await;
        assert_eq!(bed.at_once().await, None);
        for _ in 0..5 {
            bed.send(b"other");
            assert_eq!(bed.read().await, 5);
        }
        assert_eq!(bed.stream.reading, ReadPace::Quiet);
    }
}
