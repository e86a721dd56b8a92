//! A cluster with any of the stores, whose configuration can change, for all nodes or for one.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use backends::testing::{Etcd, Fabric, Node, Pinger, Pod, wait_for};
use ipnet::IpNet;
use subnet::Family;
use subnet::testing::{ApiServer, node as node_object};
use tempfile::TempDir;

use crate::bed::{LIMIT, Member};

/// Which store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Etcd,
    Files,
    Kube,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Etcd, Self::Files, Self::Kube];
}

enum Store {
    Etcd(Etcd),
    Files(TempDir),
    /// Each node has its own volume with the configuration, as pods do.
    Kube(ApiServer, TempDir),
}

/// A fabric with a store that holds a configuration.
pub(crate) struct Site {
    pub(crate) fabric: Fabric,
    store: Store,
    /// The configuration of nodes that come.
    config: Mutex<String>,
    versions: AtomicU32,
}

/// A configuration with IPv4, IPv6 or both, and this `Backend`.
pub(crate) fn config(families: &[Family], backend: &str) -> String {
    let v4 =
        if families.contains(&Family::V4) { r#""Network":"10.244.0.0/16""# } else { r#""EnableIPv4":false"# };
    let v6 = if families.contains(&Family::V6) {
        r#","EnableIPv6":true,"IPv6Network":"fd00:244::/48","IPv6SubnetLen":64"#
    } else {
        ""
    };
    format!(r#"{{{v4}{v6},"Backend":{backend}}}"#)
}

impl Site {
    pub(crate) fn new(kind: Kind, config: &str) -> Self {
        let fabric = Fabric::new().unwrap();
        let store = match kind {
            Kind::Etcd => Store::Etcd(Etcd::on(&fabric).unwrap()),
            Kind::Files => Store::Files(tempfile::tempdir().unwrap()),
            Kind::Kube => {
                let at = (fabric.address(), 0);
                let listener = fabric.switch().run(|| TcpListener::bind(at).unwrap());
                Store::Kube(ApiServer::start(listener).unwrap(), tempfile::tempdir().unwrap())
            }
        };
        let site = Self { fabric, store, config: Mutex::new(String::new()), versions: AtomicU32::default() };
        site.configure(config);
        site
    }

    pub(crate) fn kind(&self) -> Kind {
        match &self.store {
            Store::Etcd(_) => Kind::Etcd,
            Store::Files(_) => Kind::Files,
            Store::Kube(..) => Kind::Kube,
        }
    }

    /// The API server; only with leases in Kubernetes.
    pub(crate) fn api(&self) -> &ApiServer {
        match &self.store {
            Store::Kube(api, _) => api,
            _ => panic!("there is an API server only with Kubernetes"),
        }
    }

    /// Configures all nodes and those that come.
    pub(crate) fn configure(&self, config: &str) {
        config.clone_into(&mut self.config.lock().unwrap());
        match &self.store {
            Store::Etcd(_) => {
                self.etcdctl(&["put", "/coreos.com/network/config", config]);
            }
            Store::Files(directory) => fs::write(directory.path().join("config.json"), config).unwrap(),
            Store::Kube(_, files) => {
                for volume in fs::read_dir(files.path()).unwrap() {
                    self.mount(&volume.unwrap().path(), config);
                }
            }
        }
    }

    /// Configures one node alone; only with leases in Kubernetes, where each has a volume.
    pub(crate) fn configure_one(&self, name: &str, config: &str) {
        let Store::Kube(_, files) = &self.store else { panic!("only with Kubernetes") };
        self.mount(&files.path().join(name), config);
    }

    /// Puts another file in place of the configuration; only with leases in files.
    pub(crate) fn configure_by_rename(&self, config: &str) {
        let Store::Files(directory) = &self.store else { panic!("only with files") };
        let new = directory.path().join("config.json.new");
        fs::write(&new, config).unwrap();
        fs::rename(new, directory.path().join("config.json")).unwrap();
    }

    /// What kubelet does with the volume of a ConfigMap: a new directory, and a link that is replaced.
    fn mount(&self, volume: &Path, config: &str) {
        let version = format!("..{}", self.versions.fetch_add(1, Ordering::Relaxed));
        fs::create_dir_all(volume.join(&version)).unwrap();
        fs::write(volume.join(&version).join("net-conf.json"), config).unwrap();
        let old = fs::read_link(volume.join("..data"));
        symlink(&version, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        match old {
            Ok(old) => fs::remove_dir_all(volume.join(old)).unwrap(),
            Err(_) => symlink("..data/net-conf.json", volume.join("net-conf.json")).unwrap(),
        }
    }

    fn volume(&self, node: &Node) -> PathBuf {
        let Store::Kube(_, files) = &self.store else { panic!("only with Kubernetes") };
        let volume = files.path().join(node.name());
        if !volume.exists() {
            fs::create_dir(&volume).unwrap();
            self.mount(&volume, &self.config.lock().unwrap());
        }
        volume
    }

    pub(crate) fn etcdctl(&self, args: &[&str]) -> String {
        let Store::Etcd(etcd) = &self.store else { panic!("only with etcd") };
        etcd.ctl(args, "").unwrap()
    }

    /// An agent that was only just started.
    pub(crate) fn start(&self, node: Node, args: &[&str]) -> Member {
        let mut all = Vec::new();
        let mut environment = Vec::new();
        let name = node.name();
        match &self.store {
            Store::Etcd(etcd) => all.push(format!("--etcd-endpoints={}", etcd.endpoint())),
            Store::Files(directory) => {
                all.push(format!("--lease-store=file:{}", directory.path().display()));
            }
            Store::Kube(api, _) => {
                let number = name.trim_start_matches("node");
                let cidrs = [format!("10.244.{number}.0/24"), format!("fd00:244:0:{number}::/64")];
                if api.node(&name).is_none() {
                    api.put_node(node_object(&name, &cidrs.each_ref().map(String::as_str)));
                }
                all.push("--kube-subnet-mgr".to_owned());
                all.push(format!("--kube-api-url={}", api.url()));
                let file = self.volume(&node).join("net-conf.json");
                all.push(format!("--net-config-path={}", file.display()));
                environment.push(("NODE_NAME", name.as_str()));
            }
        }
        all.extend(args.iter().map(ToString::to_string));
        Member::start_with_env(node, &all, &environment)
    }

    pub(crate) fn join(&self) -> Member {
        self.join_with(&[])
    }

    pub(crate) fn join_with(&self, args: &[&str]) -> Member {
        self.ready(self.fabric.node().unwrap(), args)
    }

    /// An agent that is ready.
    pub(crate) fn ready(&self, node: Node, args: &[&str]) -> Member {
        let mut member = self.start(node, args);
        member.agent.wait_ready(LIMIT).unwrap();
        member
    }

    /// Everything that is announced by all nodes, one line for each.
    pub(crate) fn announced(&self) -> Vec<String> {
        match &self.store {
            Store::Etcd(_) => {
                let out = self.etcdctl(&["get", "--prefix", "/coreos.com/network/subnets/"]);
                let lines: Vec<&str> = out.lines().collect();
                lines.chunks(2).map(|pair| pair.join(" ")).collect()
            }
            Store::Files(directory) => {
                let entries = fs::read_dir(directory.path().join("subnets")).unwrap();
                let text = |path: PathBuf| {
                    let key = path.file_name().unwrap().to_string_lossy().into_owned();
                    // A lease that is just being written has a hidden name until then.
                    if key.starts_with('.') {
                        return None;
                    }
                    Some(format!("{key} {}", fs::read_to_string(path).ok()?.replace('\n', "")))
                };
                entries.filter_map(|entry| text(entry.unwrap().path())).collect()
            }
            Store::Kube(api, _) => {
                let nodes = api.names().into_iter().filter_map(|name| api.node(&name));
                nodes.map(|node| node["metadata"]["annotations"].to_string().replace('\\', "")).collect()
            }
        }
    }
}

impl Member {
    /// What the agent keeps for a restart; nothing before it has kept anything.
    pub(crate) fn kept(&self) -> String {
        let files = fs::read_dir(self.node.dir()).unwrap().map(|entry| entry.unwrap().path());
        let kept = files.into_iter().find(|path| path.to_string_lossy().ends_with(".state.json"));
        kept.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default()
    }

    /// Whether the lease of a subnet is kept: with its prefix length, since the network's configuration, which is kept
    /// too, names the address of the first subnet.
    pub(crate) fn has_kept(&self, subnet: IpNet) -> bool {
        self.kept().contains(&format!("\"{subnet}\""))
    }

    /// This node's subnets, IPv4 first.
    pub(crate) fn subnets(&self) -> Vec<IpNet> {
        self.agent.subnet_env().unwrap().subnets.iter().collect()
    }

    /// A pod with the second address of each of the node's subnets.
    pub(crate) fn pod_of_all_families(&self) -> Pod {
        let families: Vec<Family> = self.subnets().iter().map(|subnet| Family::of(subnet.addr())).collect();
        (**self).pod(&families).unwrap()
    }

    /// Output of a program on the node, and nothing if it fails: what it asks for may not be there.
    pub(crate) fn try_show(&self, command: &str) -> String {
        self.node.namespace().show(command).unwrap_or_default()
    }

    /// What `/readyz?verbose` says.
    pub(crate) fn verbose(&self) -> String {
        self.agent.get("/readyz?verbose").map(|(_, body)| body).unwrap_or_default()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.agent.get("/readyz").is_ok_and(|(code, _)| code == 200)
    }
}

/// Echo requests from every pod to every address of every other.
pub(crate) fn pings(pods: &[&Pod]) -> Vec<Pinger> {
    pings_of(pods, &Family::BOTH)
}

/// The same in these families alone.
pub(crate) fn pings_of(pods: &[&Pod], families: &[Family]) -> Vec<Pinger> {
    let mut all = Vec::new();
    for (index, from) in pods.iter().enumerate() {
        for (_, to) in pods.iter().enumerate().filter(|(other, _)| *other != index) {
            let addresses = to.addresses().iter().map(IpNet::addr);
            for address in addresses.filter(|address| families.contains(&Family::of(*address))) {
                // A node that is ready may be news to its peers.
                let what = format!("the first echo from {from:?} to {address}");
                wait_for(&what, LIMIT, || from.namespace().reaches(address).unwrap()).unwrap();
                all.push(Pinger::start(from.namespace(), address).unwrap());
            }
        }
    }
    answered(&all);
    all
}

/// Waits for one more answer to each.
pub(crate) fn answered(pings: &[Pinger]) {
    for pinger in pings {
        pinger.wait_for_reply(LIMIT).unwrap();
    }
}

/// How many echo requests of each had no answer.
pub(crate) fn lost(pings: Vec<Pinger>) -> Vec<u64> {
    pings.into_iter().map(|pinger| pinger.finish().unwrap().lost).collect()
}

/// The logs of all, for a message.
pub(crate) fn logs(members: &[&Member]) -> String {
    let log = |member: &&Member| format!("--- {}\n{}", member.node.name(), member.agent.log());
    members.iter().map(log).collect::<Vec<_>>().join("\n")
}
