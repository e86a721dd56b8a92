//! The task in a network namespace, with an API server that follows a script.

mod given_up;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backends::testing::Namespace;
use serde_json::{Value, json};
use subnet::kube::{Kube, KubeOptions};
use subnet::testing::{ApiServer, Refusal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};

use super::announce::{Announcement, Announcer, EndedSandbox, OldConnections, Retry};
use super::task::CONDITION;
use super::*;
use crate::serve::Health;

/// Long enough for a machine that does something else.
const LIMIT: Duration = Duration::from_secs(30);

/// A node with its task.
struct Bed {
    server: ApiServer,
    files: tempfile::TempDir,
    facts: watch::Sender<Option<PolicyFacts>>,
    running: Option<Running>,
}

struct Running {
    announcer: Announcer,
    health: Health,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs a test in a namespace of its own.
fn within(test: impl AsyncFnOnce(Bed) + Send) {
    let namespace = Namespace::new().unwrap();
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let net = |text: &str| text.parse().unwrap();
            let facts = PolicyFacts {
                networks: vec![net("10.244.0.0/16")],
                subnets: vec![net("10.244.1.0/24")],
                nodes: ["10.244.1.0".parse().unwrap(), "10.244.1.1".parse().unwrap()].into(),
            };
            let bed = Bed {
                server: ApiServer::local().unwrap(),
                files: tempfile::tempdir().unwrap(),
                facts: watch::Sender::new(Some(facts)),
                running: None,
            };
            bed.server.put_namespace("shop", &[]);
            test(bed).await;
        });
    });
}

fn pod(name: &str, address: Option<&str>) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": name, "uid": uid(name), "labels": {"app": name}},
        "spec": {"nodeName": "n1"},
        "status": {"phase": "Running", "podIP": address},
    })
}

fn uid(name: &str) -> String {
    format!("{:0>32}", name.bytes().map(|byte| format!("{byte:x}")).collect::<String>())
}

fn announced(name: &str, container: &str, address: &str) -> Announcement {
    Announcement {
        namespace: "shop".into(),
        pod: name.into(),
        uid: uid(name),
        container: container.into(),
        host_interface: "veth0".into(),
        mac: None,
        addresses: vec![address.parse().unwrap()],
    }
}

fn ended(name: &str, container: &str) -> EndedSandbox {
    EndedSandbox { namespace: "shop".into(), pod: name.into(), uid: uid(name), container: container.into() }
}

impl Bed {
    async fn start(&mut self, mode: PolicyMode) {
        self.running = None;
        let options = KubeOptions {
            node_name: Some("n1".into()),
            pod: None,
            kubeconfig: None,
            api_url: Some(self.server.url()),
            annotation_prefix: "flannel.alpha.coreos.com".into(),
            net_config_path: self.files.path().join("net-conf.json"),
            set_network_unavailable: false,
        };
        let api = Kube::new(options).await.unwrap().policy_api();
        let (announcer, requests) = Announcer::channel();
        let health = Health::new(Duration::from_secs(60), []);
        let policy = PolicyOptions {
            mode,
            steer: SteerMode::Auto,
            mark_shift: 24,
            log_group: None,
            fast_path: crate::fast_path::FastPathMode::Off,
        };
        let task = Policies::open(
            policy,
            api,
            &self.subnet_file(),
            self.facts.subscribe(),
            requests,
            health.clone(),
            Arc::default(),
        )
        .unwrap();
        let task = tokio::spawn(async move { drop(task.run().await) });
        self.running = Some(Running { announcer, health, task });
    }

    async fn start_ready(&mut self, mode: PolicyMode) {
        self.start(mode).await;
        self.wait("ready", |bed| bed.reason().is_none()).await;
    }

    fn subnet_file(&self) -> std::path::PathBuf {
        self.files.path().join("subnet.env")
    }

    fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    fn reason(&self) -> Option<String> {
        self.running().health.all().0.remove(CONDITION)?.err()
    }

