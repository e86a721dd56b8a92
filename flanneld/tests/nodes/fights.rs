//! Two agents of one host that undo each other's work: held back, counted, told at both ends, and harmless otherwise.

use std::path::Path;
use std::time::Duration;

use backends::testing::{Agent, Fabric, Signal, wait_for};

use crate::bed::{LIMIT, Member, flanneld};

/// Until a pause of 16 s has come about.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Each of a dozen objects is put right sixteen times until then; without end, it would be 20 lines a second.
const MAX_LINES: usize = 120;

fn store(directory: &Path) -> String {
    format!("--lease-store=file:{}", directory.display())
}

/// What an agent says of its fights.
fn notes(agent: &Agent) -> String {
    agent.get("/readyz?verbose").map(|(_, body)| body).unwrap_or_default()
}

fn is_told(agent: &Agent) -> bool {
    notes(agent).contains("something else on this host undoes it")
}

/// Whether it waits so long that the fight costs neither of them much, however long the other one waits.
fn is_held_back(agent: &Agent) -> bool {
    let text = notes(agent);
    is_told(agent) && ["waits 16 s", "waits 32 s", "waits 60 s"].iter().any(|wait| text.contains(wait))
}

/// Two agents with two stores on the host of the first, with these configurations.
fn fight(ours: &str, theirs: &str) {
    let fabric = Fabric::new().unwrap();
    let (x, y) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(x.path().join("config.json"), ours).unwrap();
    std::fs::write(y.path().join("config.json"), theirs).unwrap();
    let join = || {
        let mut member =
            Member::start_with_env(fabric.node().unwrap(), &[store(x.path()), "--ip-masq".into()], &[]);
        member.agent.wait_ready(LIMIT).unwrap();
        member
    };
    let (mut a, b) = (join(), join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let reaches = || pod_a.namespace().reaches(pod_b.address()).unwrap();
    a.wait("the first echo between pods", reaches);
    let before = a.state();

    let args = [
        store(y.path()),
        format!("--subnet-file={}", a.node.dir().join("second.env").display()),
        "--healthz-port=8082".to_owned(),
    ];
    let mut second = Agent::spawn(&a.node, flanneld(), args).unwrap();
    let is_damped = || is_held_back(&a.agent) || is_held_back(&second);
    let is_over = || is_damped() && is_told(&a.agent) && is_told(&second);
    if let Err(error) = wait_for("the fight to be damped, and told by both", TIMEOUT, is_over) {
        panic!("{error}: {}\n{}\n{}", notes(&a.agent), notes(&second), second.log());
    }
    for agent in [&a.agent, &second] {
        let lines = agent.log().lines().count();
        assert!(lines <= MAX_LINES, "{lines} lines:\n{}", agent.log());
        assert_eq!(agent.get("/healthz").unwrap().0, 200);
    }

    // What is not fought over is put right at once.
    if ours.contains("vxlan") {
        a.ip("link set flannel.1 mtu 1300");
        a.wait("the MTU", || a.show("ip link show flannel.1").contains("mtu 1450"));
    }
    assert!(is_damped() && is_told(&a.agent), "meanwhile: {}\n{}", notes(&a.agent), notes(&second));
    std::fs::remove_file(a.node.subnet_file()).unwrap();
    // Otherwise it is looked at once a minute.
    a.agent.process().signal(Signal::HUP).unwrap();
    a.wait("the subnet file", || a.node.subnet_file().exists());
    // So is another peer's lease.
    let c = join();
    a.wait("the new peer", || a.agent.log().contains("peers usable=2"));
    drop(c);

    // Both remember it: the one that is held back longer does not lose for good.
    assert!(is_told(&second), "{}", notes(&second));
    second.terminate(LIMIT).unwrap();
    let theirs = format!("--subnet-file={}", a.node.dir().join("second.env").display());
    a.node.namespace().command(flanneld()).args(["cleanup", &theirs]).ok().unwrap();
    if let Err(error) =
        wait_for("everything as it was", TIMEOUT, || reaches() && a.state().contains(&before_of(&before)))
    {
        panic!("{error}: {}\nbefore:\n{before}\nnow:\n{}", notes(&a.agent), a.state());
    }
}

/// The route to the first peer, which stands for what was fought over.
fn before_of(state: &str) -> String {
    let route = state.lines().find(|line| line.starts_with("10.244.") && line.contains(" via "));
    route.unwrap_or_else(|| panic!("no route to a peer:\n{state}")).to_owned()
}

#[test]
fn two_agents_with_one_device_are_held_back_and_told_at_both_ends_while_all_else_goes_on() {
    let vxlan = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    fight(vxlan, vxlan);
}

#[test]
fn two_agents_with_one_device_and_two_networks_are_held_back_likewise() {
    let vxlan = |network| format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#);
    fight(&vxlan("10.244.0.0/16"), &vxlan("10.245.0.0/16"));
}

#[test]
fn two_agents_with_the_same_routes_are_held_back_likewise() {
    let host_gw = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;
    fight(host_gw, host_gw);
}
