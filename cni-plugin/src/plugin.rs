//! The plugins that this program is, by the name that it is called by.

use std::ffi::OsStr;
use std::path::Path;

use crate::bridge::{self, Reading};
use crate::conf::Network;
use crate::env::{Call, Verb};
use crate::error::{self, CniError};
use crate::host_local::allocate::{Former, Origin};
use crate::way::pod;
use crate::{bandwidth, host_local, loopback, portmap};

/// One of the plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plugin {
    Flannel,
    Bridge,
    HostLocal,
    Loopback,
    Portmap,
    Bandwidth,
}

impl Plugin {
    /// Those that other projects have as well: installed only where they are missing.
    pub(crate) const COMMON: [Self; 5] =
        [Self::Bridge, Self::HostLocal, Self::Loopback, Self::Portmap, Self::Bandwidth];

    /// The name of its file.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Flannel => "flannel",
            Self::Bridge => "bridge",
            Self::HostLocal => "host-local",
            Self::Loopback => "loopback",
            Self::Portmap => "portmap",
            Self::Bandwidth => "bandwidth",
        }
    }

    /// The plugin of a program's name; `flannel` under all others.
    pub(crate) fn of_program(program: &OsStr) -> Self {
        let name = Path::new(program).file_name();
        let named = |plugin: &Self| name == Some(OsStr::new(plugin.name()));
        Self::COMMON.into_iter().find(named).unwrap_or(Self::Flannel)
    }

    /// What is printed when a call of one of the common plugins succeeds.
    ///
    /// # Errors
    /// Code 999, and 50 for STATUS, with the words of Go's plugins where they have some; 7 for a configuration
    /// that is not implemented.
    pub(crate) fn answer(self, call: &Call, network: &Network, stdin: &str) -> Result<String, CniError> {
        if call.verb == Verb::Gc && self != Self::Loopback {
            network.valid_attachments()?;
        }
        let outcome = match self {
            Self::Bridge => return bridge_answer(call, network, stdin),
            Self::HostLocal => host_local::answer(call, network, stdin),
            Self::Loopback => loopback::answer(call, network),
            Self::Portmap => portmap::answer(call, network, stdin),
            Self::Bandwidth => bandwidth::answer(call, network, stdin),
            Self::Flannel => Err("flannel is no common plugin".into()),
        };
        let code = if call.verb == Verb::Status { error::NOT_AVAILABLE } else { error::OTHER };
        outcome.map_err(|msg| CniError::new(code, msg))
    }
}

fn bridge_answer(call: &Call, network: &Network, stdin: &str) -> Result<String, CniError> {
    let failed = |msg: String| CniError::new(error::OTHER, msg);
    let config = match bridge::BridgeConfig::read(stdin, &call.args).map_err(failed)? {
        Reading::Implemented(config) => config,
        Reading::Foreign(member) => {
            let msg = format!(
                "this bridge does not have {member:?}: install the bridge of the containernetworking plugins in its \
                 place, or leave the member out"
            );
            return Err(CniError::new(error::BAD_NETWORK, msg));
        }
    };
    let nothing = |()| String::new();
    match call.verb {
        Verb::Add => {
            let attached = bridge::add(&config, pod(call), Former::Possible, &mut ()).map_err(failed)?;
            Ok(attached.text(network.version()))
        }
        Verb::Del => bridge::del(&config, pod(call), Origin::Other).map(nothing).map_err(failed),
        Verb::Check => {
            bridge::check(&config, pod(call), config.prev_result.as_ref()).map(nothing).map_err(failed)
        }
        Verb::Status => bridge::status(&config)
            .map(nothing)
            .map_err(|msg| CniError { code: error::NOT_AVAILABLE, ..failed(msg) }),
        Verb::Gc => {
            host_local::collect(&config.ipam, &network.valid_attachments()?).map(nothing).map_err(failed)
        }
        Verb::Version => Ok(String::new()),
    }
}
