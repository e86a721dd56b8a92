//! The handshake about network policies, with a scripted agent at the socket; the real one is in flanneld's tests.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use crate::pods::V6;
use crate::support::{Answer, Namespace, Node, PLUGINS, Pod, V4};

pub(crate) const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=0c9d";

/// What the scripted agent does with each question.
type Script = dyn Fn(&Value, &mut UnixStream) + Send + Sync;
type Boxed = Box<Script>;

/// A node whose `subnet.env` names a policy socket, and one pod.
pub(crate) struct Case {
    pub(crate) node: Node,
    pub(crate) pod: Namespace,
    socket: PathBuf,
    asked: Arc<Mutex<Vec<Value>>>,
}

/// How the delegate runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Path {
    InProcess,
    Program,
}

const BOTH: [Path; 2] = [Path::InProcess, Path::Program];

impl Case {
    /// Without an agent.
    pub(crate) fn new() -> Self {
        let node = Node::with_namespace("");
        let socket = node.path("policy.sock");
        let env = format!("{V4}{V6}FLANNEL_POLICY_SOCKET={}\n", socket.display());
        fs::write(node.path("subnet.env"), env).unwrap();
        Self { node, pod: Namespace::new(), socket, asked: Arc::default() }
    }

    /// With an agent that answers so.
    pub(crate) fn with_agent(script: impl Fn(&Value, &mut UnixStream) + Send + Sync + 'static) -> Self {
        let case = Self::new();
        case.starts(script);
        case
    }

    pub(crate) fn starts(&self, script: impl Fn(&Value, &mut UnixStream) + Send + Sync + 'static) {
        self.follows(&(Arc::new(script) as Arc<Script>));
    }

    fn follows(&self, script: &Arc<Script>) {
        let _ = fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket).unwrap();
        let (asked, script) = (Arc::clone(&self.asked), Arc::clone(script));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, asked, script) = (stream.unwrap(), Arc::clone(&asked), Arc::clone(&script));
                thread::spawn(move || {
                    let mut line = String::new();
                    BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                    let question: Value = serde_json::from_str(&line).unwrap();
                    asked.lock().unwrap().push(question.clone());
                    script(&question, &mut stream);
                });
            }
        });
    }

    pub(crate) fn asked(&self) -> Vec<Value> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    pub(crate) fn network(&self, wait: u8) -> Value {
        let mut network = self.node.network("n", "1.0.0", json!({"isDefaultGateway": true}));
        network["policyWaitSeconds"] = json!(wait);
        network
    }

    pub(crate) fn call(&self, verb: &str, path: Path, network: &Value) -> Answer {
        let netns = self.pod.path();
        let pod = Pod { container: "c1", ifname: "eth0", netns: &netns };
        let exec = if path == Path::Program { "1" } else { "0" };
        let more = [("CNI_ARGS", ARGS), ("CNI_PATH", PLUGINS), ("FLANNEL_CNI_EXEC", exec)];
        self.node.call_with(verb, pod, &network.to_string(), &more)
    }

    #[track_caller]
    pub(crate) fn nothing_is_left(&self, what: &str) {
        assert_eq!(self.node.host().links(), ["lo", "cni0"], "{what}");
        assert_eq!(self.pod.links(), ["lo"], "{what}");
        assert_eq!((self.node.kept(), self.node.reserved("n")), (vec![], vec![]), "{what}");
    }
}

