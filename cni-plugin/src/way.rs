//! How a delegate is run: in this process where all of its configuration is implemented here, else as a program.

use std::ffi::OsStr;
use std::path::PathBuf;

use crate::bridge::{self, Pod, Reading, Witness};
use crate::conf::{Delegate, Network};
use crate::delegate::{self, Failure};
use crate::env::{Attachment, Call, Verb};
use crate::error::{self, CniError};
use crate::host_local::allocate::{Former, Origin};

/// How a delegate is run.
#[derive(Debug)]
pub(crate) enum ResolvedRoute {
    /// `bridge` with `host-local`.
    InProcess(Box<bridge::BridgeConfig>),
    /// A program in `CNI_PATH`.
    Program(PathBuf),
}

impl ResolvedRoute {
    /// Decides.
    ///
    /// # Errors
    /// Code 999 for a configuration that makes no sense, or a program that is not there: nothing was done.
    pub(crate) fn of(
        call: &Call,
        network: &Network,
        delegate: &Delegate,
        verb: Verb,
    ) -> Result<Self, CniError> {
        let mut member = None;
        if delegate.plugin == "bridge" && network.in_process && !call.exec {
            match bridge::BridgeConfig::read(&delegate.text, &call.args).map_err(failed)? {
                Reading::Implemented(config) => return Ok(Self::InProcess(config)),
                Reading::Foreign(found) => member = Some(found),
            }
        }
        delegate::find(&delegate.plugin, &call.path, verb).map(Self::Program).map_err(|error| match member {
            None => error,
            Some(member) => {
                let msg = format!("{}; the built-in bridge does not have {member:?}", error.msg);
                CniError { msg, ..error }
            }
        })
    }

    /// Connects a pod, of which there may be something from a `former` ADD; gives the result as it is printed. Of what a
    /// program does nothing is told to the `witness`.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) fn add(
        &self,
        call: &Call,
        network: &Network,
        delegate: &Delegate,
        former: Former,
        witness: &mut dyn Witness,
    ) -> Result<Vec<u8>, Failure> {
        match self {
            Self::InProcess(config) => {
                let attached = bridge::add(config, pod(call), former, witness).map_err(halfway)?;
                Ok(attached.text(network.version()).into_bytes())
            }
            Self::Program(program) => delegate::run(program, Verb::Add, &delegate.text),
        }
    }

    /// Disconnects the pod of this call, by a configuration of that `origin`.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) fn del(&self, call: &Call, delegate: &Delegate, origin: Origin) -> Result<(), Failure> {
        match self {
            Self::InProcess(config) => bridge::del(config, pod(call), origin).map_err(halfway),
            Self::Program(program) => delegate::run(program, Verb::Del, &delegate.text).map(drop),
        }
    }

    /// Disconnects a pod that is gone.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) fn del_gone(&self, delegate: &Delegate, attachment: &Attachment) -> Result<(), Failure> {
        match self {
            Self::InProcess(config) => {
                bridge::del(config, Pod { attachment, netns: OsStr::new("") }, Origin::Other).map_err(halfway)
            }
            Self::Program(program) => {
                delegate::run_for(program, Verb::Del, &delegate.text, Some(attachment)).map(drop)
            }
        }
    }

    /// Compares the pod of this call with the result of its ADD.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) fn check(&self, call: &Call, delegate: &Delegate) -> Result<(), Failure> {
        match self {
            Self::InProcess(config) => {
                bridge::check(config, pod(call), config.prev_result.as_ref()).map_err(halfway)
            }
            Self::Program(program) => delegate::run(program, Verb::Check, &delegate.text).map(drop),
        }
    }

    /// Says whether an ADD would succeed.
    ///
    /// # Errors
    /// Code 50, or the program's own error.
    pub(crate) fn status(&self, network: &Network, delegate: &Delegate) -> Result<(), CniError> {
        let unavailable = |error: CniError| CniError { code: error::NOT_AVAILABLE, ..error };
        let program = match self {
            Self::InProcess(config) => {
                return bridge::status(config).map_err(|error| unavailable(failed(error)));
            }
            Self::Program(program) => program,
        };
        if !delegate::speaks(program, network.version()).map_err(unavailable)? {
            let msg = format!(
                "{} does not speak CNI {}: it will refuse to add pods; install newer containernetworking plugins, or \
                 set \"cniVersion\" to what {:?} speaks",
                program.display(),
                network.version(),
                delegate.plugin
            );
            return Err(CniError::new(error::NOT_AVAILABLE, msg));
        }
        Ok(delegate::run(program, Verb::Status, &delegate.text).map(drop)?)
    }
}

/// The pod of a call.
pub(crate) fn pod(call: &Call) -> Pod<'_> {
    Pod { attachment: &call.attachment, netns: &call.netns }
}

fn failed(error: String) -> CniError {
    CniError::new(error::OTHER, error)
}

fn halfway(error: String) -> Failure {
    Failure::Halfway(failed(error))
}
