//! The server as its clients see it, over sockets on loopback.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;

/// Longer than anything here takes; ends a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);
const NEVER: Duration = Duration::from_secs(86_400);

struct Running {
    at: SocketAddr,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

async fn bound() -> Server {
    Server::bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap()
}

fn run(server: Server, health: &Health) -> Running {
    let at = server.address().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(server.run(health.clone(), async { drop(stopped.await) }));
    Running { at, stop, server }
}

async fn running(limits: Limits, health: &Health) -> Running {
    run(Server { limits, ..bound().await }, health)
}

/// Runs blocking socket code beside the server.
async fn client<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    timeout(PATIENCE, tokio::task::spawn_blocking(work)).await.expect("the server answers").unwrap()
}

fn connect(at: SocketAddr) -> std::net::TcpStream {
    let stream = std::net::TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// All that the server sends until it closes the connection, by whichever means.
fn rest(mut stream: std::net::TcpStream) -> String {
    let mut text = Vec::new();
    match stream.read_to_end(&mut text) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("not closed: {error}"),
        _ => String::from_utf8(text).unwrap(),
    }
}

/// The response to a request: head in lower case, and body.
async fn ask(at: SocketAddr, request: &str) -> (String, String) {
    let request = format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n");
    let text = client(move || {
        let mut stream = connect(at);
        stream.write_all(request.as_bytes()).unwrap();
        rest(stream)
    })
    .await;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    (head.to_lowercase(), body.to_owned())
}

fn ready() -> Health {
    Health::new(NEVER, [])
}

#[tokio::test]
async fn an_unspecified_address_serves_both_families_and_any_other_only_its_own() {
    for (at, v4, v6) in [
        ("0.0.0.0:0", true, true),
        ("[::]:0", true, true),
        ("127.0.0.1:0", true, false),
        ("[::1]:0", false, true),
    ] {
        let running = run(Server::bind(at.parse().unwrap()).await.unwrap(), &ready());
        let port = running.at.port();
        for (from, expected) in [
            (SocketAddr::from((Ipv4Addr::LOCALHOST, port)), v4),
            (SocketAddr::from((Ipv6Addr::LOCALHOST, port)), v6),
        ] {
            let answered = client(move || std::net::TcpStream::connect(from).is_ok()).await;
            assert_eq!(answered, expected, "{at} asked at {from}");
        }
    }
}

#[tokio::test]
async fn a_healthy_process_answers_as_go_flannel_does() {
    let Running { at, stop: _stop, .. } = running(Limits::default(), &ready()).await;
    for (path, body) in [
        ("/healthz", "flanneld is running"),
        ("/readyz", "flanneld is ready"),
        ("/readyz?x=1", "flanneld is ready"),
    ] {
        for method in ["GET", "POST", "DELETE", "PROPFIND"] {
            let (head, answer) = ask(at, &format!("{method} {path}")).await;
            assert!(head.starts_with("http/1.1 200 ok"), "{method} {path}: {head}");
            assert_eq!(answer, body);
        }
    }
    let (head, body) = ask(at, "HEAD /healthz").await;
    assert!(head.starts_with("http/1.1 200") && body.is_empty(), "{head}");
}

#[tokio::test]
async fn only_the_exact_paths_exist() {
    let Running { at, stop: _stop, .. } = running(Limits::default(), &ready()).await;
    for path in ["/", "/healthz/", "/readyz/x", "/Healthz", "/metrics/", "/status/x", "*", "//healthz"] {
        let (head, _) = ask(at, &format!("OPTIONS {path}")).await;
        assert!(head.starts_with("http/1.1 404"), "{path}: {head}");
    }
}

#[tokio::test]
async fn an_unready_process_says_why_in_json_and_recovers() {
    let health = Health::new(NEVER, ["store", "kernel"]);
    let Running { at, stop: _stop, .. } = running(Limits::default(), &health).await;
    health.set("kernel", Ok(()));
    health.set("store", Err("http://a:2379 \"does not answer\"".into()));
    let (head, body) = ask(at, "GET /readyz").await;
    assert!(head.starts_with("http/1.1 503") && head.contains("content-type: application/json"), "{head}");
    let reason = json!({ "condition": "store", "reason": "http://a:2379 \"does not answer\"" });
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body, json!({ "ready": false, "reasons": [reason] }));
    assert!(ask(at, "GET /healthz").await.0.starts_with("http/1.1 200"), "unready is not dead");
    health.set("store", Ok(()));
    assert!(ask(at, "GET /readyz").await.0.starts_with("http/1.1 200"));

    health.note("rules", vec!["a foreign chain was opened".into()]);
    let (head, body) = ask(at, "GET /readyz?verbose").await;
    assert!(head.starts_with("http/1.1 200") && head.contains("application/json"), "{head}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let conditions = json!({ "kernel": "met", "store": "met" });
    assert_eq!(
        body,
        json!({ "ready": true, "conditions": conditions, "notes": ["a foreign chain was opened"] })
    );
}

