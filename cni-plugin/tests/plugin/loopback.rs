//! `loopback` of this program, beside Debian's.

use serde_json::json;

use crate::support::{Namespace, Node, PLUGINS, Pod, V4};

#[test]
fn the_link_of_the_pod_itself_comes_up_as_with_the_original() {
    let results = [true, false].map(|ours| {
        let node = Node::with_namespace(V4);
        let directory = if ours { node.own_plugins() } else { PLUGINS.into() };
        let program = format!("{directory}/loopback");
        let namespace = Namespace::new();
        let path = namespace.path();
        let pod = Pod { container: "c1", ifname: "lo", netns: &path };
        let mut network = json!({"name": "lo", "cniVersion": "1.0.0", "type": "loopback"});
        let call = |verb: &str, network: &serde_json::Value| {
            node.call_plugin(&program, verb, pod, &network.to_string(), &[])
        };
        let mut result = call("ADD", &network).result();
        assert!(namespace.ip(&["link", "show", "lo"]).contains("UP"));
        network["prevResult"] = result.clone();
        call("CHECK", &network).result();
        assert_eq!(call("ADD", &network).result(), result, "a previous result is passed on");
        call("DEL", &network).result();
        assert!(!namespace.ip(&["link", "show", "lo"]).contains("UP"));
        assert!(call("CHECK", &network).error().1.contains("loopback interface is down"));
        drop(namespace);
        call("DEL", &network).result();
        result["interfaces"][0]["sandbox"] = "netns".into();
        result
    });
    assert_eq!(results[0], results[1]);
}
