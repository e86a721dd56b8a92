//! A cluster for a test: a fabric, an etcd and nodes with agents and pods.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use backends::testing::{self, Agent, Etcd, Fabric, Launch, Node, Pod};
use ipnet::IpNet;
use subnet::Family;

/// Long enough for a machine that does something else; no test waits for it when all is well.
pub(crate) const LIMIT: Duration = Duration::from_secs(crate::LIMIT_SECONDS);

pub(crate) const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
pub(crate) const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// A fabric with an etcd that holds a configuration.
pub(crate) struct Cluster {
    pub(crate) fabric: Fabric,
    pub(crate) etcd: Etcd,
}

/// A node with its agent. What fails ends the test.
pub(crate) struct Member(testing::Member);

impl Deref for Member {
    type Target = testing::Member;

    fn deref(&self) -> &testing::Member {
        &self.0
    }
}

impl DerefMut for Member {
    fn deref_mut(&mut self) -> &mut testing::Member {
        &mut self.0
    }
}

impl Cluster {
    pub(crate) fn new(config: &str) -> Self {
        let cluster = Self::unconfigured();
        cluster.put("/coreos.com/network/config", config);
        cluster
    }

    pub(crate) fn unconfigured() -> Self {
        let fabric = Fabric::new().unwrap();
        let etcd = Etcd::on(&fabric).unwrap();
        Self { fabric, etcd }
    }

    /// Runs `etcdctl` with these arguments.
    pub(crate) fn etcdctl(&self, args: &[&str]) -> String {
        self.etcd.ctl(args, "").unwrap()
    }

    pub(crate) fn put(&self, key: &str, value: &str) {
        self.etcdctl(&["put", key, value]);
    }

    /// The keys and values below `subnets/`.
    pub(crate) fn leases(&self) -> Vec<(String, String)> {
        let out = self.etcdctl(&["get", "--prefix", "/coreos.com/network/subnets/"]);
        let lines: Vec<&str> = out.lines().collect();
        let pairs = lines.chunks(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned()));
        pairs.collect()
    }

    /// A node and its lease go.
    pub(crate) fn leaves(&self, member: Member) {
        let network = member.subnet().network().to_string();
        let key = self.leases().into_iter().map(|(key, _)| key).find(|key| key.contains(&network)).unwrap();
        drop(member);
        self.etcdctl(&["del", &key]);
    }

    /// Has these rules, and no others, on the switch between the nodes.
    pub(crate) fn switch_rules(&self, rules: &str) {
        let text = format!(
            "table bridge faults\ndelete table bridge faults\ntable bridge faults {{\nchain forward {{\ntype filter hook \
             forward priority 0\n{rules}\n}}\n}}\n"
        );
        self.fabric.switch().command("nft").args(["-f", "-"]).input(text).ok().unwrap();
    }

    /// A node with an agent that is ready.
    pub(crate) fn join(&self) -> Member {
        self.join_with(&[])
    }

    pub(crate) fn join_with(&self, args: &[&str]) -> Member {
        let mut member = self.start(self.fabric.node().unwrap(), args);
        member.agent.wait_ready(LIMIT).unwrap();
        member
    }

    /// A node with an agent that was only just started.
    pub(crate) fn start(&self, node: Node, args: &[&str]) -> Member {
        let mut all = vec![format!("--etcd-endpoints={}", self.etcd.endpoint())];
        all.extend(args.iter().map(ToString::to_string));
        Member::start_with_env(node, &all, &[])
    }
}

/// The agent under test: `TEST_FLANNELD`, such as the one that is shipped, or that of this build.
pub(crate) fn flanneld() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        std::env::var("TEST_FLANNELD").unwrap_or_else(|_| env!("CARGO_BIN_EXE_flanneld").into()).into()
    })
}

impl Member {
    /// A node with an agent that was started with these arguments and variables alone.
    pub(crate) fn start_with_env(node: Node, args: &[String], environment: &[(&str, &str)]) -> Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let environment = environment.iter().map(owned).collect();
        let launch =
            Launch { program: flanneld().to_owned(), args: args.to_vec(), environment, limit: LIMIT };
        Self(testing::Member::start(node, launch).unwrap())
    }

    /// The node, without its agent.
    pub(crate) fn into_node(self) -> Node {
        self.0.node
    }

    /// Starts another agent in place of one that has ended.
    pub(crate) fn start_again(&mut self) {
        self.0.start_again().unwrap();
        self.agent.wait_ready(LIMIT).unwrap();
    }

    /// Another agent on this node, which was only just started.
    pub(crate) fn second(&self, more: &[&str]) -> Agent {
        let mut launch = self.launch.clone();
        launch.args.extend(more.iter().map(ToString::to_string));
        launch.start(&self.node).unwrap()
    }

    /// Starts another agent in place of one that has ended, with other arguments besides those of the store.
    pub(crate) fn start_with(&mut self, args: &[&str]) {
        self.launch.args.truncate(1);
        self.start_again_with(args);
    }

    /// The same with further arguments, of which a repetition counts.
    pub(crate) fn start_again_with(&mut self, more: &[&str]) {
        self.launch.args.extend(more.iter().map(ToString::to_string));
        self.start_again();
    }

    pub(crate) fn subnet(&self) -> IpNet {
        self.0.subnet().unwrap()
    }

    /// The file with the saved state, once there is one.
    pub(crate) fn state_file(&self) -> PathBuf {
        let find = || {
            let mut paths = self.node.dir().read_dir().unwrap().map(|entry| entry.unwrap().path());
            paths.find(|path| path.to_string_lossy().ends_with(".state.json"))
        };
        self.wait("the saved state", || find().is_some());
        find().unwrap()
    }

    /// A pod with the second address of the node's subnet.
    pub(crate) fn pod(&self) -> Pod {
        self.0.pod(&[Family::V4]).unwrap()
    }

    /// Output of a program on the node.
    pub(crate) fn show(&self, command: &str) -> String {
        self.0.show(command).unwrap()
    }

    /// All nftables rules, without what counters counted. The kernel lists tables in the order of their creation,
    /// which a repair may change, so they are put in the order of their names.
    pub(crate) fn rules(&self) -> String {
        let all = self.show("nft -s list ruleset");
        // Only the first line of a table begins with this word, and only a remark of the program with `#`.
        let lines: Vec<&str> = all.lines().filter(|line| !line.starts_with('#')).collect();
        let all = format!("\n{}\n", lines.join("\n"));
        let mut tables: Vec<&str> = all.split("\ntable ").map(str::trim_end).collect();
        tables.sort_unstable();
        tables.join("\ntable ")
    }

    pub(crate) fn ip(&self, lines: &str) {
        self.node.namespace().ip(lines).unwrap();
    }

    pub(crate) fn wait(&self, what: &str, condition: impl FnMut() -> bool) {
        if let Err(error) = self.0.wait(what, condition) {
            panic!("{error:?}");
        }
    }

    pub(crate) fn wait_for_log(&self, text: &str) {
        self.wait(&format!("{text:?} in the log"), || self.agent.log().contains(text));
    }

    /// Every route, neighbour, forwarding entry and tunnel device, in one order.
    pub(crate) fn state(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        for command in [
            "ip -4 route show",
            "ip neigh show dev flannel.1",
            "bridge fdb show dev flannel.1",
            "ip -d -4 address show dev flannel.1",
        ] {
            let text = self.node.namespace().show(command).unwrap_or_default();
            let mut of_one: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
            of_one.sort();
            lines.append(&mut of_one);
        }
        lines.join("\n")
    }
}
