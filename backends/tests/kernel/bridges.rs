//! What is heard of bridges and addresses, and what is left out: the ports of bridges, which come and go with pods.

use backends::kernel::netlink::BridgeListener;
use backends::testing::Namespace;

use super::notifications::ip_batch;
use super::*;

#[test]
fn bridges_and_addresses_are_heard_of_and_links_of_pods_are_not() {
    let namespace = Namespace::new().unwrap();
    namespace.run(|| {
        assert!(
            ip_batch("link add br0 type bridge\nlink add eth7 type veth peer name eth8").unwrap().success()
        );
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let heard = async |lines: &'static str, within: Duration| {
                // A new one each time, so that nothing of the step before is waiting.
                let listener = BridgeListener::open().unwrap();
                let ip = tokio::task::spawn_blocking(move || ip_batch(lines));
                assert!(ip.await.unwrap().unwrap().success(), "{lines}");
                tokio::time::timeout(within, listener.moved()).await.is_ok()
            };
            // As long as no link is up: such links get addresses of their own, and the kernel tells of their state up to a second later.
            let pod = "link add pod1 type veth peer name peer1\nlink set pod1 alias pod\nlink del pod1";
            assert!(!heard(pod, Duration::from_millis(300)).await);
            for lines in [
                "link set br0 up",
                "link set br0 address 02:00:00:00:00:07",
                "addr add 192.0.2.7/24 dev eth7",
                "addr del 192.0.2.7/24 dev eth7",
                "addr add fd00::7/64 dev eth7 nodad",
                "link add br1 type bridge",
                "link del br1",
            ] {
                assert!(heard(lines, TIMEOUT).await, "not heard of: {lines}");
            }
        });
    });
}

#[test]
fn a_device_of_another_program_with_the_tunnels_name_gives_way_and_is_named() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let desired = agent.desired(&leases(&agent.network, 1));
    machine.namespace().ip("link add flannel.1 type bridge").unwrap();
    let replaced = agent.converge(&desired).replaced;
    let [said] = &replaced[..] else { panic!("{replaced:?}") };
    assert!(said.starts_with("flannel.1 was a device of the kind bridge"), "{said}");
    assert!(agent.show("ip", "-d link show flannel.1").contains("vxlan id 1"));
    machine.namespace().ip("link del flannel.1").unwrap();
    assert_eq!(agent.converge(&desired).replaced, [""; 0], "nothing of another program was there");
}

#[test]
fn an_interface_is_found_by_its_further_names() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    machine.namespace().ip("link property add dev eth0 altname the-port-of-the-second-slot").unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let desired = agent.desired(&leases(&agent.network, 1));
    let host = agent.converge(&desired).observed.host;
    assert_eq!(host.link("the-port-of-the-second-slot").map(|link| link.name.as_str()), Some("eth0"));
}
