//! The API over HTTP.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::forms::Form;
use super::objects::{Change, Listing, Resource, Selection};
use super::{Request, Shared};

/// A body that is written while it is sent.
struct Written(mpsc::Receiver<Bytes>);

impl Body for Written {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

type Pen = mpsc::Sender<Bytes>;
type Answer = Response<Written>;

/// Serves until it is told to stop.
pub(super) async fn serve(listener: std::net::TcpListener, shared: Arc<Shared>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let mut stop = shared.stop.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let Ok((stream, _)) = accepted else {
            sleep(Duration::from_millis(10)).await;
            continue;
        };
        if shared.behaviour.borrow().down {
            continue;
        }
        // Or else each small part of an answer waits for the client to acknowledge the one before.
        let _ = stream.set_nodelay(true);
        let (answering, mut ended) = (Arc::clone(&shared), shared.connections.subscribe());
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let shared = Arc::clone(&answering);
                async move { Ok::<_, Infallible>(answer(request, shared).await) }
            });
            let serving =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // How a connection ends is the client's concern.
                _ = serving => {}
                _ = ended.changed() => {}
            }
        });
    }
}

async fn answer(request: hyper::Request<Incoming>, shared: Arc<Shared>) -> Answer {
    let (parts, body) = request.into_parts();
    let text =
        |name| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let path = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    let request = Request {
        method: parts.method.to_string(),
        path,
        content_type: text(header::CONTENT_TYPE),
        accept: text(header::ACCEPT),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    shared.requests().push(request.clone());
    let mut behaviour = shared.behaviour.subscribe();
    let _ = behaviour.wait_for(|behaviour| !behaviour.silent).await;
    let behaviour = behaviour.borrow().clone();
    if let Some(token) = &behaviour.token
        && text(header::AUTHORIZATION) != format!("Bearer {token}")
    {
        return refuse(401, "Unauthorized");
    }
    let refused = behaviour
        .refusals
        .iter()
        .find(|refusal| refusal.method == request.method && request.path.contains(&refusal.path));
    if let Some(refusal) = refused {
        return refuse(refusal.status, &refusal.message);
    }
    let query: BTreeMap<&str, String> = parts
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key, decoded(value)))
        .collect();
    let steps: Vec<&str> = parts.uri.path().trim_matches('/').split('/').collect();
    if let Some(selection) = collection(&request.method, &steps, &query) {
        return match query.contains_key("watch") {
            true if behaviour.no_other_form && request.accept != "application/json" => {
                refuse(406, "only the following media types are accepted: application/json")
            }
            true => {
                let form = Form::of(&request.accept, !behaviour.whole_objects, !behaviour.no_protobuf);
                watch(&query, selection, form, shared)
            }
            false => list(&query, &selection, shared),
        };
    }
    single(&request, &steps, &shared)
}

/// Answers a request about a single object.
fn single(request: &Request, steps: &[&str], shared: &Arc<Shared>) -> Answer {
    match (request.method.as_str(), steps) {
        ("GET", ["api", "v1", "nodes", name]) => match shared.objects().get(name) {
            Some(node) => whole(200, node.to_string()),
            None => refuse(404, &format!("nodes {name:?} not found")),
        },
        ("POST", ["api", "v1", "nodes"]) => create(request, shared),
        ("DELETE", ["api", "v1", "nodes", name]) => delete(name, shared),
        ("PATCH", ["api", "v1", "nodes", name]) => {
            patch(name, request, shared, "application/merge-patch+json")
        }
        ("PATCH", ["api", "v1", "nodes", name, "status"]) => {
            patch(name, request, shared, "application/strategic-merge-patch+json")
        }
        ("GET", ["api", "v1", "namespaces", namespace, "pods", name]) => {
            match shared.objects().find(Resource::Pods, &format!("{namespace}/{name}")) {
                Some(pod) => whole(200, pod.to_string()),
                None => refuse(404, &format!("pods {name:?} not found")),
            }
        }
        ("POST", ["api", "v1", "namespaces", _, "events"]) => {
            match serde_json::from_str::<Value>(&request.body) {
                Ok(event) => {
                    shared.objects().put_event(event.clone());
                    whole(201, event.to_string())
                }
                Err(error) => refuse(400, &error.to_string()),
            }
        }
        _ => refuse(404, "the server could not find the requested resource"),
    }
}