#[tokio::test]
async fn a_loop_that_stands_still_is_not_alive() {
    let health = Health::new(Duration::ZERO, []);
    let Running { at, stop: _stop, .. } = running(Limits::default(), &health).await;
    let (head, body) = ask(at, "GET /healthz").await;
    assert!(head.starts_with("http/1.1 503") && head.contains("content-type: application/json"), "{head}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["alive"], json!(false));
    assert!(body["reason"].as_str().unwrap().contains("control loop"), "{body}");
}

#[tokio::test]
async fn a_port_that_can_not_be_had_is_named_with_the_remedy() {
    let taken = bound().await;
    let at = taken.address().unwrap();
    let error = Server::bind(at).await.unwrap_err().to_string();
    assert!(error.contains(&at.to_string()) && error.contains("another flanneld"), "{error}");
    assert!(
        error.contains(&format!("sport = :{}", at.port())) && error.contains("--healthz-port"),
        "{error}"
    );
    let error = Server::bind("[2001:db8::dead]:8081".parse().unwrap()).await.unwrap_err().to_string();
    assert!(error.contains("[2001:db8::dead]:8081") && error.contains("--healthz-ip"), "{error}");
}

#[tokio::test]
async fn clients_that_hold_all_connections_do_not_keep_others_from_being_answered() {
    let limits = Limits { connections: 4, head: NEVER, connection: NEVER, ..Limits::default() };
    let Running { at, stop: _stop, .. } = running(limits, &ready()).await;
    let mut held: VecDeque<_> = client(move || (0..4).map(|_| connect(at)).collect()).await;
    assert!(ask(at, "GET /readyz").await.0.starts_with("http/1.1 200"));
    let oldest = held.pop_front().unwrap();
    assert_eq!(client(move || rest(oldest)).await, "", "the oldest is closed");
    let mut newest = held.pop_back().unwrap();
    let answer = client(move || {
        newest.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        rest(newest)
    });
    assert!(answer.await.ends_with("flanneld is running"), "the newest is not");
}

#[tokio::test]
async fn slow_clients_and_long_heads_are_cut_off() {
    let short = Duration::from_millis(20);
    for limits in [
        Limits { head: short, connection: NEVER, ..Limits::default() },
        Limits { head: NEVER, connection: short, ..Limits::default() },
    ] {
        let Running { at, stop: _stop, .. } = running(limits, &ready()).await;
        let silent = client(move || rest(connect(at))).await;
        assert_eq!(silent, "");
        let half = client(move || {
            let mut stream = connect(at);
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost:");
            rest(stream)
        });
        assert!(!half.await.contains("200 OK"));
    }
    let Running { at, stop: _stop, .. } =
        running(Limits { head: NEVER, connection: NEVER, ..Limits::default() }, &ready()).await;
    // The server may be gone before all is written, and a reset may swallow its answer.
    let long = client(move || {
        let mut stream = connect(at);
        let _ = stream.write_all(format!("GET /healthz?{} HTTP/1.1\r\n\r\n", "x".repeat(100_000)).as_bytes());
        rest(stream)
    });
    assert!(!long.await.contains("200 OK"));
}

#[tokio::test]
async fn nonsense_is_answered_or_dropped_and_the_next_client_is_served() {
    let Running { at, stop: _stop, .. } = running(Limits::default(), &ready()).await;
    for nonsense in [&b"\0\xff\x16\x03\x01"[..], b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""] {
        let text = client(move || {
            let mut stream = connect(at);
            stream.write_all(nonsense).unwrap();
            let _ = stream.shutdown(Shutdown::Write);
            rest(stream)
        });
        assert!(!text.await.contains("200 OK"));
    }
    assert!(ask(at, "GET /healthz").await.0.starts_with("http/1.1 200"));
}

#[tokio::test]
async fn stopping_closes_the_port_and_does_not_wait_for_idle_clients_for_ever() {
    let grace = Duration::from_millis(20);
    let limits = Limits { head: NEVER, connection: NEVER, grace, ..Limits::default() };
    // An address of its own: no other test takes the port once it is free.
    let server = Server::bind((Ipv4Addr::new(127, 83, 17, 1), 0).into()).await.unwrap();
    let Running { at, stop, server } = run(Server { limits, ..server }, &ready());
    let (silent, half) = client(move || {
        let (silent, mut half) = (connect(at), connect(at));
        half.write_all(b"GET /healthz HTTP/1.1\r\nhost:").unwrap();
        (silent, half)
    })
    .await;
    // Connections are accepted in order, so the two are open once this one is answered.
    assert!(ask(at, "GET /readyz").await.0.starts_with("http/1.1 200"));
    stop.send(()).unwrap();
    timeout(PATIENCE, server).await.expect("the server ends").unwrap();
    assert_eq!(client(move || rest(silent) + &rest(half)).await, "");
    let refused = client(move || std::net::TcpStream::connect(at)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}
