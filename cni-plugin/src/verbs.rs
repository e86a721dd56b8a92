//! What each verb does (contract §7.5).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use subnet::gojson;

use crate::bridge::Witness;
use crate::conf::{Delegate, Network};
use crate::delegate::Failure;
use crate::env::{Call, Verb};
use crate::error::{self, CniError};
use crate::host_local::allocate::Origin;
use crate::policy::Handshake;
use crate::result::pretty;
use crate::saved::{self, Saved};
use crate::way::ResolvedRoute;
use crate::{gc, node, note, policy};

/// Connects a pod; gives the delegate's result.
///
/// After a failure the configuration stays where it was kept: the delegate may have reserved an address
/// already, and the runtime follows up with DEL.
pub(crate) fn add(call: &Call, network: &Network) -> Result<String, CniError> {
    call.check_netns()?;
    let node = node::wait(&network.subnet_file, network.wait)
        .map_err(|error| CniError::new(error::TRY_AGAIN_LATER, error))?;
    let delegate = network.delegate(&node)?;
    let way = ResolvedRoute::of(call, network, &delegate, Verb::Add)?;
    let (file, former) = saved::keep(&network.data_dir, &call.attachment, &delegate)?;
    let mut handshake =
        node.policy_socket.as_deref().map(|socket| Handshake::new(socket, call, network.policy_wait));
    let mut untold = ();
    let witness: &mut dyn Witness = match &mut handshake {
        Some(handshake) => handshake,
        None => &mut untold,
    };
    let output = way.add(call, network, &delegate, former, witness).map_err(|failure| {
        if let Failure::Nothing(_) = failure {
            removed(saved::remove(&file));
        }
        CniError::from(failure)
    })?;
    let result = result(&output, &delegate.plugin, network.version())?;
    if let Some(handshake) = handshake {
        handshake.conclude(&result).inspect_err(|_| undo(&way, call, &delegate, &file))?;
    }
    Ok(pretty(&result))
}

/// Takes back what an ADD made whose pod must not start. The runtime's DEL does it again; a pod that the runtime
/// keeps in spite of the failure has no network meanwhile.
fn undo(way: &ResolvedRoute, call: &Call, delegate: &Delegate, file: &Path) {
    match way.del(call, delegate, Origin::Other) {
        Ok(()) => removed(saved::remove(file)),
        Err(failure) => note(&format!("left for DEL: {}", CniError::from(failure).msg)),
    }
}

/// Disconnects a pod. What was kept goes only when the delegate has succeeded, so that the runtime's next
/// try finds it; and what can't be read is written again, so that no address stays reserved.
pub(crate) fn del(call: &Call, network: &Network) -> Result<(), CniError> {
    call.check_netns()?;
    match find(call, network) {
        Saved::Config(file, delegate) => {
            let earlier = earlier(call, network, &file);
            let origin = if earlier.is_none() { Origin::OnlyAdd } else { Origin::Other };
            run_del(call, network, &delegate, origin)?;
            forget(call, &delegate, &file, earlier);
        }
        Saved::Broken(file, why) => {
            note(&format!("{}: {why}: taking the pod down by the network configuration", file.display()));
            let delegate = anew(network)?;
            run_del(call, network, &delegate, Origin::Other)?;
            forget(call, &delegate, &file, earlier(call, network, &file));
        }
        Saved::Nothing => del_unknown(call, network)?,
    }
    saved::tidy(&network.data_dir, &call.attachment);
    // Only now: the agent leaves addresses alone that it knows nothing of.
    if let Some(socket) = policy_socket(network) {
        policy::release(&socket, &call.attachment, &call.args);
    }
    Ok(())
}

/// The file that may be of an ADD before that of `file`.
fn earlier(call: &Call, network: &Network, file: &Path) -> Option<PathBuf> {
    saved::earlier(&network.data_dir, &call.attachment, &network.name, file)
}

/// Removes what was kept for an attachment that is gone: its file, and that of an `earlier` ADD. This is told from the file
/// of another attachment of the container by the addresses, which that one would still hold.
fn forget(call: &Call, delegate: &Delegate, file: &Path, earlier: Option<PathBuf>) {
    removed(saved::remove(file));
    if let Some(earlier) = earlier.filter(|_| gc::holds_nothing(delegate, &call.attachment.container)) {
        removed(saved::remove(&earlier));
    }
}

/// Where the agent is told about pods that are gone, if `subnet.env` is there and names it.
fn policy_socket(network: &Network) -> Option<PathBuf> {
    node::read(&network.subnet_file).ok()?.policy_socket
}

