//! What wakes the agent: damage and news, and neither its own work nor strangers.

use super::*;

pub(super) fn ip_batch(lines: &str) -> std::io::Result<std::process::ExitStatus> {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    child.stdin.take().expect("it is piped").write_all(lines.as_bytes())?;
    child.wait()
}

/// Of these, nothing has to be put right.
const HARMLESS: &[&str] = &[
    // Our own work, seen from outside: it is what should be there.
    "route replace 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink proto 70",
    "neigh replace 10.244.7.0 lladdr 02:00:00:00:00:07 dev flannel.1 nud permanent",
    // Pods come and go, others route.
    "link add pod7 type veth peer name peer7\nlink set pod7 up\nlink del pod7",
    "link add br8 type bridge\nlink add pod8 type veth peer name peer8\nlink set pod8 master br8\nlink del pod8\nlink del br8",
    "route add 192.168.9.0/24 via 172.31.0.254\nroute del 192.168.9.0/24",
    "route add 10.244.7.0/24 via 172.31.0.254 table 99\nroute flush table 99",
    "link add br7 type bridge\naddr add 192.168.8.1/24 dev br7\nlink set br7 up\nlink del br7",
];

/// Each of these has to be put right.
const DAMAGE: &[&str] = &[
    "route del 10.244.7.0/24",
    "route replace 10.244.8.0/24 via 172.31.0.254",
    "route add 10.244.99.0/24 via 172.31.0.254 proto 70",
    "neigh del 10.244.7.0 dev flannel.1",
    "neigh replace 10.244.8.0 lladdr 02:00:00:00:00:07 dev flannel.1 nud permanent",
    "link set flannel.1 mtu 1300",
    "addr add 10.244.99.9/32 dev flannel.1",
    "addr del 10.244.1.0/32 dev flannel.1",
    "link set eth0 mtu 1400",
    "addr add 172.31.0.77/24 dev eth0",
    "link set flannel.1 down",
    "link del flannel.1",
    "link set eth0 down",
];

#[test]
fn the_kernel_wakes_us_for_damage_and_neither_for_our_own_work_nor_for_strangers() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let desired = Arc::new(agent.desired(&leases(&agent.network, 20)));
    agent.converge(&desired);
    watched(&agent, desired, HARMLESS, DAMAGE);
}

#[test]
fn a_device_of_another_program_that_goes_wakes_us_while_the_kernel_refuses_one_of_ours() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let desired = Arc::new(agent.desired(&leases(&agent.network, 2)));
    agent.converge(&desired);
    let (comes, goes) = ("link add br9 type bridge", "link del br9");
    let refused = NotificationFilter { refused: true, ..filter(&agent, &desired) };
    watched_with(&agent, refused, &[comes], &[goes]);
    watched_with(&agent, filter(&agent, &desired), &[comes, goes], &[]);
}

/// What an agent cares about that desires this.
fn filter(agent: &Agent<'_>, desired: &Arc<KernelState>) -> NotificationFilter {
    let host = agent.machine.namespace().run(|| {
        let mut kernel = Netlink::open().unwrap();
        kernel.observe(desired, &Scope::default()).unwrap().host
    });
    NotificationFilter {
        desired: Arc::clone(desired),
        host: Arc::new(host),
        scope: agent.scope(),
        ..NotificationFilter::default()
    }
}

/// Has the listener hear of each of these, and checks whether it wakes the agent.
pub(super) fn watched(
    agent: &Agent<'_>,
    desired: Arc<KernelState>,
    harmless: &[&'static str],
    damage: &[&'static str],
) {
    watched_with(agent, filter(agent, &desired), harmless, damage);
}

/// The same with this filter.
fn watched_with(
    agent: &Agent<'_>,
    filter: NotificationFilter,
    harmless: &[&'static str],
    damage: &[&'static str],
) {
    let machine = agent.machine;
    let notified = Mutex::new(Notified::new(filter));
    machine.namespace().run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = Listener::open().unwrap();
            let moved = tokio::sync::Notify::new();
            let wakes = |lines: &'static str, within: Duration| {
                let (moved, ip) = (&moved, tokio::task::spawn_blocking(move || ip_batch(lines)));
                async move {
                    assert!(ip.await.unwrap().unwrap().success(), "{lines}");
                    tokio::time::timeout(within, moved.notified()).await.is_ok()
                }
            };
            let driver = listener.run(&notified, &moved);
            let script = async {
                for lines in harmless {
                    // The kernel has notified by the time that the command ends.
                    assert!(!wakes(lines, Duration::from_millis(300)).await, "woken by: {lines}");
                }
                for lines in damage {
                    assert!(wakes(lines, TIMEOUT).await, "not woken by: {lines}");
                }
            };
            tokio::select! {
                error = driver => panic!("{error}"),
                () = script => {}
            }
        });
    });
}

#[test]
fn what_is_notified_while_the_host_is_read_is_compared_with_what_was_read() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let agent = Agent::new(&machine, VXLAN);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut kernel, listener) = machine.namespace().run(|| {
        let _inside = runtime.enter();
        (Netlink::open().unwrap(), Listener::open().unwrap())
    });
    let mut read = || {
        let host = Arc::new(kernel.observe(&KernelState::default(), &Scope::default()).unwrap().host);
        NotificationFilter { host, scope: agent.scope(), ..NotificationFilter::default() }
    };
    let mtu = |filter: &NotificationFilter| filter.host.link("eth0").unwrap().mtu;
    let before = read();
    assert_eq!(mtu(&before), 1500);
    let notified = Mutex::new(Notified::new(before));

    notified.lock().unwrap().begin_read();
    machine.set_mtu(1400).unwrap();
    let during = read();
    assert_eq!(mtu(&during), 1400);
    machine.set_mtu(1500).unwrap();
    runtime.block_on(async {
        let moved = tokio::sync::Notify::new();
        tokio::select! {
            // First, so that it hears of both changes before it is looked at what came of them.
            biased;
            error = listener.run(&notified, &moved) => panic!("{error}"),
            heard = tokio::time::timeout(TIMEOUT, moved.notified()) => heard.unwrap(),
        }
    });
    let mut notified = notified.into_inner().unwrap();
    assert!(notified.renew(during), "the MTU is 1500 again");
    let after = read();
    assert_eq!(mtu(&after), 1500);
    assert!(!notified.renew(after), "nothing is read any more");
}