/// The objects that a path stands for.
fn collection(method: &str, steps: &[&str], query: &BTreeMap<&str, String>) -> Option<Selection> {
    let (resource, namespace) = match steps {
        ["api", "v1", "nodes"] => (Resource::Nodes, None),
        ["api", "v1", "namespaces"] => (Resource::Namespaces, None),
        ["api", "v1", "pods"] => (Resource::Pods, None),
        ["api", "v1", "namespaces", namespace, "pods"] => (Resource::Pods, Some(*namespace)),
        ["api", "v1", "services"] => (Resource::Services, None),
        ["apis", "networking.k8s.io", "v1", "networkpolicies"] => (Resource::Policies, None),
        ["apis", "networking.k8s.io", "v1", "namespaces", namespace, "networkpolicies"] => {
            (Resource::Policies, Some(*namespace))
        }
        _ => return None,
    };
    let field = query.get("fieldSelector").and_then(|selector| selector.split_once('='));
    (method == "GET").then(|| Selection {
        resource,
        namespace: namespace.map(str::to_owned),
        field: field.map(|(field, value)| (field.to_owned(), value.to_owned())),
    })
}

fn create(request: &Request, shared: &Shared) -> Answer {
    let Ok(node) = serde_json::from_str::<Value>(&request.body) else {
        return refuse(400, "error decoding object");
    };
    let name = node["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    if shared.objects().get(&name).is_some() {
        return refuse(409, &format!("nodes {name:?} already exists"));
    }
    shared.change(|objects| objects.put(node));
    match shared.objects().get(&name) {
        Some(node) => whole(201, node.to_string()),
        None => refuse(500, "it is gone already"),
    }
}

fn delete(name: &str, shared: &Shared) -> Answer {
    let removed = shared.change(|objects| {
        let node = objects.get(name);
        objects.remove(name);
        node
    });
    match removed {
        Some(node) => whole(200, node.to_string()),
        None => refuse(404, &format!("nodes {name:?} not found")),
    }
}

fn patch(name: &str, request: &Request, shared: &Shared, form: &str) -> Answer {
    if request.content_type != form {
        return refuse(415, "the body of the request was in an unknown format");
    }
    let Ok(patch) = serde_json::from_str::<Value>(&request.body) else {
        return refuse(400, "error decoding patch");
    };
    match shared.change(|objects| objects.patch(name, &patch)) {
        Some(node) => whole(200, node.to_string()),
        None => refuse(404, &format!("nodes {name:?} not found")),
    }
}

fn list(query: &BTreeMap<&str, String>, selection: &Selection, shared: Arc<Shared>) -> Answer {
    let behaviour = shared.behaviour.borrow().clone();
    let mut objects = shared.objects();
    let (listing, from) = match query.get("continue").map(|token| token.split_once('.')) {
        None => (objects.list(selection), 0),
        Some(token) => {
            let place = token.and_then(|(number, from)| Some((number.parse().ok()?, from.parse().ok()?)));
            match place.and_then(|(number, from): (_, usize)| Some((objects.kept(number)?, from))) {
                Some(place) => place,
                None => {
                    return refuse(
                        410,
                        "The provided continue parameter is too old to display a consistent list result",
                    );
                }
            }
        }
    };
    let asked: Option<u64> = query.get("resourceVersion").and_then(|version| version.parse().ok());
    if asked.is_some_and(|asked| asked > listing.version) {
        return refuse(504, "Too large resource version");
    }
    // With a version to be as new as, the answer comes from the server's cache, which knows no pages.
    let pages = asked.is_none() || behaviour.always_pages;
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).filter(|_| pages);
    let limit: usize =
        limit.map_or(usize::MAX, |limit: usize| limit.min(behaviour.largest_page.unwrap_or(limit)));
    let until = from.saturating_add(limit).min(listing.objects.len());
    let next = match until < listing.objects.len() {
        true => format!("{}.{until}", objects.keep(listing.clone())),
        false => String::new(),
    };
    drop(objects);
    written(move |pen| write_list(pen, listing, from..until, next, shared))
}

