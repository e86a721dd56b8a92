//! Plugins that run side by side and are killed at random moments.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::support::{Namespace, Node, Pod, V4};

/// Plugins that are killed before they end.
const KILLS: usize = 200;
/// Pods that come and go at the same time.
const SLOTS: usize = 8;

/// xorshift: which moments are tried is told by the seed, which a failure names.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

/// What all pods share.
struct Storm {
    node: Node,
    plugins: String,
    kills: AtomicUsize,
    /// The addresses of pods that run.
    living: Mutex<BTreeMap<String, String>>,
    /// Which containers the agent knows.
    announced: Arc<Mutex<Vec<String>>>,
}

impl Storm {
    fn new() -> Self {
        let node = Node::with_namespace("");
        let socket = node.path("policy.sock");
        let env = format!("{V4}FLANNEL_POLICY_SOCKET={}\n", socket.display());
        std::fs::write(node.path("subnet.env"), env).unwrap();
        let announced: Arc<Mutex<Vec<String>>> = Arc::default();
        let known = Arc::clone(&announced);
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                let _ = BufReader::new(stream.try_clone().unwrap()).read_line(&mut line);
                // A plugin that was killed says nothing.
                let Ok(question) = serde_json::from_str::<Value>(&line) else { continue };
                let container = question["container"].as_str().unwrap().to_owned();
                let mut known = known.lock().unwrap();
                known.retain(|one| *one != container);
                if question["verb"] == "add" {
                    known.push(container);
                }
                let _ = stream.write_all(b"{\"ok\":true}\n");
            }
        });
        let plugins = node.own_plugins();
        Self { node, plugins, kills: AtomicUsize::new(0), living: Mutex::default(), announced }
    }

    fn config(&self, plugin: &str, previous: Option<&Value>) -> Value {
        let mut config =
            self.node.network("n", "1.1.0", json!({"hairpinMode": true, "isDefaultGateway": true}));
        config["type"] = plugin.into();
        config["cni.dev/valid-attachments"] = self.valid();
        config["runtimeConfig"] = json!({
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 80_000, "egressRate": 8_000_000, "egressBurst": 80_000},
        });
        if plugin == "flannel" {
            config.as_object_mut().unwrap().remove("runtimeConfig");
        }
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        config
    }

    /// All pods: GC runs while they come and go.
    fn valid(&self) -> Value {
        (0..SLOTS).map(|slot| json!({"containerID": format!("c{slot}"), "ifname": "eth0"})).collect()
    }

    fn start(&self, plugin: &str, verb: &str, pod: Pod<'_>, exec: bool, config: &Value) -> Child {
        let stdin = self.node.path(&format!("stdin-{}", pod.container));
        std::fs::write(&stdin, config.to_string()).unwrap();
        let mut command = self.node.host().command(&format!("{}/{plugin}", self.plugins));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", pod.container)
            .env("CNI_IFNAME", pod.ifname)
            .env("CNI_NETNS", pod.netns)
            .env("CNI_PATH", &self.plugins)
            .env("FLANNEL_CNI_EXEC", if exec { "1" } else { "0" })
            .stdin(File::open(stdin).unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

/// One pod, over and over.
struct Slot<'a> {
    storm: &'a Storm,
    container: String,
    namespace: Namespace,
    random: Random,
    exec: bool,
    /// How long a plugin takes that is not killed.
    duration: Duration,
}

impl Slot<'_> {
    fn pod<'p>(&'p self, netns: &'p str) -> Pod<'p> {
        Pod { container: &self.container, ifname: "eth0", netns }
    }

    /// Runs a plugin that must succeed.
    #[track_caller]
    fn whole(&mut self, plugin: &str, verb: &str, previous: Option<&Value>) -> Value {
        let begin = Instant::now();
        let netns = self.namespace.path();
        let config = self.storm.config(plugin, previous);
        let output =
            self.storm.start(plugin, verb, self.pod(&netns), self.exec, &config).wait_with_output().unwrap();
        self.duration = begin.elapsed();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{verb} of {plugin} for {}: {text}", self.container);
        if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() }
    }

    /// Starts a plugin and kills it, at a moment at which it may have ended.
    fn killed(&mut self, plugin: &str, verb: &str, previous: Option<&Value>) {
        let netns = self.namespace.path();
        let config = self.storm.config(plugin, previous);
        let moment = self.random.below(self.duration.as_micros() as u64);
        let mut child = self.storm.start(plugin, verb, self.pod(&netns), self.exec, &config);
        thread::sleep(Duration::from_micros(moment));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            self.storm.kills.fetch_add(1, Ordering::Relaxed);
        }
        child.wait().unwrap();
    }

    /// An ADD of which a plugin is killed, perhaps a DEL that is killed, and then the one that counts.
    fn round(&mut self) {
        match self.random.below(6) {
            0 | 1 => self.killed("flannel", "ADD", None),
            2 => self.killed("flannel", "GC", None),
            _ => {
                let mut result = self.whole("flannel", "ADD", None);
                let address = result["ips"][0]["address"].as_str().unwrap().to_owned();
                let before =
                    self.storm.living.lock().unwrap().insert(address.clone(), self.container.clone());
                assert_eq!(before, None, "{address} was given to {} too", self.container);
                result["cniVersion"] = "1.1.0".into();
                let chained = if self.random.below(2) == 0 { "portmap" } else { "bandwidth" };
                match self.random.below(3) {
                    0 => self.killed(chained, "ADD", Some(&result)),
                    1 => {
                        self.whole(chained, "ADD", Some(&result));
                        self.killed(chained, "DEL", Some(&result));
                    }
                    _ => {
                        self.whole(chained, "ADD", Some(&result));
                        self.killed(chained, "GC", Some(&result));
                    }
                }
                self.storm.living.lock().unwrap().remove(&address);
                self.killed("flannel", "DEL", None);
            }
        }
        for plugin in ["bandwidth", "portmap", "flannel"] {
            self.whole(plugin, "DEL", None);
        }
        assert_eq!(self.namespace.links(), ["lo"], "{}", self.container);
    }
}

#[test]
fn two_hundred_plugins_killed_at_random_moments_leave_nothing_and_no_address_is_given_twice() {
    let seed = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let storm = Storm::new();
    thread::scope(|scope| {
        for number in 0..SLOTS {
            let mut slot = Slot {
                storm: &storm,
                container: format!("c{number}"),
                namespace: Namespace::new(),
                random: Random((seed ^ (number as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)).max(1)),
                // The applets as programs too.
                exec: number % 4 == 3,
                duration: Duration::from_millis(5),
            };
            scope.spawn(move || {
                while slot.storm.kills.load(Ordering::Relaxed) < KILLS {
                    slot.round();
                }
            });
        }
    });
    let node = &storm.node;
    let ruleset = node.host().command("nft").args(["list", "ruleset"]).output().unwrap();
    let ruleset = String::from_utf8(ruleset.stdout).unwrap();
    let what = format!("seed {seed}");
    assert!(!ruleset.contains("comment \"c"), "{what}: {ruleset}");
    assert_eq!(node.host().links(), ["lo", "cni0"], "{what}");
    assert_eq!((node.kept(), node.reserved("n")), (vec![], vec![]), "{what}");
    assert_eq!(*storm.announced.lock().unwrap(), Vec::<String>::new(), "{what}");
    let left: Vec<_> = node.reservations("n").into_keys().collect();
    let known = |name: &String| name == "lock" || name.starts_with("last_reserved_ip.");
    assert!(left.iter().all(known), "{what}: {left:?}");
}
