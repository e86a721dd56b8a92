//! JSONPath as kube's client asks for it, in 400 kB less: no query is answered.
//!
//! The client links the library for one line: the token in the output of the kubeconfig's `auth-provider` `gcp`. flanneld refuses a kubeconfig
//! with an `auth-provider` before a client is made, as kubectl does since 1.26.

use std::fmt;

use serde_json::Value;

/// A query that is not answered.
#[derive(Debug)]
pub struct Unsupported;

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSONPath is not supported in this program")
    }
}

impl std::error::Error for Unsupported {}

/// Queries of a value.
pub trait JsonPath {
    /// The values at the path.
    ///
    /// # Errors
    /// Always [`Unsupported`].
    fn query(&self, path: &str) -> Result<Vec<&Value>, Unsupported>;
}

impl JsonPath for Value {
    fn query(&self, _path: &str) -> Result<Vec<&Value>, Unsupported> {
        Err(Unsupported)
    }
}
