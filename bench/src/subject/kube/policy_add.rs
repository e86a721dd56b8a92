//! What network policies add to the ADD of a pod: the plugin waits until the agent has the pod's rules in the kernel.

use std::time::{Duration, Instant};

use backends::testing::Namespace;
use bench::bed::{Cluster, Member, TIMEOUT};
use bench::figure::{Limit, Row, median, ms, percentile_99};
use serde_json::json;
use subnet::testing::ApiServer;

use super::cluster;
use crate::Stage;
use crate::plugin::{Plugin, flannel_config};

/// Pods of a round, on each of two nodes.
const PODS: usize = 100;

const ROWS: [Row<'_>; 5] = [
    ("ADD with policies, median", "ms", Limit::None),
    ("ADD without, median", "ms", Limit::None),
    ("ADD with policies, p99", "ms", Limit::None),
    ("ADD without, p99", "ms", Limit::None),
    ("p99 more with policies", "ms", Limit::Median(2.0)),
];

/// Adds pods in turns on a node with policies and on one without; each pod is isolated in both directions. Their namespaces are made before
/// and removed after, because the kernel removes one under locks that an ADD waits for.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let cluster = cluster(stage)?;
    let api = cluster.api()?;
    api.put_namespace("bench", &[]);
    let pods_of_namespace = json!([{"podSelector": {}}]);
    api.put_policy(
        "bench",
        "new",
        json!({
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": pods_of_namespace}],
            "egress": [{"to": pods_of_namespace}],
        }),
    );
    stage.measure("policy-add", ROWS, u32::MAX, |round| {
        let nodes = [Side::new(stage, &cluster, "on")?, Side::new(stage, &cluster, "off")?];
        let names: Vec<String> = (0..PODS).map(|number| format!("new-{round}-{number}")).collect();
        for side in &nodes {
            names.iter().for_each(|name| side.announce(api, name));
        }
        // A runtime adds a pod some time after the API server has told of it.
        stage.progress.pause(Duration::from_secs(1))?;
        let pods = (0..2 * PODS).map(|_| Namespace::new()).collect::<anyhow::Result<Vec<_>>>()?;
        let mut times = [Vec::new(), Vec::new()];
        for (number, name) in names.iter().enumerate() {
            for side in [number % 2, (number + 1) % 2] {
                let start = Instant::now();
                nodes[side].call("ADD", name, &pods[2 * number + side])?;
                times[side].push(ms(start.elapsed()));
            }
        }
        for (number, name) in names.iter().enumerate() {
            for side in [0, 1] {
                nodes[side].call("DEL", name, &pods[2 * number + side])?;
            }
        }
        let [with, without] = &times;
        let tails = [percentile_99(with), percentile_99(without)];
        let medians = [median(with.clone()), median(without.clone())];
        for side in nodes {
            cluster.remove(side.member)?;
        }
        Ok([medians[0], medians[1], tails[0], tails[1], tails[0] - tails[1]])
    })
}

/// A node with its plugin.
struct Side {
    member: Member,
    plugin: Plugin,
}

impl Side {
    fn new(stage: &Stage, cluster: &Cluster, policies: &str) -> anyhow::Result<Self> {
        // As the manifest has it: without --ip-masq the plugin asks Go's bridge for masquerading.
        let flags = ["--ip-masq", &format!("--network-policy={policies}")];
        let mut member = cluster.start_with(cluster.node()?, &flags)?;
        member.agent.wait_ready(TIMEOUT)?;
        let mut config = flannel_config(&member.node.subnet_file(), member.node.dir());
        config["name"] = "cbr0".into();
        config["cniVersion"] = "1.0.0".into();
        let plugin = Plugin { program: stage.programs.join("flannel"), config: config.to_string() };
        Ok(Self { member, plugin })
    }

    /// A pod's name, which differs between the nodes.
    fn pod(&self, name: &str) -> String {
        format!("{name}-{}", self.member.node.name())
    }

    fn announce(&self, api: &ApiServer, name: &str) {
        let name = self.pod(name);
        api.put_pod_object(json!({
            "metadata": {"namespace": "bench", "name": name, "uid": name, "labels": {"app": "new"}},
            "spec": {"nodeName": self.member.node.name(), "containers": [{"name": "c"}]},
            "status": {"phase": "Pending"},
        }));
    }

    fn call(&self, verb: &str, name: &str, pod: &Namespace) -> anyhow::Result<()> {
        let name = self.pod(name);
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={name};K8S_POD_UID={name}");
        self.member.node.namespace().run(|| self.plugin.call_with(verb, &name, pod, &args)).map(drop)
    }
}
