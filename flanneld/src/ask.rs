//! Asks agents over HTTP how they stand: one of this host, or many at once.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

/// An agent that takes longer does not answer.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(2);
/// So many are asked at once.
const AT_ONCE: usize = 64;
/// No answer is longer: the peers of 20,000 nodes are less.
const MAX_ANSWER: u64 = 32 << 20;

/// The text that an agent answers with.
///
/// # Errors
/// A sentence why there is none.
pub(crate) fn text(at: SocketAddr, path: &str) -> Result<Vec<u8>, String> {
    let end = Instant::now() + TIMEOUT;
    let answer = get(at, path, end).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("no answer within {} s from {at}", TIMEOUT.as_secs())
        }
        io::ErrorKind::ConnectionRefused => format!("nothing listens at {at}"),
        _ => format!("no answer from {at}: {error}"),
    })?;
    let (head, body) = split(&answer).ok_or_else(|| format!("what {at} answers is not HTTP"))?;
    match status_code(head) {
        Some(200) => Ok(body.to_vec()),
        Some(403) => Err(format!("{at} refuses: only nodes of its cluster may ask")),
        Some(404) => Err(format!("{at} does not know {path}: an older flanneld, or another program")),
        Some(code) => Err(format!("{at} answers with code {code}")),
        None => Err(format!("what {at} answers is not HTTP")),
    }
}

/// The value that an agent answers with.
///
/// # Errors
/// A sentence why there is none.
pub(crate) fn value<T: DeserializeOwned>(at: SocketAddr, path: &str) -> Result<T, String> {
    let body = text(at, path)?;
    serde_json::from_slice(&body)
        .map_err(|error| format!("what {at} answers to {path} makes no sense: {error}"))
}

/// What each of these answers, in the same order.
pub(crate) fn all<T: Send>(
    addresses: &[IpAddr],
    one: impl Fn(IpAddr) -> Result<T, String> + Sync,
) -> Vec<Result<T, String>> {
    let next = AtomicUsize::new(0);
    let answers: Mutex<Vec<Option<Result<T, String>>>> = Mutex::new(addresses.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..addresses.len().min(AT_ONCE) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(address) = addresses.get(index).copied() else { return };
                    let answer = one(address);
                    answers.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(answer);
                }
            });
        }
    });
    let answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err("not asked".to_owned()))).collect()
}

/// A request and its answer, all until `end`.
fn get(at: SocketAddr, path: &str, end: Instant) -> io::Result<Vec<u8>> {
    let left = || end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
    let left = || left().ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut));
    let mut stream = TcpStream::connect_timeout(&at, left()?)?;
    stream.set_write_timeout(Some(left()?))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {at}\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(answer),
            Ok(read) => answer.extend(&buffer[..read]),
            // The process was stopped and continued: signal(7).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if answer.len() as u64 > MAX_ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
        }
    }
}

fn split(answer: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some((&answer[..at], &answer[at + 4..]))
}

fn status_code(head: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(head.split(|byte| *byte == b'\r').next()?).ok()?;
    line.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn server(answer: Option<&'static str>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                match answer {
                    Some(answer) => {
                        let mut request = [0; 1024];
                        let _ = stream.read(&mut request);
                        let _ = stream.write_all(answer.as_bytes());
                    }
                    None => std::mem::forget(stream),
                }
            }
        });
        at
    }

    #[test]
    fn answers_and_their_absence_are_told_apart() {
        let ok = server(Some("HTTP/1.0 200 OK\r\ncontent-length: 4\r\n\r\n[17]"));
        assert_eq!(value::<Vec<u8>>(ok, "/x"), Ok(vec![17]));
        assert!(value::<String>(ok, "/x").unwrap_err().contains("makes no sense"));
        for (answer, part) in [
            ("HTTP/1.1 404 Not Found\r\n\r\n", "an older flanneld"),
            ("HTTP/1.1 403 Forbidden\r\n\r\n", "only nodes of its cluster"),
            ("HTTP/1.1 500 x\r\n\r\n", "code 500"),
            ("SSH-2.0-x\r\n\r\n", "not HTTP"),
            ("", "not HTTP"),
        ] {
            let why = text(server(Some(answer)), "/x").unwrap_err();
            assert!(why.contains(part), "{why}");
        }
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(text(closed, "/x").unwrap_err().contains("nothing listens"));
    }

    #[test]
    fn one_that_hangs_is_given_up_and_keeps_nobody_else_waiting() {
        let hanging = server(None);
        assert!(text(hanging, "/x").unwrap_err().contains("no answer within 2 s"));
        let addresses: Vec<IpAddr> = (0..200u8).map(|last| IpAddr::from([127, 0, 0, last])).collect();
        let answers = all(&addresses, |addr| match addr {
            IpAddr::V4(v4) if v4.octets()[3] % 2 == 0 => Ok(v4.octets()[3]),
            other => Err(other.to_string()),
        });
        let right = answers.iter().zip(&addresses).all(|(answer, addr)| match answer {
            Ok(last) => addr.to_string() == format!("127.0.0.{last}"),
            Err(text) => *text == addr.to_string(),
        });
        assert!(right && answers.len() == 200);
    }
}
