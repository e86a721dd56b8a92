//! Network policies on this node: what is known of the cluster, brought into the kernel.

pub(crate) mod announce;
