//! `host-local`, the IPAM plugin: addresses of a node's ranges, each reserved by a file.

pub(crate) mod allocate;
pub(crate) mod config;
mod range;
mod reclaim;
pub(crate) mod store;

use std::collections::BTreeSet;

use subnet::gojson::Object;

use crate::args::Args;
use crate::conf::Network;
use crate::env::{Attachment, Call, Verb};
use crate::note;
use crate::result::Attached;
use allocate::{Former, Origin};
use config::HostLocalConfig;
use store::Store;

/// What is printed when a call of `host-local` itself succeeds.
///
/// # Errors
/// A sentence in the words of the original.
pub(crate) fn answer(call: &Call, network: &Network, stdin: &str) -> Result<String, String> {
    let config = HostLocalConfig::parse(&Object::parse(stdin)?, &Args::parse(&call.args)?)?;
    let nothing = |()| String::new();
    match call.verb {
        Verb::Add => {
            let allocated = allocate::add(&config, &call.attachment, Former::Possible)?;
            let attached = Attached {
                ips: allocated.ips,
                dns: allocated.dns,
                routes: config.routes,
                ..Attached::default()
            };
            Ok(attached.text(network.version()))
        }
        Verb::Del => allocate::del(&config, &call.attachment, Origin::Other, &[]).map(nothing),
        Verb::Check => allocate::check(&config, &call.attachment).map(nothing),
        Verb::Status => Store::open(config.data_dir(), &config.network)?.check_writable().map(nothing),
        Verb::Gc => {
            let valid = network.valid_attachments().map_err(|error| error.msg)?;
            collect(&config, &valid).map(nothing)
        }
        Verb::Version => Ok(String::new()),
    }
}

/// Gives back the addresses of a network that belong to no valid attachment.
///
/// # Errors
/// Those that could not be given back, as one sentence.
pub(crate) fn collect(config: &HostLocalConfig, valid: &BTreeSet<Attachment>) -> Result<(), String> {
    let Some(store) = Store::existing(config.data_dir(), &config.network)? else { return Ok(()) };
    let (released, failures) = store.release_if(|holder, _| holder.is_garbage(valid));
    for one in &released {
        note(&format!("{}: reserved for {}: given back", one.path.display(), one.holder.text()));
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}