async fn write_list(
    pen: Pen,
    listing: Listing,
    part: std::ops::Range<usize>,
    next: String,
    shared: Arc<Shared>,
) {
    let mut behaviour = shared.behaviour.subscribe();
    let metadata = json!({"resourceVersion": listing.version.to_string(), "continue": next});
    let head = format!(r#"{{"kind":"NodeList","apiVersion":"v1","metadata":{metadata},"items":["#);
    let _ = pen.send(head.into()).await;
    for (sent, index) in part.enumerate() {
        let on = |behaviour: &super::Behaviour| behaviour.lists_stop_after.is_none_or(|after| sent < after);
        let _ = behaviour.wait_for(on).await;
        let comma = if sent > 0 { "," } else { "" };
        if pen.send(format!("{comma}{}", listing.objects[index]).into()).await.is_err() {
            return;
        }
    }
    let _ = pen.send("]}\n".into()).await;
}

fn watch(query: &BTreeMap<&str, String>, selected: Selection, form: Form, shared: Arc<Shared>) -> Answer {
    let from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let seconds: u64 = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).unwrap_or(1800);
    let end = shared.behaviour.borrow().watches_end_after.unwrap_or(Duration::from_secs(seconds));
    let bookmarks = query.get("allowWatchBookmarks").is_some_and(|allowed| allowed == "true");
    let mut deafened = shared.watches.subscribe();
    let mut answer = written(move |pen| async move {
        shared.watching.send_modify(|count| *count += 1);
        let gone = pen.clone();
        tokio::select! {
            () = write_watch(pen, from, selected, (bookmarks, form), &shared) => {}
            () = gone.closed() => {}
            () = sleep(end) => {}
            _ = deafened.changed() => gone.closed().await,
        }
        shared.watching.send_modify(|count| *count -= 1);
    });
    let content_type = header::HeaderValue::from_static(form.content_type());
    answer.headers_mut().insert(header::CONTENT_TYPE, content_type);
    answer
}

async fn write_watch(
    pen: Pen,
    mut at: u64,
    selected: Selection,
    (bookmarks, form): (bool, Form),
    shared: &Shared,
) {
    let mut version = shared.version.subscribe();
    let every = shared.behaviour.borrow().bookmark_every.filter(|_| bookmarks);
    let mut bookmark = every.map(|every| Instant::now() + every);
    loop {
        version.mark_unchanged();
        let (changes, newest) = {
            let objects = shared.objects();
            (objects.since(at), objects.version())
        };
        let changes = match changes {
            Some(changes) if at <= newest => changes,
            _ => {
                let message = format!("too old resource version: {at} ({newest})");
                let _ = pen.send(form.error(&message, "Expired", 410)).await;
                return;
            }
        };
        for Change { version, kind, resource, name, object } in changes {
            at = version;
            if !selected.wants(resource, &name, &object) {
                continue;
            }
            let garbled = shared.behaviour.borrow().garbled_protobuf.filter(|_| form == Form::Protobuf);
            let event = garbled.map_or_else(|| form.event(kind, &object), Bytes::from_static);
            if pen.send(event).await.is_err() {
                return;
            }
        }
        tokio::select! {
            _ = version.changed() => {}
            () = until(bookmark) => {
                bookmark = every.map(|every| Instant::now() + every);
                let node = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": at.max(newest).to_string(), "creationTimestamp": null}, "spec": {}, "status": {}});
                let _ = pen.send(form.event("BOOKMARK", &node.to_string())).await;
            }
        }
    }
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => pending().await,
    }
}

fn written<F: Future<Output = ()> + Send + 'static>(write: impl FnOnce(Pen) -> F) -> Answer {
    let (pen, paper) = mpsc::channel(8);
    tokio::spawn(write(pen));
    let mut answer = Response::new(Written(paper));
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    answer
}

fn whole(status: u16, text: String) -> Answer {
    let mut answer = written(|pen| async move { drop(pen.send(text.into()).await) });
    *answer.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer
}

fn refuse(status: u16, message: &str) -> Answer {
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": status});
    whole(status, body.to_string())
}

/// The text behind a query's percent signs.
fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, more)) = rest.split_first() {
        let escaped =
            more.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[2..];
            }
            None => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
