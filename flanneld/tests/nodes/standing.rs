//! How a node stands with its store, as readiness tells it: away, refused, about to expire; with a real etcd.

use std::process::Command;
use std::time::Duration;

use backends::testing::{Fabric, wait_for};

use crate::bed::{Cluster, LIMIT, Member, VXLAN};

/// A node asks etcd every 40 to 50 s whether it is still let in, and a connection that is silent is given up after 30 s.
const A_MINUTE: Duration = Duration::from_secs(100);
const ROOT: [&str; 2] = ["--user", "root:rootpw"];
const PREFIX: &str = "/coreos.com/network/";

fn wait_long(member: &Member, what: &str, condition: impl FnMut() -> bool) {
    if let Err(error) = wait_for(what, A_MINUTE, condition) {
        panic!("{error}: {}\n{}", member.verbose(), member.agent.log());
    }
}

/// The moment after `before`, as `date` counts seconds.
fn moment_after(text: &str, before: &str) -> i64 {
    let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no {before:?} in {text}"));
    let (moment, _) = rest.split_once(" UTC").unwrap();
    // The year is left out of the text, and a lease may end in the next one.
    let date = |args: &[&str]| {
        let output = Command::new("date").arg("-u").args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let (year, now): (i64, i64) = (date(&["+%Y"]).parse().unwrap(), date(&["+%s"]).parse().unwrap());
    let of = |year: i64| -> i64 { date(&["-d", &format!("{year}-{moment}"), "+%s"]).parse().unwrap() };
    let half_a_year = 180 * 86_400;
    [year - 1, year, year + 1].map(of).into_iter().find(|at| (at - now).abs() < half_a_year).unwrap()
}

fn root(cluster: &Cluster, words: &str) -> String {
    cluster.etcdctl(&[&ROOT[..], &words.split(' ').collect::<Vec<_>>()].concat())
}

/// An etcd with a user `fl`, whose password is `pw`, and who may read and write what flannel needs.
fn with_users() -> Cluster {
    let cluster = Cluster::new(VXLAN);
    for words in [
        "user add root:rootpw",
        "user grant-role root root",
        "user add fl:pw",
        "role add flannel",
        "role grant-permission flannel --prefix=true readwrite /coreos.com/network/",
        "user grant-role fl flannel",
        "auth enable",
    ] {
        cluster.etcdctl(&words.split(' ').collect::<Vec<_>>());
    }
    cluster
}

const USER: [&str; 2] = ["--etcd-username=fl", "--etcd-password=pw"];

#[test]
fn a_store_that_is_away_is_noted_with_reason_remedy_and_the_end_of_the_own_lease() {
    let mut cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    assert!(a.verbose().contains(r#""store":"met""#), "{}", a.verbose());
    cluster.etcd.kill();
    a.wait("the note", || a.verbose().contains("nothing listens at"));
    let text = a.verbose();
    assert!(text.contains("is etcd running? Look at --etcd-endpoints"), "{text}");
    let (since, ends) =
        (moment_after(&text, "store unreachable since "), moment_after(&text, "own lease ends at "));
    assert!((86_000..=86_402).contains(&(ends - since)), "{text}");
    assert!(a.is_ready(), "the data path works: {text}");
    cluster.etcd.restart().unwrap();
    a.wait("the end of the note", || !a.verbose().contains("unreachable"));
    assert!(a.is_ready());
}

#[test]
fn a_store_that_keeps_silent_is_noted_within_a_minute_and_by_one_text() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    let port = cluster.etcd.endpoint().rsplit(':').next().unwrap().to_owned();
    let rules = format!(
        "table ip silence {{ chain in {{ type filter hook input priority 0; tcp dport {port} drop; }}; }}"
    );
    cluster.fabric.switch().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    wait_long(&a, "the note", || a.verbose().contains("store unreachable since"));
    wait_long(&a, "the reason", || {
        a.verbose()
            .contains("it keeps silent: look at etcd and at the network in between); own lease ends at")
    });
    assert!(a.is_ready());
    cluster.fabric.switch().command("nft").args(["delete", "table", "ip", "silence"]).ok().unwrap();
    wait_long(&a, "the end of the note", || !a.verbose().contains("unreachable"));
}

#[test]
fn a_store_that_begins_to_refuse_a_node_is_noted_with_the_remedy_and_the_node_stays_ready() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    for words in ["user add root:rootpw", "user grant-role root root", "auth enable"] {
        cluster.etcdctl(&words.split(' ').collect::<Vec<_>>());
    }
    wait_long(&a, "the note", || a.verbose().contains("store refuses this node since"));
    let text = a.verbose();
    assert!(text.contains("it asks for a user: give --etcd-username and --etcd-password"), "{text}");
    let (since, ends) =
        (moment_after(&text, "refuses this node since "), moment_after(&text, "own lease ends at "));
    assert!((86_000..=86_402).contains(&(ends - since)), "{text}");
    assert!(a.is_ready(), "{text}");
    assert!(a.node.has_route(b.subnet()).unwrap());
    root(&cluster, "auth disable");
    wait_long(&a, "the end of the note", || !a.verbose().contains("refuses"));
}

#[test]
fn a_node_that_may_no_longer_write_is_told_so_and_unready_before_its_lease_ends() {
    let cluster = with_users();
    let a = cluster.join_with(&USER);
    root(&cluster, "role revoke-permission flannel --prefix=true /coreos.com/network/");
    root(&cluster, "role grant-permission flannel --prefix=true read /coreos.com/network/");
    wait_long(&a, "the note", || a.verbose().contains("store refuses this node since"));
    let text = a.verbose();
    assert!(text.contains("permission denied: user fl needs a role that may read and write"), "{text}");
    assert!(text.contains(&format!("--prefix=true readwrite {PREFIX}")), "{text}");
    assert!(a.is_ready(), "{text}");

    // 24 hours pass at once: the lease has a little more than three minutes left.
    let key = root(&cluster, "get --prefix /coreos.com/network/subnets/ --keys-only").trim().to_owned();
    let value = root(&cluster, &format!("get --print-value-only {key}")).trim().to_owned();
    let granted = root(&cluster, "lease grant 200");
    let id = granted.split(' ').nth(1).unwrap();
    root(&cluster, &format!("put --lease={id} {key} {value}"));
    wait_long(&a, "not ready", || !a.is_ready());
    let (_, reasons) = a.agent.get("/readyz").unwrap();
    assert!(reasons.contains(r#""condition":"store""#) && reasons.contains("permission denied"), "{reasons}");
    assert!(reasons.contains("peers drop this node then"), "{reasons}");

    root(&cluster, "role grant-permission flannel --prefix=true readwrite /coreos.com/network/");
    wait_long(&a, "ready", || a.is_ready());
    let left = root(&cluster, &format!("get -w json {key}"));
    assert!(
        !left.contains(&format!(r#""lease":{}"#, i64::from_str_radix(id, 16).unwrap())),
        "renewed: {left}"
    );
}

#[test]
fn a_node_is_unready_before_its_lease_ends_while_the_store_is_away() {
    let mut cluster = Cluster::new(VXLAN);
    // It is renewed a minute before its end.
    let a = cluster.join_with(&["--subnet-lease-renew-margin=1"]);
    let (key, value) = cluster.leases().remove(0);
    let granted = cluster.etcdctl(&["lease", "grant", "280"]);
    let id = granted.split(' ').nth(1).unwrap().to_owned();
    cluster.etcdctl(&["put", &format!("--lease={id}"), &key, &value]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(a.is_ready(), "all is well: {}", a.verbose());
    cluster.etcd.kill();
    wait_long(&a, "not ready", || !a.is_ready());
    let (_, reasons) = a.agent.get("/readyz").unwrap();
    assert!(
        reasons.contains("store unreachable since") && reasons.contains("peers drop this node then"),
        "{reasons}"
    );
    cluster.etcd.restart().unwrap();
    wait_long(&a, "ready", || a.is_ready());
}

/// What a node says that starts with saved state and is refused.
fn refused(a: &Member, reason: &str) {
    wait_long(a, "the refusal", || a.verbose().contains(reason));
    wait_long(a, "the rest to be in order", || a.verbose().contains(r#""subnet-file":"met""#));
    let text = a.verbose();
    assert!(!a.is_ready(), "{text}");
    assert!(text.contains(r#""store":"the store refuses this node since"#), "{text}");
    assert!(text.contains("and its peers are as they were saved"), "{text}");
    let lines: Vec<String> =
        a.agent.log().lines().filter(|line| line.contains(reason)).map(str::to_owned).collect();
    assert!(lines.iter().any(|line| line.starts_with('E')), "loud: {lines:#?}");
    assert!(lines.len() <= 2, "and said once: {lines:#?}");
}

#[test]
fn a_node_that_starts_with_a_password_that_is_refused_runs_on_what_was_saved_and_is_not_ready() {
    let cluster = with_users();
    let (mut a, b) = (cluster.join_with(&USER), cluster.join_with(&USER));
    a.wait("the saved state", || a.has_kept(b.subnet()));
    a.agent.terminate(LIMIT).unwrap();
    a.ip("link del flannel.1");
    let mut a = cluster.start(a.into_node(), &["--etcd-username=fl", "--etcd-password=other"]);
    refused(&a, "user fl and the password are not accepted: look at --etcd-username and --etcd-password");
    assert!(a.node.has_route(b.subnet()).unwrap(), "pods go on talking: {}", a.agent.log());
    assert!(!a.agent.log().contains("other"), "no secret is logged");
    for words in ["user delete fl", "user add fl:other", "user grant-role fl flannel"] {
        root(&cluster, words);
    }
    a.agent.wait_ready(A_MINUTE).unwrap();
    assert!(!a.verbose().contains("refuses"), "{}", a.verbose());
}

#[test]
fn a_node_that_starts_while_the_store_is_away_is_ready_on_what_was_saved() {
    let mut cluster = with_users();
    let (mut a, b) = (cluster.join_with(&USER), cluster.join_with(&USER));
    a.wait("the saved state", || a.has_kept(b.subnet()));
    a.agent.terminate(LIMIT).unwrap();
    cluster.etcd.kill();
    let mut a = cluster.start(a.into_node(), &USER);
    a.agent.wait_ready(A_MINUTE).unwrap();
    let text = a.verbose();
    assert!(text.contains("store unreachable since") && text.contains("as they were saved"), "{text}");
    // It comes back, and refuses the node that it let in before.
    cluster.etcd.restart().unwrap();
    wait_long(&a, "the store", || !a.verbose().contains("unreachable"));
    assert!(a.is_ready(), "{}", a.verbose());
}

#[test]
fn a_directory_of_leases_that_is_gone_is_noted_with_the_end_of_the_own_lease() {
    let fabric = Fabric::new().unwrap();
    let place = tempfile::tempdir().unwrap();
    let (here, gone) = (place.path().join("leases"), place.path().join("elsewhere"));
    std::fs::create_dir(&here).unwrap();
    std::fs::write(here.join("config.json"), VXLAN).unwrap();
    let args = [format!("--lease-store=file:{}", here.display())];
    let mut a = Member::start_with_env(fabric.node().unwrap(), &args, &[]);
    a.agent.wait_ready(LIMIT).unwrap();
    std::fs::rename(&here, &gone).unwrap();
    wait_long(&a, "the note", || a.verbose().contains("store unreachable since"));
    let text = a.verbose();
    assert!(text.contains(", or mount its file system"), "{text}");
    let (since, ends) =
        (moment_after(&text, "store unreachable since "), moment_after(&text, "own lease ends at "));
    assert!((86_000..=86_402).contains(&(ends - since)), "{text}");
    assert!(a.is_ready(), "{text}");
    std::fs::rename(&gone, &here).unwrap();
    wait_long(&a, "the end of the note", || !a.verbose().contains("unreachable"));
}

/// Runs openssl.
fn openssl(words: &str) {
    let output = Command::new("openssl").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_node_that_starts_with_an_authority_that_does_not_know_etcd_is_refused_and_not_away() {
    let mut cluster = Cluster::new(VXLAN);
    let files = tempfile::tempdir().unwrap();
    let path = |name: &str| files.path().join(name).display().to_string();
    let secure = cluster.etcd.other_address().unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    std::fs::write(path("names"), format!("subjectAltName=IP:{}", secure.ip())).unwrap();
    for ca in ["ca", "stranger"] {
        openssl(&format!("req -x509 {key} -keyout {0}.key -out {0} -subj /CN={ca}", path(ca)));
    }
    openssl(&format!("req {key} -keyout {0}.key -out {0}.csr -subj /CN=server", path("server")));
    openssl(&format!(
        "x509 -req -in {0}.csr -CA {1} -CAkey {1}.key -CAcreateserial -out {0} -extfile {2}",
        path("server"),
        path("ca"),
        path("names")
    ));
    let plain = cluster.etcd.endpoint();
    let urls = format!("{plain},https://{secure}");
    cluster
        .etcd
        .restart_with(vec![
            format!("--listen-client-urls={urls}"),
            format!("--advertise-client-urls={urls}"),
            format!("--cert-file={}", path("server")),
            format!("--key-file={}.key", path("server")),
        ])
        .unwrap();

    let args =
        |ca: &str| vec![format!("--etcd-endpoints=https://{secure}"), format!("--etcd-cafile={}", path(ca))];
    let mut a = Member::start_with_env(cluster.fabric.node().unwrap(), &args("ca"), &[]);
    a.agent.wait_ready(LIMIT).unwrap();
    let subnet = a.subnet();
    a.wait("the saved state", || a.has_kept(subnet));
    a.agent.terminate(LIMIT).unwrap();
    let mut a = Member::start_with_env(a.into_node(), &args("stranger"), &[]);
    refused(
        &a,
        "is signed by an authority that is not trusted here: give the authority's certificate with --etcd-cafile",
    );
    a.agent.terminate(LIMIT).unwrap();

    // Both ways to mistake the scheme: that is another store than the one that was saved.
    for (endpoint, question) in
        [(format!("https://{}", &plain[7..]), "is it http?"), (format!("http://{secure}"), "is it https?")]
    {
        let mut b = Member::start_with_env(a.into_node(), &[format!("--etcd-endpoints={endpoint}")], &[]);
        wait_long(&b, "the question", || b.verbose().contains(question));
        assert!(!b.is_ready(), "{}", b.verbose());
        b.agent.terminate(LIMIT).unwrap();
        a = b;
    }
    let mut a = Member::start_with_env(a.into_node(), &args("ca"), &[]);
    a.agent.wait_ready(LIMIT).unwrap();
    assert_eq!(a.subnet(), subnet);
}