    fn figure(&self, name: &str) -> u64 {
        let text = crate::status::metrics::text(self.running().health.status(crate::status::Depth::Known));
        let line =
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(str::to_owned);
        line.and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// Waits until this holds, of what can't be waited for.
    async fn wait(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds(self) {
            assert!(Instant::now() < end, "never {what}: {:?}\n{}", self.reason(), table());
            sleep(Duration::from_millis(2)).await;
        }
    }

    async fn announce(&self, pod: Announcement) -> Result<OldConnections, Retry> {
        self.running().announcer.announce(pod).await
    }
}

fn nft(args: &[&str]) -> String {
    let output = std::process::Command::new("nft").args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The table, but for what goes by itself.
fn table() -> String {
    let text = nft(&["list", "table", "inet", "flannel-policy"]);
    text.lines().filter(|line| !line.contains("expires")).collect::<Vec<_>>().join("\n")
}

/// Whether the pod with this address is isolated in the kernel.
fn isolated(address: &str) -> bool {
    nft(&["list", "set", "inet", "flannel-policy", "pol4"]).contains(address)
}

const DENY: &str = r#"{"podSelector": {}}"#;

fn deny() -> Value {
    serde_json::from_str(DENY).unwrap()
}

#[test]
fn a_pod_is_in_the_kernel_when_its_announcement_is_answered_and_out_of_it_after_its_release() {
    within(async |mut bed| {
        bed.server.put_policy("shop", "deny", deny());
        bed.server.put_pod_object(pod("web", None));
        bed.start_ready(PolicyMode::On).await;
        assert!(table().contains("chain forward") && !isolated("10.244.1.2"));
        bed.announce(announced("web", "c1", "10.244.1.2")).await.unwrap();
        assert!(isolated("10.244.1.2"), "{}", table());
        // A sandbox that was replaced: the DEL of the first comes late.
        bed.announce(announced("web", "c2", "10.244.1.3")).await.unwrap();
        bed.running().announcer.release(ended("web", "c1")).await.unwrap();
        assert!(isolated("10.244.1.3") && !isolated("10.244.1.2"), "{}", table());
        // The object names the address from now on, and its pod has given it back.
        bed.server.put_pod_object(pod("web", Some("10.244.1.3")));
        bed.running().announcer.release(ended("web", "c2")).await.unwrap();
        assert!(!isolated("10.244.1.3"), "{}", table());
        // Who gets it next is somebody else.
        bed.server.put_pod_object(pod("db", None));
        bed.announce(announced("db", "c3", "10.244.1.3")).await.unwrap();
        assert!(isolated("10.244.1.3"));
        assert_eq!(bed.figure("flannel_policy_add_seconds_count"), 3);
    });
}

#[test]
fn connections_of_an_address_from_before_its_pod_are_forgotten_and_no_others() {
    within(async |mut bed| {
        bed.server.put_policy("shop", "deny", deny());
        bed.server.put_pod_object(pod("web", None));
        bed.start_ready(PolicyMode::On).await;
        let run = |program: &str, line: &str| {
            let output = std::process::Command::new(program).args(line.split(' ')).output().unwrap();
            assert!(output.status.success(), "{program} {line}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        run("ip", "link set lo up");
        run("nft", "add table inet t");
        run("nft", "add chain inet t o { type filter hook output priority 0 ; }");
        run("nft", "add rule inet t o ct state new counter");
        for host in [2, 3, 99] {
            run("ip", &format!("address add 10.244.1.{host}/32 dev lo"));
        }
        for (from, to) in [(99, 2), (2, 3), (99, 3)] {
            run("ping", &format!("-n -c1 -W5 -I 10.244.1.{from} 10.244.1.{to}"));
        }
        let tracked = |address: &str| {
            let table = run("cat", "/proc/net/nf_conntrack");
            table.lines().filter(|line| line.contains(&format!("={address} "))).count()
        };
        let both = || (tracked("10.244.1.2"), tracked("10.244.1.3"));
        assert_eq!(both(), (2, 2), "{}", run("cat", "/proc/net/nf_conntrack"));
        let web = announced("web", "c1", "10.244.1.2");
        // With a second family the plugin has to do it.
        let two =
            Announcement { addresses: vec![web.addresses[0], "fd00::2".parse().unwrap()], ..web.clone() };
        assert_eq!(bed.announce(two).await, Ok(OldConnections::Kept));
        assert_eq!(both(), (2, 2));
        assert_eq!(bed.announce(web).await, Ok(OldConnections::Forgotten));
        assert_eq!(both(), (0, 1), "{}", run("cat", "/proc/net/nf_conntrack"));
    });
}

#[test]
fn a_pod_and_a_policy_that_no_watch_has_told_of_yet_are_asked_for() {
    within(async |mut bed| {
        bed.server.put_policy("shop", "other", json!({"podSelector": {"matchLabels": {"app": "other"}}}));
        bed.start_ready(PolicyMode::On).await;
        bed.wait("watches", |bed| bed.server.watching() == 3).await;
        bed.server.deafen();
        bed.server.put_policy("shop", "deny", deny());
        bed.server.put_pod_object(pod("web", None));
        bed.announce(announced("web", "c1", "10.244.1.2")).await.unwrap();
        assert!(isolated("10.244.1.2"), "{}", table());
    });
}

#[test]
fn pods_that_start_at_once_share_readings_of_their_namespaces_policies() {
    within(async |mut bed| {
        bed.server.put_policy("shop", "deny", deny());
        bed.start_ready(PolicyMode::On).await;
        let names: Vec<String> = (0..40).map(|number| format!("web{number}")).collect();
        names.iter().for_each(|name| bed.server.put_pod_object(pod(name, None)));
        let lists = |bed: &Bed| {
            let of_shop = |path: &str| path.contains("/namespaces/shop/networkpolicies");
            bed.server.requests().iter().filter(|request| of_shop(&request.path)).count()
        };
        assert_eq!(lists(&bed), 0);
        let mut adds = JoinSet::new();
        for (number, name) in names.iter().enumerate() {
            let pod = announced(name, &format!("c{number}"), &format!("10.244.1.{}", number + 2));
            let announcer = bed.running().announcer.clone();
            adds.spawn(async move { announcer.announce(pod).await });
        }
        assert_eq!(adds.join_all().await, vec![Ok(OldConnections::Forgotten); names.len()]);
        assert!((2..=41).all(|host| isolated(&format!("10.244.1.{host}"))), "{}", table());
        // The first one's, and the next one's for those that came during that. Others may have come after them.
        assert!((1..=20).contains(&lists(&bed)), "{}", lists(&bed));
    });
}

#[test]
fn a_pod_that_the_api_knows_otherwise_is_refused_with_what_it_says() {
    within(async |mut bed| {
        bed.start_ready(PolicyMode::Strict).await;
        let why = bed.announce(announced("web", "c1", "10.244.1.2")).await.unwrap_err().why;
        assert!(why.contains("no pod shop/web"), "{why}");
        bed.server.put_pod_object(pod("web", None));
        let other = Announcement { uid: uid("another"), ..announced("web", "c1", "10.244.1.2") };
        let why = bed.announce(other).await.unwrap_err().why;
        assert!(why.contains("another pod shop/web"), "{why}");
        let macvlan = Announcement { host_interface: String::new(), ..announced("web", "c1", "10.244.1.2") };
        let why = bed.announce(macvlan).await.unwrap_err().why;
        assert!(why.contains("macvlan"), "{why}");
        assert!(!table().contains("10.244.1.2"), "{}", table());
        bed.announce(announced("web", "c1", "10.244.1.2")).await.unwrap();
        assert!(table().contains("10.244.1.2"), "strict mode knows the addresses that were announced");
        assert_eq!(bed.figure("flannel_policy_add_failures_total"), 3);
    });
}

#[test]
fn a_restart_goes_on_from_what_was_announced_and_opens_nothing_before_all_is_listed() {
    within(async |mut bed| {
        let from_bank = json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "bank"}}}]}]});
        bed.server.put_policy("shop", "bank", from_bank);
        bed.server.put_namespace("bank", &[("team", "bank")]);
        let mut far = pod("till", Some("10.244.9.9"));
        far["metadata"]["namespace"] = "bank".into();
        far["spec"]["nodeName"] = "n9".into();
        bed.server.put_pod_object(far);
        bed.server.put_pod_object(pod("web", None));
        bed.start_ready(PolicyMode::On).await;
        bed.announce(announced("web", "c1", "10.244.1.2")).await.unwrap();
        assert!(isolated("10.244.1.2") && table().contains("10.244.9.9"), "{}", table());
        let before = table();

        // The pods of the other namespace can't be listed: what they were stays in force.
        let refusal = Refusal {
            method: "GET",
            path: "/namespaces/bank/pods".into(),
            status: 500,
            message: "no".into(),
        };
        bed.server.behave(|behaviour| behaviour.refusals.push(refusal));
        bed.start(PolicyMode::On).await;
        bed.wait("the reason", |bed| bed.reason().is_some_and(|why| why.contains("500"))).await;
        sleep(Duration::from_millis(700)).await;
        assert_eq!(table(), before);
        bed.server.behave(|behaviour| behaviour.refusals.clear());
        bed.wait("ready", |bed| bed.reason().is_none()).await;
        assert!(isolated("10.244.1.2") && table().contains("10.244.9.9"), "{}", table());
        assert_eq!(table(), before, "what is as it has to be is not touched");

        // A pod that is gone takes with it what was kept of it.
        bed.server.delete_pod("shop", "web");
        bed.wait("the end of the pod", |_| !isolated("10.244.1.2")).await;
        let kept = |bed: &Bed| std::fs::read_dir(kept::directory(&bed.subnet_file())).unwrap().count();
        bed.wait("nothing kept", |bed| kept(bed) == 0).await;
    });
}