/// DEL without a trace of an ADD: perhaps it was lost, perhaps there was none. There was none for certain
/// when this configuration could not have been used, and a pod must not be stuck for that.
fn del_unknown(call: &Call, network: &Network) -> Result<(), CniError> {
    let Ok(delegate) = anew(network) else { return Ok(()) };
    let Ok(way) = ResolvedRoute::of(call, network, &delegate, Verb::Del) else { return Ok(()) };
    match way.del(call, &delegate, Origin::Other) {
        Err(Failure::Nothing(error)) if error.code == error::INCOMPATIBLE_VERSION => Ok(()),
        outcome => Ok(outcome?),
    }
}

fn run_del(call: &Call, network: &Network, delegate: &Delegate, origin: Origin) -> Result<(), CniError> {
    Ok(ResolvedRoute::of(call, network, delegate, Verb::Del)?.del(call, delegate, origin)?)
}

/// Has the delegate compare the pod with the result of its ADD.
pub(crate) fn check(call: &Call, network: &Network) -> Result<(), CniError> {
    let delegate = match find(call, network) {
        Saved::Config(_, delegate) => delegate,
        // What was kept is gone, but the pod may be as it should.
        Saved::Nothing | Saved::Broken(..) => {
            let node = node::read(&network.subnet_file)
                .map_err(|error| CniError::new(error::TRY_AGAIN_LATER, error))?;
            network.delegate(&node)?
        }
    };
    let delegate = network.for_check(delegate);
    Ok(ResolvedRoute::of(call, network, &delegate, Verb::Check)?.check(call, &delegate)?)
}

/// Says whether an ADD would succeed: this node has a subnet, the delegate is there, and it says so itself
/// if it knows how to.
pub(crate) fn status(call: &Call, network: &Network) -> Result<(), CniError> {
    let unavailable = |error: CniError| CniError { code: error::NOT_AVAILABLE, ..error };
    let node =
        node::read(&network.subnet_file).map_err(|error| CniError::new(error::NOT_AVAILABLE, error))?;
    let delegate = network.delegate(&node).map_err(unavailable)?;
    saved::check_writable(&network.data_dir).map_err(unavailable)?;
    ResolvedRoute::of(call, network, &delegate, Verb::Status)
        .map_err(unavailable)?
        .status(network, &delegate)?;
    match &node.policy_socket {
        Some(socket) => policy::status(socket).map_err(|error| CniError::new(error::NOT_AVAILABLE, error)),
        None => Ok(()),
    }
}

fn find(call: &Call, network: &Network) -> Saved {
    saved::find(&network.data_dir, &call.attachment, &network.name)
}

fn anew(network: &Network) -> Result<Delegate, CniError> {
    network.delegate_for_del(node::read(&network.subnet_file).ok())
}

fn removed(outcome: Result<(), String>) {
    if let Err(error) = outcome {
        note(&error);
    }
}

/// The delegate's result, with the version if the delegate left it out.
fn result(output: &[u8], plugin: &str, version: &str) -> Result<Value, CniError> {
    let mut result: Map<String, Value> = serde_json::from_slice(output).map_err(|error| {
        let said = gojson::shortened(&String::from_utf8_lossy(output));
        let msg = format!(
            "failed to delegate add: plugin {plugin:?} succeeded, but what it printed is no CNI result: {error}: {said:?}"
        );
        CniError::new(error::OTHER, msg)
    })?;
    result.entry("cniVersion").or_insert_with(|| version.into());
    Ok(result.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_result_is_indented_by_four_and_keeps_what_this_plugin_does_not_know() {
        let given = br#"{"ips":[{"address":"10.244.1.2/24","  new\n ":[]}],"cniVersion":"1.0.0"}"#;
        let expected = "{\n    \"cniVersion\": \"1.0.0\",\n    \"ips\": [\n        {\n            \"  new\\n \": [],\n            \
                        \"address\": \"10.244.1.2/24\"\n        }\n    ]\n}";
        assert_eq!(pretty(&result(given, "bridge", "0.3.1").unwrap()), expected);
        assert_eq!(pretty(&result(b"{}", "bridge", "0.3.1").unwrap()), "{\n    \"cniVersion\": \"0.3.1\"\n}");
    }

    #[test]
    fn a_delegate_without_a_result_is_named() {
        for output in ["", "ok", "[]"] {
            let error = result(output.as_bytes(), "mine", "1.0.0").unwrap_err();
            assert!(error.code == 999 && error.msg.contains("\"mine\""), "{}", error.msg);
        }
    }

    proptest! {
        #[test]
        fn printing_changes_nothing_but_spaces(key in ".*", text in ".*", number: i64) {
            let given = serde_json::json!({key: [text, {"n": number}], "cniVersion": "1.0.0"});
            let printed = pretty(&result(given.to_string().as_bytes(), "p", "1.0.0").unwrap());
            prop_assert_eq!(serde_json::from_str::<Value>(&printed).unwrap(), given);
        }

        #[test]
        fn arbitrary_output_never_panics(output: Vec<u8>) {
            let _ = result(&output, "p", "1.0.0");
        }
    }
}
