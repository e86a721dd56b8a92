//! The CNI plugin `flannel`: has a delegate plugin connect a pod, within the subnet that flanneld holds for
//! this node. Reads `subnet.env`, makes the delegate's configuration of it, runs the delegate, in this process
//! if it is a bridge, and keeps the configuration for DEL.
//!
//! By other names it is one of the plugins that stand beside `flannel` in a list, or one of two helpers of the image.

#![cfg_attr(not(test), no_main)]

mod applet;
mod args;
mod bandwidth;
mod bridge;
mod bump;
mod chained;
mod conf;
mod copy;
mod delegate;
mod env;
mod error;
mod files;
mod gc;
mod hash;
mod host_local;
mod install;
mod loopback;
mod netlink;
mod netns;
mod node;
mod plugin;
mod policy;
mod portmap;
mod report;
mod result;
mod route;
mod saved;
mod spec;
mod start;
mod sysctl;
mod verbs;
mod way;

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use conf::Network;
use env::{Call, Verb};
use error::CniError;
use plugin::Plugin;

#[cfg(not(test))]
#[global_allocator]
static MEMORY: bump::Bump = bump::Bump;

/// The whole program, with its own name and its arguments; whether it succeeds.
fn succeeds(arguments: &[OsString]) -> bool {
    let begun = Instant::now();
    if let Some(outcome) = applet::run(arguments) {
        let Err(errors) = outcome else { return true };
        errors.iter().for_each(|error| note(error));
        return false;
    }
    let plugin = Plugin::of_program(arguments.first().map_or(OsStr::new(""), OsString::as_os_str));
    let variable = |name: &str| std::env::var_os(name);
    if variable("CNI_COMMAND").is_none_or(|command| command.is_empty()) {
        note(&spec::about(plugin.name()));
        return true;
    }
    // Nothing is told of a call before it is known whose node this is.
    let mut told = None;
    let outcome = Call::read(variable).and_then(|call| answer(plugin, &call, &mut told));
    let text = outcome.as_ref().map_or_else(ToString::to_string, String::clone);
    let mut stdout = io::stdout();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    if let Some((subnet_file, verb)) = told {
        report::tell(&subnet_file, verb, begun.elapsed(), outcome.as_ref().err());
    }
    written.is_ok() && outcome.is_ok()
}

/// What is printed when the call succeeds. `told` becomes the agent's subnet file and what was asked, for its figures.
fn answer(plugin: Plugin, call: &Call, told: &mut Option<(PathBuf, Verb)>) -> Result<String, CniError> {
    if call.verb == Verb::Version {
        return Ok(spec::versions());
    }
    let mut stdin = Vec::new();
    io::stdin()
        .read_to_end(&mut stdin)
        .map_err(|error| CniError::new(error::IO_FAILURE, format!("error reading from stdin: {error}")))?;
    let network = Network::parse(&stdin)?;
    spec::check(call.verb, network.version())?;
    if plugin != Plugin::Flannel {
        if matches!(call.verb, Verb::Add | Verb::Del) {
            call.check_netns()?;
        }
        return plugin.answer(call, &network, &String::from_utf8_lossy(&stdin));
    }
    *told = Some((PathBuf::from(&network.subnet_file), call.verb));
    match call.verb {
        Verb::Add => verbs::add(call, &network),
        Verb::Del => verbs::del(call, &network).map(|()| String::new()),
        Verb::Check => verbs::check(call, &network).map(|()| String::new()),
        Verb::Status => verbs::status(call, &network).map(|()| String::new()),
        Verb::Gc => gc::collect(call, &network).map(|()| String::new()),
        Verb::Version => Ok(spec::versions()),
    }
}

/// A message for the log of the container runtime. That it has no reader is no reason to fail.
fn note(message: &str) {
    let _ = writeln!(io::stderr(), "{}", error::bounded(message));
}