#[test]
fn without_the_api_everything_stays_and_a_new_pod_waits() {
    within(async |mut bed| {
        bed.server.put_policy("shop", "deny", deny());
        bed.server.put_pod_object(pod("web", Some("10.244.1.2")));
        bed.server.put_pod_object(pod("db", None));
        bed.start_ready(PolicyMode::On).await;
        assert!(isolated("10.244.1.2"));
        bed.server.behave(|behaviour| behaviour.down = true);
        bed.wait("the note", |bed| {
            bed.running().health.all().1.iter().any(|note| note.contains("as they were read last"))
        })
        .await;
        assert_eq!(bed.reason(), None, "what is known is enforced");
        bed.announce(announced("db", "c1", "10.244.1.3")).await.unwrap();
        assert!(isolated("10.244.1.2") && isolated("10.244.1.3"));
        let before = table();
        bed.start(PolicyMode::On).await;
        let why = bed.announce(announced("db", "c2", "10.244.1.4")).await.unwrap_err().why;
        assert!(why.contains("does not answer"), "{why}");
        assert_eq!(table(), before);
    });
}

#[test]
fn a_role_without_rights_is_said_in_readiness_with_the_remedy() {
    within(async |mut bed| {
        let refusal = Refusal {
            method: "GET",
            path: "/networkpolicies".into(),
            status: 403,
            message: "forbidden".into(),
        };
        bed.server.behave(|behaviour| behaviour.refusals.push(refusal.clone()));
        bed.start(PolicyMode::On).await;
        bed.wait("the remedy", |bed| {
            bed.reason().is_some_and(|why| why.contains("kube-flannel-network-policy.yml"))
        })
        .await;
        bed.server.behave(|behaviour| behaviour.refusals.clear());
        bed.wait("ready", |bed| bed.reason().is_none()).await;
        assert_eq!(table(), "", "without policies there are no tables");

        // As a server that starts and has not read its roles yet.
        let everything = Refusal { path: "/".into(), ..refusal };
        bed.server.behave(|behaviour| behaviour.refusals.push(everything));
        bed.server.disconnect();
        let notes = |bed: &Bed| bed.running().health.all().1;
        bed.wait("a note", |bed| notes(bed).iter().any(|note| note.contains("forbidden (403)"))).await;
        assert_eq!(bed.reason(), None, "what is known is enforced");
        bed.server.behave(|behaviour| behaviour.refusals.clear());
        bed.wait("the end of the note", |bed| notes(bed).is_empty()).await;
    });
}

