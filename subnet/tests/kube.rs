//! The store on Kubernetes' node objects against an API server that does as it is told.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

#[path = "kube/access.rs"]
mod access;
#[path = "kube/bed.rs"]
mod bed;
#[path = "kube/claim.rs"]
mod claim;
#[path = "kube/crowd.rs"]
mod crowd;
#[path = "kube/follow.rs"]
mod follow;
#[path = "kube/hold.rs"]
mod hold;
#[path = "kube/ready.rs"]
mod ready;
#[path = "kube/tls.rs"]
mod tls;
