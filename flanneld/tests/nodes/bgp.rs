//! BIRD and FRR announce what flanneld has in the kernel: the recipes of docs/bgp.md, word for word.

use std::path::PathBuf;

use backends::testing::{Node, Process};
use tempfile::TempDir;

use crate::bed::{Cluster, Member};

/// The recipe in the document, in this language.
fn recipe(language: &str) -> String {
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/bgp.md")).unwrap();
    let block = document.split(&format!("```{language}\n")).nth(1).unwrap();
    block.split("```").next().unwrap().to_owned()
}

/// A speaker on a node; its files are in a directory of the test.
struct Bird<'a> {
    node: &'a Node,
    directory: TempDir,
    _process: Process,
}

impl<'a> Bird<'a> {
    fn start(node: &'a Node, config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(at("bird.conf"), config).unwrap();
        let words = ["-f", "-c", &at("bird.conf"), "-s", &at("bird.ctl"), "-P", &at("bird.pid")];
        let process = node.namespace().command("bird").args(words).spawn().unwrap();
        Self { node, directory, _process: process }
    }

    fn tells(&self, question: &str) -> String {
        let socket: PathBuf = self.directory.path().join("bird.ctl");
        let words = ["-s".to_owned(), socket.display().to_string()];
        let words = words.into_iter().chain(question.split(' ').map(str::to_owned));
        let output = self.node.namespace().command("birdc").args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// FRR's daemons on a node; their files are in a directory of the test.
struct Frr<'a> {
    node: &'a Node,
    directory: TempDir,
    _processes: [Process; 2],
}

impl<'a> Frr<'a> {
    fn start(node: &'a Node, config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // They become another user.
        node.namespace().command("chown").arg("frr:frr").arg(directory.path()).ok().unwrap();
        let processes = [("zebra", ""), ("bgpd", config)].map(|(program, config)| {
            let at = |name: &str| directory.path().join(name).display().to_string();
            let (file, pid) = (at(&format!("{program}.conf")), at(&format!("{program}.pid")));
            std::fs::write(&file, config).unwrap();
            let command = node.namespace().command(format!("/usr/lib/frr/{program}")).args(["-P", "0"]);
            let places = ["--vty_socket", &at(""), "-z", &at("zebra.sock"), "-i", &pid, "-f", &file];
            command.args(places).spawn().unwrap()
        });
        Self { node, directory, _processes: processes }
    }

