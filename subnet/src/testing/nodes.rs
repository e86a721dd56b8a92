//! Node objects: as kubelet registers them, as Flannel agents complete them, and as large as real ones.

use serde_json::{Value, json};

use super::objects::merge;

/// A node as kubelet registers it: with a subnet for each of `cidrs` and no annotation.
pub fn node(name: &str, cidrs: &[&str]) -> Value {
    let mut node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": format!("uid-of-{name}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"},
        },
        "spec": {},
        "status": {"conditions": [{
            "type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z",
            "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "KubeletReady", "message": "kubelet is posting ready status",
        }]},
    });
    if let Some(first) = cidrs.first() {
        node["spec"] = json!({"podCIDR": first, "podCIDRs": cidrs});
    }
    node
}

/// Adds what a node in a real cluster has besides: labels and annotations of others, who manages its fields,
/// and a status with the names of `images` images. 40 images make a status of about 10 KB and metadata of
/// about 3 KB.
pub fn fattened(mut node: Value, images: usize) -> Value {
    let name = node["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let image = |number: usize| {
        let name = format!("registry.example.org/some/component-{number:03}");
        let digest = format!("{number:064x}");
        json!({"names": [format!("{name}@sha256:{digest}"), format!("{name}:v1.2.{number}")], "sizeBytes": 31_000_000 + number})
    };
    let resources = json!({"cpu": "8", "ephemeral-storage": "203056560Ki", "hugepages-1Gi": "0", "hugepages-2Mi": "0",
        "memory": "32875432Ki", "pods": "110"});
    let condition = |(kind, status, reason): (&str, &str, &str)| {
        json!({"type": kind, "status": status, "lastHeartbeatTime": "2026-01-01T00:00:00Z",
            "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": reason, "message": format!("kubelet says {reason}")})
    };
    let conditions = [
        ("NetworkUnavailable", "False", "FlannelIsUp"),
        ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
        ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
        ("PIDPressure", "False", "KubeletHasSufficientPID"),
        ("Ready", "True", "KubeletReady"),
    ];
    let details = json!({
        "metadata": {
            "labels": {
                "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
                "kubernetes.io/hostname": name, "node.kubernetes.io/instance-type": "m5.2xlarge",
                "topology.kubernetes.io/region": "eu-central-1", "topology.kubernetes.io/zone": "eu-central-1b",
            },
            "annotations": {
                "node.alpha.kubernetes.io/ttl": "0", "volumes.kubernetes.io/controller-managed-attach-detach": "true",
                "csi.volume.kubernetes.io/nodeid": format!(r#"{{"disk.csi.example.org":"{name}"}}"#),
            },
            "managedFields": managed_fields(),
        },
        "status": {
            "addresses": [{"type": "InternalIP", "address": "172.20.0.1"}, {"type": "Hostname", "address": name}],
            "allocatable": resources,
            "capacity": resources,
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "images": (0..images).map(image).collect::<Vec<_>>(),
            "nodeInfo": {
                "architecture": "amd64", "bootID": "7f2a6c1e-3f0d-4a53-9a45-0b1d3c5e7f90", "containerRuntimeVersion": "containerd://2.1.4",
                "kernelVersion": "6.1.0", "kubeProxyVersion": "", "kubeletVersion": "v1.33.1",
                "machineID": "0f1e2d3c4b5a69788796a5b4c3d2e1f0", "operatingSystem": "linux", "osImage": "Debian GNU/Linux 12",
                "systemUUID": "ec2f1e2d-3c4b-5a69-7887-96a5b4c3d2e1",
            },
        },
    });
    merge(&mut node, &details);
    node["status"]["conditions"] = conditions.into_iter().map(condition).collect();
    node
}

fn managed_fields() -> [Value; 4] {
    [
        managed(
            "kubelet",
            "",
            json!({"f:metadata": {
            "f:annotations": {".": {}, "f:volumes.kubernetes.io/controller-managed-attach-detach": {}},
            "f:labels": {".": {}, "f:beta.kubernetes.io/arch": {}, "f:beta.kubernetes.io/os": {},
                "f:kubernetes.io/arch": {}, "f:kubernetes.io/hostname": {}, "f:kubernetes.io/os": {},
                "f:node.kubernetes.io/instance-type": {}, "f:topology.kubernetes.io/region": {},
                "f:topology.kubernetes.io/zone": {}}}}),
        ),
        managed(
            "kube-controller-manager",
            "",
            json!({"f:metadata": {"f:annotations": {"f:node.alpha.kubernetes.io/ttl": {}}},
            "f:spec": {"f:podCIDR": {}, "f:podCIDRs": {".": {}, "v:\"10.244.0.0/24\"": {}}}}),
        ),
        managed(
            "flanneld",
            "status",
            json!({"f:metadata": {"f:annotations": {
            "f:flannel.alpha.coreos.com/backend-data": {}, "f:flannel.alpha.coreos.com/backend-type": {},
            "f:flannel.alpha.coreos.com/kube-subnet-manager": {}, "f:flannel.alpha.coreos.com/public-ip": {}}},
            "f:status": {"f:conditions": {"k:{\"type\":\"NetworkUnavailable\"}": {".": {}, "f:lastHeartbeatTime": {},
                "f:lastTransitionTime": {}, "f:message": {}, "f:reason": {}, "f:status": {}, "f:type": {}}}}}),
        ),
        managed(
            "kubelet",
            "status",
            json!({"f:metadata": {"f:annotations": {"f:csi.volume.kubernetes.io/nodeid": {}}},
            "f:status": {"f:conditions": {
                "k:{\"type\":\"DiskPressure\"}": {"f:lastHeartbeatTime": {}},
                "k:{\"type\":\"MemoryPressure\"}": {"f:lastHeartbeatTime": {}},
                "k:{\"type\":\"PIDPressure\"}": {"f:lastHeartbeatTime": {}},
                "k:{\"type\":\"Ready\"}": {"f:lastHeartbeatTime": {}, "f:lastTransitionTime": {}, "f:message": {},
                    "f:reason": {}, "f:status": {}}}, "f:images": {}}}),
        ),
    ]
}

fn managed(manager: &str, subresource: &str, fields: Value) -> Value {
    let mut entry = json!({"apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": fields, "manager": manager,
        "operation": "Update", "time": "2026-01-01T00:00:00Z"});
    if !subresource.is_empty() {
        entry["subresource"] = subresource.into();
    }
    entry
}

/// What a Flannel agent adds to a node: the annotations of a vxlan node with this address and MAC.
pub fn announced(mut node: Value, public: &str, mac: &str) -> Value {
    let patch = json!({"metadata": {"annotations": {
        "flannel.alpha.coreos.com/backend-data": format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#),
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": public,
    }}});
    merge(&mut node, &patch);
    node
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_node_is_as_large_as_it_is_said_to_be() {
        let node = announced(fattened(node("n1", &["10.244.1.0/24"]), 40), "192.0.2.1", "02:00:00:00:00:01");
        let size = |part: &str| node[part].to_string().len();
        let (metadata, status) = (size("metadata"), size("status"));
        assert!(
            (2_500..3_500).contains(&metadata) && (9_500..11_000).contains(&status),
            "{metadata}, {status}"
        );
    }
}
