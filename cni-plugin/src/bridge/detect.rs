//! Waiting until it is known that no other machine has an address of the pod.

use std::time::Duration;

use crate::netlink::address::Detection;
use crate::netlink::link::Link;
use crate::netlink::listen::until_detected;
use crate::netlink::socket::Socket;
use crate::netns::Namespace;

/// As long as Go's plugin waits.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Waits until all addresses of the pod's end can be used, the link-local one as well: the pod asks for MACs with it. `socket` is
/// in the pod's namespace.
///
/// # Errors
/// A sentence, with the words of Go's plugin for what took too long.
pub(super) fn wait(
    namespace: &Namespace,
    socket: &mut Socket,
    end: &Link,
    bridge: &Link,
) -> Result<(), String> {
    let name = &end.name;
    let failed = |why: String| format!("failed to settle address on {name}: {why}");
    let detection = namespace
        .within(|| until_detected(socket, end.index, TIMEOUT))
        .map_err(|error| format!("error switching to the namespace of the pod: {error}"))?
        .map_err(|errno| failed(errno.to_string()))?;
    match detection {
        Detection::Done => Ok(()),
        Detection::UnderWay => Err(failed(format!(
            "link {name} still has tentative addresses after {} seconds",
            TIMEOUT.as_secs()
        ))),
        Detection::Duplicate(address) => Err(failed(format!(
            "{address} is a duplicate: another machine on the bridge {:?} has this address; remove it there",
            bridge.name
        ))),
    }
}