fn says(line: &'static str) -> impl Fn(&Value, &mut UnixStream) + Send + Sync + 'static {
    move |_, stream| {
        let _ = stream.write_all(line.as_bytes());
    }
}

#[test]
fn a_pod_is_announced_before_its_result_is_printed_and_released_after_its_links_are_gone() {
    for path in BOTH {
        let case = Case::new();
        let (host, pod) = (case.node.host().name().to_owned(), case.pod.name().to_owned());
        let links: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = Arc::clone(&links);
        let names = (host.clone(), pod.clone());
        case.starts(move |question, stream| {
            // The built-in bridge asks before it makes the link, and makes that without an answer.
            if question["verb"] == "add" {
                crate::killed::eventually("the link", || {
                    let links = |name: &String| crate::support::ip(&["-n", name, "-o", "link"]);
                    links(&names.1).contains("eth0") && links(&names.0).contains("veth")
                });
            }
            seen.lock().unwrap().push(crate::support::ip(&["-n", &pod, "-o", "link"]));
            seen.lock().unwrap().push(crate::support::ip(&["-n", &host, "-o", "link"]));
            stream.write_all(b"{\"ok\":true}\n").unwrap();
        });
        let network = case.network(10);
        let result = case.call("ADD", path, &network).result();
        let interfaces = &result["interfaces"];
        let mut expected = json!({"v": 1, "container": "c1", "ifname": "eth0", "namespace": "shop", "pod": "web-0", "uid": "0c9d"});
        let gone = {
            let mut gone = expected.clone();
            gone["verb"] = json!("del");
            gone
        };
        expected["verb"] = json!("add");
        expected["hostIf"] = interfaces[1]["name"].clone();
        if path == Path::Program {
            expected["mac"] = interfaces[2]["mac"].clone();
        }
        expected["ips"] = json!(["10.1.17.2", "fc00::2"]);
        assert_eq!(case.asked(), [expected], "{path:?}");
        case.call("DEL", path, &network).result();
        assert_eq!(case.asked(), [gone], "{path:?}");
        let links = links.lock().unwrap();
        assert!(links[0].contains("eth0") && links[1].contains("veth"), "{path:?}: {links:?}");
        assert!(!links[2].contains("eth0") && !links[3].contains("veth"), "{path:?}: {links:?}");
        case.nothing_is_left("after DEL");
    }
}

#[test]
fn an_add_whose_policies_are_not_in_force_fails_with_code_11_and_leaves_nothing() {
    let silent = |_: &Value, stream: &mut UnixStream| {
        let _ = BufReader::new(stream).read_line(&mut String::new());
    };
    let long: &'static str = Box::leak("x".repeat(70_000).into_boxed_str());
    let scripts: [(&str, Boxed, &str); 7] = [
        (
            "retry",
            Box::new(says("{\"retry\":true,\"why\":\"no list of policies yet\"}\n")),
            "yet: no list of policies yet",
        ),
        ("retry without a reason", Box::new(says("{\"retry\":true}\n")), "it gives no reason"),
        ("garbage", Box::new(says("pardon?\n")), "makes no sense: \"pardon?\""),
        ("half a line", Box::new(says("{\"ok\":tr")), "makes no sense"),
        ("no end", Box::new(says(long)), "makes no sense"),
        ("closes", Box::new(says("")), "closed the connection without an answer"),
        ("silence", Box::new(silent), "does not answer"),
    ];
    for (what, script, expected) in scripts {
        let case = Case::new();
        case.follows(&script.into());
        for path in BOTH {
            let (code, msg) = case.call("ADD", path, &case.network(1)).error();
            assert!(code == 11 && msg.contains(expected), "{what} {path:?}: {code} {msg}");
            case.nothing_is_left(what);
        }
    }
}

#[test]
fn an_agent_that_is_away_fails_the_add_with_code_11_and_names_its_socket() {
    let case = Case::new();
    for path in BOTH {
        for stale in [false, true] {
            let _ = fs::remove_file(&case.socket);
            if stale {
                // As an agent that was killed leaves it.
                drop(UnixListener::bind(&case.socket).unwrap());
            }
            let (code, msg) = case.call("ADD", path, &case.network(0)).error();
            let named = format!("does not listen on {}: ", case.socket.display());
            assert!(code == 11 && msg.contains(&named), "{path:?} {stale}: {code} {msg}");
            case.nothing_is_left("agent away");
        }
    }
}

#[test]
fn a_request_that_the_agent_refuses_is_not_repeated() {
    let case = Case::with_agent(says("{\"error\":\"uid: \\\"0c9d\\\" is no uid\"}\n"));
    let (code, msg) = case.call("ADD", Path::InProcess, &case.network(10)).error();
    assert!(code == 999 && msg.contains(r#"uid: "0c9d" is no uid"#), "{code} {msg}");
    assert_eq!(case.asked().len(), 1);
    case.nothing_is_left("refused");
}

#[test]
fn an_add_waits_for_an_agent_that_restarts_and_for_policies_that_are_still_read() {
    for path in BOTH {
        let case = Arc::new(Case::new());
        let adding = {
            let case = Arc::clone(&case);
            thread::spawn(move || case.call("ADD", path, &case.network(255)))
        };
        // It comes while the plugin waits, which is when the pod has its link.
        crate::killed::eventually("the pod is connected", || case.pod.links().len() > 1);
        let questions = Mutex::new(0);
        case.starts(move |_, stream| {
            let mut questions = questions.lock().unwrap();
            *questions += 1;
            let answer: &[u8] = match *questions {
                1 => b"",
                2 => b"{\"retry\":true,\"why\":\"starting\"}\n",
                _ => b"{\"ok\":true}\n",
            };
            stream.write_all(answer).unwrap();
        });
        adding.join().unwrap().result();
        let asked = case.asked();
        assert!(asked.len() == 3 && asked.iter().all(|one| *one == asked[0]), "{asked:?}");
        case.call("DEL", path, &case.network(1)).result();
        case.nothing_is_left("after DEL");
    }
}

#[test]
fn a_del_never_fails_for_the_agent() {
    let well = says("{\"ok\":true}\n");
    let silent = |_: &Value, stream: &mut UnixStream| {
        let _ = BufReader::new(stream).read_line(&mut String::new());
    };
    let unwell: [(&str, Option<Boxed>); 4] = [
        ("silence", Some(Box::new(silent))),
        ("retry", Some(Box::new(says("{\"retry\":true,\"why\":\"busy\"}\n")))),
        ("garbage", Some(Box::new(says("\n")))),
        ("away", None),
    ];
    let well: Boxed = Box::new(well);
    let well: Arc<Script> = well.into();
    for (what, script) in unwell {
        let script: Option<Arc<Script>> = script.map(Into::into);
        for path in BOTH {
            let case = Case::new();
            let network = case.network(1);
            case.follows(&well);
            case.call("ADD", path, &network).result();
            fs::remove_file(&case.socket).unwrap();
            if let Some(script) = &script {
                case.follows(script);
            }
            let answer = case.call("DEL", path, &network);
            answer.result();
            assert!(answer.stderr.contains("c1"), "{what}: {answer:?}");
            case.nothing_is_left(what);
            // As after a reboot, when flanneld has not run yet.
            fs::remove_file(case.node.path("subnet.env")).unwrap();
            case.call("DEL", path, &network).result();
        }
    }
}

#[test]
fn where_subnet_env_names_no_socket_nobody_is_asked() {
    let case = Case::with_agent(says("{\"retry\":true}\n"));
    fs::write(case.node.path("subnet.env"), V4).unwrap();
    for path in BOTH {
        for verb in ["ADD", "DEL"] {
            case.call(verb, path, &case.network(1)).result();
        }
    }
    assert!(case.asked().is_empty());
}

#[test]
fn a_container_of_a_runtime_without_kubernetes_is_announced_without_a_pod() {
    let case = Case::with_agent(says("{\"ok\":true}\n"));
    let netns = case.pod.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &netns };
    case.node.call("ADD", pod, &case.network(1)).result();
    let asked = case.asked();
    assert_eq!((&asked[0]["verb"], &asked[0]["container"]), (&json!("add"), &json!("c1")));
    assert!(asked[0].get("pod").is_none() && asked[0].get("namespace").is_none(), "{asked:?}");
}

#[test]
fn status_says_whether_the_agent_would_answer() {
    let case = Case::new();
    let status = || {
        let mut network = case.network(1);
        network["cniVersion"] = json!("1.1.0");
        case.call("STATUS", Path::InProcess, &network)
    };
    let (code, msg) = status().error();
    assert!(code == 50 && msg.contains("does not listen on"), "{code} {msg}");
    case.starts(says("{\"retry\":true,\"why\":\"the first lists are not complete\"}\n"));
    let (code, msg) = status().error();
    assert!(code == 50 && msg.contains("the first lists are not complete"), "{code} {msg}");
    case.starts(says("{\"ok\":true}\n"));
    assert_eq!(status().result(), Value::Null);
    assert_eq!(case.asked().last(), Some(&json!({"v": 1, "verb": "status"})));
}

#[test]
fn gc_tells_the_agent_which_attachments_it_took_down() {
    let case = Case::with_agent(says("{\"ok\":true}\n"));
    case.call("ADD", Path::InProcess, &case.network(1)).result();
    case.asked();
    let mut network = case.network(1);
    network["cniVersion"] = json!("1.1.0");
    network["cni.dev/valid-attachments"] = json!([]);
    case.call("GC", Path::InProcess, &network).result();
    assert_eq!(case.asked(), [json!({"v": 1, "verb": "del", "container": "c1", "ifname": "eth0"})]);
    assert_eq!((case.node.kept(), case.node.reserved("n")), (vec![], vec![]));
}

#[test]
fn a_socket_that_can_not_be_one_and_a_wait_of_the_wrong_type_are_named() {
    let case = Case::new();
    let mut network = case.network(1);
    network["policyWaitSeconds"] = json!(256);
    let (code, msg) = case.call("ADD", Path::InProcess, &network).error();
    assert!(code == 999 && msg.contains("policyWaitSeconds"), "{code} {msg}");
    fs::write(case.node.path("subnet.env"), format!("{V4}FLANNEL_POLICY_SOCKET=policy.sock\n")).unwrap();
    let (code, msg) = case.call("ADD", Path::InProcess, &case.network(1)).error();
    assert!(
        code == 11 && msg.contains(r#"FLANNEL_POLICY_SOCKET="policy.sock" is not an absolute path"#),
        "{msg}"
    );
    assert_eq!(case.pod.links(), ["lo"]);
}

/// What a program prints that must succeed.
fn run(namespace: &Namespace, program: &str, arguments: &[&str]) -> String {
    let output = namespace.command(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// More than fit into one exchange with the kernel.
#[test]
fn thousands_of_connections_of_an_ipv6_address_are_forgotten_and_nothing_else_is_said() {
    let case = Case::with_agent(says("{\"ok\":true}\n"));
    let host = case.node.host();
    let run = |program: &str, arguments: &[&str]| run(host, program, arguments);
    host.ip(&["link", "set", "lo", "up"]);
    run(
        "nft",
        &["table inet t {\nchain o {\ntype filter hook output priority 0\nct state new counter\n}\n}"],
    );
    host.ip(&["address", "add", "fc00::2/128", "dev", "lo"]);
    run("bash", &["-c", "for i in {1..4000}; do echo x >/dev/udp/fc00::2/$i; done 2>/dev/null; true"]);
    host.ip(&["address", "del", "fc00::2/128", "dev", "lo"]);
    let tracked = || {
        run("cat", &["/proc/net/nf_conntrack"]).matches("dst=fc00:0000:0000:0000:0000:0000:0000:0002").count()
    };
    assert!(tracked() >= 4000, "{}", tracked());
    let answer = case.call("ADD", BOTH[0], &case.network(1));
    assert_eq!(tracked(), 0);
    answer.result();
    assert!(!answer.stderr.contains("forgotten"), "{}", answer.stderr);
}

#[test]
fn connections_of_an_address_from_before_its_pod_are_forgotten_once_its_policies_are_in_force() {
    for path in BOTH {
        let case = Case::with_agent(says("{\"ok\":true}\n"));
        let host = case.node.host();
        let run = |program: &str, arguments: &[&str]| run(host, program, arguments);
        host.ip(&["link", "set", "lo", "up"]);
        // The host has the addresses for the moment; one connection to what will be the pod's, one from it, one of others.
        let track =
            "table inet t {\nchain o {\ntype filter hook output priority 0\nct state new counter\n}\n}";
        run("nft", &[track]);
        let addresses =
            ["10.1.17.2/32", "10.1.17.3/32", "10.1.17.200/32", "fc00::2/128", "fc00::3/128", "fc00::200/128"];
        for address in addresses {
            host.ip(&["address", "add", address, "dev", "lo"]);
        }
        for net in ["10.1.17.", "fc00::"] {
            for (from, to) in [("200", "2"), ("2", "3"), ("200", "3")] {
                run("ping", &["-n", "-c1", "-W5", "-I", &format!("{net}{from}"), &format!("{net}{to}")]);
            }
        }
        for address in addresses {
            host.ip(&["address", "del", address, "dev", "lo"]);
        }
        let tracked = || {
            let table = run("cat", &["/proc/net/nf_conntrack"]);
            let of =
                |address: &str| table.lines().filter(|line| line.contains(&format!("{address} "))).count();
            let of_v6 = |host: u8| of(&format!("=fc00:0000:0000:0000:0000:0000:0000:{host:04}"));
            [of("=10.1.17.2"), of("=10.1.17.3"), of_v6(2), of_v6(3)]
        };
        assert_eq!(tracked(), [2, 2, 2, 2], "{path:?}");
        let result = case.call("ADD", path, &case.network(1)).result();
        assert_eq!(result["ips"][0]["address"], "10.1.17.2/24");
        assert_eq!(tracked(), [0, 1, 0, 1], "{path:?}");
        case.call("DEL", path, &case.network(1)).result();
    }
}
