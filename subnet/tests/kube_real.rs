//! The suite over a real API server: `make test-kube`.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

#[path = "kube/certificates.rs"]
mod certificates;
#[path = "kube/common.rs"]
mod common;
#[path = "kube/real.rs"]
mod real;
#[path = "kube/suite.rs"]
mod suite;
#[path = "kube/world.rs"]
mod world;

/// One server is enough for a machine; the next test starts its own when this one's is gone.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The cluster that the suite runs in.
async fn world() -> world::World {
    let turn = TURN.lock().await;
    let programs = real::Programs::find(std::env::var_os("KUBEBUILDER_ASSETS"));
    let programs = programs.unwrap_or_else(|error| panic!("{error}"));
    let mut world = real::world(&programs).await.unwrap_or_else(|error| panic!("{error}"));
    let server = std::mem::replace(&mut world._server, Box::new(()));
    world._server = Box::new((server, turn));
    world
}