    /// Runs lines of a shell in which `vtysh` speaks to these daemons.
    fn shell(&self, lines: &str) -> String {
        let here = self.directory.path().display();
        let vtysh = format!("vtysh() {{ command vtysh --vty_socket {here} --config_dir {here} \"$@\"; }}\n");
        self.node.namespace().command("sh").args(["-ec", &(vtysh + lines)]).ok().unwrap()
    }
}

fn addressed(recipe: &str, own: &Node, other: &Node) -> String {
    recipe
        .replace("192.0.2.254", &other.address().to_string())
        .replace("192.0.2.1", &own.address().to_string())
}

/// What BIRD needs on a router to hear of the routes of this node.
fn router_of(router: &Node, node: &Node) -> String {
    format!(
        "log stderr all;\nrouter id {0};\nprotocol device {{}}\n\
         protocol bgp node {{ local {0} as 65000; neighbor {1} as 65001; graceful restart on;\n\
         ipv4 {{ import all; export none; }}; ipv6 {{ import all; export none; }}; }}\n",
        router.address(),
        node.address()
    )
}

#[test]
fn the_recipe_for_bird_announces_the_own_subnet_and_nothing_else() {
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let (mut member, peer) = (cluster.join(), cluster.join());
    let (subnet, theirs) = (member.subnet().trunc(), peer.subnet().trunc());
    member.wait("the peer's route", || member.node.has_route(theirs).unwrap());
    let router = cluster.fabric.node().unwrap();
    let receives = Bird::start(&router, &router_of(&router, &member.node));
    let speaks = Bird::start(&member.node, &addressed(&recipe("bird"), &member.node, &router));
    let line = format!("{subnet} ");
    member.wait("the route at the router", || receives.tells("show route").contains(&line));
    let table = receives.tells("show route");
    assert!(table.contains(&format!("via {} on eth0", member.node.address())), "{table}");
    assert!(!table.contains(&theirs.to_string()), "{table}{}", speaks.tells("show route all"));
    // The node's own routes are as before.
    assert!(member.show("ip route show proto 70").contains(&format!("blackhole {subnet} metric 4294967295")));
    assert_eq!(member.show(&format!("ip route show {theirs}")).lines().count(), 1);

    // An agent that is stopped, killed or started again withdraws nothing.
    member.agent.kill().unwrap();
    assert!(receives.tells("show route").contains(&line));
}

#[test]
fn the_recipe_for_frr_announces_the_own_subnet_also_by_what_the_subnet_file_says() {
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let (member, peer) = (cluster.join(), cluster.join());
    let (subnet, theirs) = (member.subnet().trunc(), peer.subnet().trunc());
    member.wait("the peer's route", || member.node.has_route(theirs).unwrap());
    let before = member.show("ip route show table all");
    let router = cluster.fabric.node().unwrap();
    let receives = Bird::start(&router, &router_of(&router, &member.node));
    let config =
        addressed(&recipe("frr"), &member.node, &router).replace("10.244.3.0/24", &subnet.to_string());
    let speaks = Frr::start(&member.node, &config);
    let line = format!("{subnet} ");
    let is_there = || receives.tells("show route").contains(&line);
    member.wait("the route at the router", is_there);
    let table = receives.tells("show route");
    assert!(table.contains(&format!("via {} on eth0", member.node.address())), "{table}");
    assert!(!table.contains(&theirs.to_string()), "{table}");
    let seen = || speaks.shell("vtysh -c 'show ip route kernel'");
    member.wait("the peer's route in FRR", || seen().contains(&theirs.to_string()));

    let forget = ["configure terminal", "router bgp 65001", "address-family ipv4 unicast"];
    let forget: String = forget.iter().map(|line| format!("-c '{line}' ")).collect();
    speaks.shell(&format!("vtysh {forget} -c 'no network {subnet}'"));
    member.wait("its end", || !is_there());
    let file = member.node.subnet_file().display().to_string();
    speaks.shell(&recipe("sh").replace("/run/flannel/subnet.env", &file));
    member.wait("the route that the subnet file tells of", is_there);
    assert_eq!(member.show("ip route show table all"), before, "the node's own routes are as before");
}

/// A speaker by the recipe that also takes over what its neighbour announces, each in an AS of its own.
fn learning<'a>(own: &'a Member, other: &Member, [own_as, other_as]: [&str; 2]) -> Bird<'a> {
    let config = addressed(&recipe("bird"), &own.node, &other.node)
        .replacen("export none;", "export where source = RTS_BGP;", 1)
        .replacen("import none;", "import where net ~ 10.244.0.0/16;", 1)
        .replace("as 65001", "as OWN")
        .replace("as 65000", &format!("as {other_as}"))
        .replace("as OWN", &format!("as {own_as}"));
    Bird::start(&own.node, &config)
}

#[test]
fn with_alloc_nodes_that_learn_each_others_subnets_connect_their_pods() {
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"alloc"}}"#);
    let members = [cluster.join(), cluster.join()];
    let [a, b] = &members;
    let birds = [learning(a, b, ["65001", "65002"]), learning(b, a, ["65002", "65001"])];
    let pods = members.each_ref().map(|member| member.pod());
    a.wait("echoes both ways", || {
        let [one, other] = &pods;
        one.namespace().reaches(other.address()).unwrap() && other.namespace().reaches(one.address()).unwrap()
    });
    let route = a.show(&format!("ip route show {}", b.subnet().trunc()));
    assert!(route.contains(&format!("via {} ", b.node.address())) && route.contains("proto bird"), "{route}");
    drop(birds);
}
