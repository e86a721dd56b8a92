//! The store on Kubernetes' node objects against an API server that does as it is told.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

#[path = "kube/access.rs"]
mod access;
#[path = "kube/bed.rs"]
mod bed;
#[path = "kube/certificates.rs"]
mod certificates;
#[path = "kube/claim.rs"]
mod claim;
#[path = "kube/common.rs"]
mod common;
#[path = "kube/crowd.rs"]
mod crowd;
#[path = "kube/follow.rs"]
mod follow;
#[path = "kube/hold.rs"]
mod hold;
#[path = "kube/live.rs"]
mod live;
#[path = "kube/metadata.rs"]
mod metadata;
#[path = "kube/policies.rs"]
mod policies;
#[path = "kube/ready.rs"]
mod ready;
#[path = "kube/real.rs"]
mod real;
#[path = "kube/starting.rs"]
mod starting;
#[path = "kube/suite.rs"]
mod suite;
#[path = "kube/tls.rs"]
mod tls;
#[path = "kube/world.rs"]
mod world;

/// The cluster that the suite runs in.
async fn world() -> world::World {
    let server = subnet::testing::ApiServer::local().unwrap();
    let url = server.url();
    let mut config = ::kube::Config::new(url.parse().unwrap());
    // No certificate is to be trusted, so there need not be a list of authorities.
    config.root_cert = Some(Vec::new());
    world::World::new(config, None, Some(url), Box::new(server))
}