#[test]
fn what_another_program_does_to_the_tables_is_repaired_counted_and_said() {
    within(async |mut bed| {
        bed.server.put_policy("shop", "deny", deny());
        bed.server.put_pod_object(pod("web", Some("10.244.1.2")));
        bed.start_ready(PolicyMode::On).await;
        for (repairs, damage) in [
            &["flush", "ruleset"][..],
            &["delete", "table", "inet", "flannel-policy"],
            &["delete", "element", "inet", "flannel-policy", "pol4", "{ 10.244.1.2 }"],
            &["flush", "chain", "inet", "flannel-policy", "forward"],
        ]
        .into_iter()
        .enumerate()
        {
            nft(damage);
            let done = |bed: &Bed| bed.figure("flannel_policy_repairs_total") == repairs as u64 + 1;
            bed.wait("the repair", done).await;
            assert!(isolated("10.244.1.2") && table().contains("ct mark"), "{damage:?}: {}", table());
        }
    });
}

#[test]
fn switched_off_nothing_is_left_and_what_is_another_agents_stays() {
    within(async |mut bed| {
        bed.server.put_policy("shop", "deny", deny());
        bed.server.put_pod_object(pod("web", None));
        bed.start_ready(PolicyMode::On).await;
        bed.announce(announced("web", "c1", "10.244.1.2")).await.unwrap();
        bed.running = None;
        let other: Vec<IpNet> = vec!["10.99.0.0/16".parse().unwrap()];
        let elsewhere = Path::new("/run/flannel-test-nowhere/subnet.env");
        assert_eq!(clean(elsewhere, &other, true), (vec![], vec![]));
        assert!(isolated("10.244.1.2"));
        let (found, failures) = clean(&bed.subnet_file(), &[], false);
        assert_eq!((found.len(), failures.len()), (2, 0), "{found:?}");
        assert!(isolated("10.244.1.2"), "a preview removes nothing");
        assert_eq!(clean(&bed.subnet_file(), &[], true), (found, failures));
        assert_eq!(nft(&["list", "ruleset"]), "");
        assert!(!kept::directory(&bed.subnet_file()).exists());
        assert_eq!(clean(&bed.subnet_file(), &[], true), (vec![], vec![]));
    });
}
