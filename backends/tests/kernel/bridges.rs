//! What is heard of bridges and addresses, and what is left out: the ports of bridges, which come and go with pods.

use backends::kernel::netlink::BridgeListener;
use backends::testing::Namespace;

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
            // As long as nothing gets an address of its own, which links do that are up.
            let pod = "link add pod1 type veth peer name peer1\nlink set pod1 alias pod\nlink del pod1";
            assert!(!heard(pod, Duration::from_millis(300)).await);
        });
    });
}
