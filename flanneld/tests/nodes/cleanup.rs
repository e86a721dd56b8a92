//! `flanneld cleanup` finds everything that an agent makes, and nothing else.

use backends::testing::wait_for_some;

use crate::bed::{Cluster, HOST_GW, LIMIT, Member, VXLAN, flanneld};

fn cleanup(member: &Member, more: &[&str]) -> String {
    let file = format!("--subnet-file={}", member.node.subnet_file().display());
    member.node.namespace().command(flanneld()).args(["cleanup", &file]).args(more).ok().unwrap()
}

fn everything(member: &Member) -> String {
    let links = member.show("ip -o link show");
    let mut links: Vec<&str> = links.lines().filter_map(|line| line.split(": ").nth(1)).collect();
    links.sort_unstable();
    format!(
        "{}\n{}\n{}",
        links.join("\n"),
        member.show("ip -4 route show"),
        member.show("ip -o -4 address show")
    )
}

#[test]
fn after_cleanup_a_node_is_as_it_was_before_the_agent() {
    for config in [VXLAN, HOST_GW] {
        let cluster = Cluster::new(config);
        let (mut a, b) = (cluster.join(), cluster.join());
        a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
        a.ip(
            "route add 10.244.250.0/25 via 172.31.0.254\nroute add 192.168.7.0/24 via 172.31.0.254 proto 70",
        );
        a.agent.terminate(LIMIT).unwrap();
        let installed = everything(&a);
        let told = cleanup(&a, &["--dry-run"]);
        assert!(told.contains("would remove") && told.contains("subnet.env"), "{told}");
        assert_eq!(everything(&a), installed, "a dry run changes nothing");
        assert!(a.node.subnet_file().exists());

        let told = cleanup(&a, &[]);
        assert!(told.contains("removed"), "{told}");
        let clean = everything(&a);
        assert!(!clean.contains("flannel") && !clean.contains(&b.subnet().to_string()), "{clean}");
        assert!(clean.contains("10.244.250.0/25") && clean.contains("192.168.7.0/24"), "{clean}");
        assert!(!a.node.subnet_file().exists());
    }
}

/// Output, errors and code of a cleanup.
fn try_cleanup(member: &Member, wrapper: &[&str], args: &[&str]) -> (String, String, Option<i32>) {
    let mut words: Vec<String> = wrapper.iter().map(ToString::to_string).collect();
    words.extend([flanneld().display().to_string(), "cleanup".to_owned()]);
    words.extend(args.iter().map(ToString::to_string));
    let output = member.node.namespace().command(&words[0]).args(&words[1..]).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}

fn file_of(member: &Member) -> String {
    format!("--subnet-file={}", member.node.subnet_file().display())
}

fn state_of(member: &Member) -> std::path::PathBuf {
    let find = || {
        let entries = std::fs::read_dir(member.node.subnet_file().parent().unwrap()).unwrap();
        entries
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.to_string_lossy().ends_with(".state.json"))
    };
    wait_for_some("the saved state", LIMIT, find).unwrap()
}

#[test]
fn without_its_subnet_file_an_agents_objects_are_told_by_what_it_saved_and_else_only_all_is_wide() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join(), cluster.join());
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
    let state = state_of(&a);
    a.wait("the saved state", || state.exists());
    a.agent.kill().unwrap();
    let file = file_of(&a);
    std::fs::remove_file(a.node.subnet_file()).unwrap();
    let (told, errors, code) = try_cleanup(&a, &[], &[&file, "--dry-run"]);
    assert!(told.contains("would remove: link flannel.1") && code == Some(0), "{told}{errors}");
    assert!(errors.contains(&state.display().to_string()), "{errors}");

    // A typing error widens nothing.
    let installed = everything(&a);
    let (told, errors, code) = try_cleanup(&a, &[], &["--subnet-file=/run/typo.env"]);
    assert_eq!((told.as_str(), code), ("", Some(1)), "{errors}");
    assert!(errors.contains("/run/typo.env does not exist") && errors.contains("--all"), "{errors}");
    std::fs::remove_file(&state).unwrap();
    for (content, part) in [(None, "does not exist"), (Some("# nothing"), "names no network")] {
        if let Some(content) = content {
            std::fs::write(a.node.subnet_file(), content).unwrap();
        }
        let (_, errors, code) = try_cleanup(&a, &[], &[&file]);
        assert!(errors.contains(part) && errors.contains("--all") && code == Some(1), "{errors}");
    }
    assert_eq!(everything(&a), installed);
    // Nor is another program's file removed because it was named; what a power cut left of ours is.
    let other = a.node.subnet_file().with_file_name("other.conf");
    std::fs::write(&other, "a = b\n").unwrap();
    let (told, errors, code) =
        try_cleanup(&a, &[], &["--all", &format!("--subnet-file={}", other.display())]);
    assert!(told.contains("removed: link flannel.1") && code == Some(0), "{told}{errors}");
    assert!(errors.contains("other.conf stays: it is no subnet file") && other.exists(), "{errors}");
    std::fs::write(a.node.subnet_file(), "\0\0\0\0").unwrap();
    let (told, errors, code) = try_cleanup(&a, &[], &["--all", &file]);
    assert!(told.contains("removed: file") && errors.is_empty() && code == Some(0), "{told}{errors}");
    assert_eq!(cleanup(&a, &["--all"]), "nothing to remove\n");
    assert!(!everything(&a).contains("flannel"));
}

#[test]
fn cleanup_beside_a_running_agent_names_its_pid_and_removes_nothing() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join(), cluster.join());
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
    let (file, pid) = (file_of(&a), format!("pid {}", a.agent.process().id()));
    let installed = everything(&a);
    for args in [&[file.as_str()][..], &[&file, "--all"], &["--all", "--subnet-file=/run/none.env"]] {
        let (told, errors, code) = try_cleanup(&a, &[], args);
        assert_eq!((told.as_str(), code), ("", Some(1)), "{args:?}: {errors}");
        assert!(errors.contains(&pid), "{args:?}: {errors}");
    }
    let (told, errors, code) = try_cleanup(&a, &[], &[&file, "--dry-run"]);
    assert!(told.contains("would remove: link flannel.1") && code == Some(0), "{told}{errors}");
    assert!(errors.contains(&pid), "{errors}");
    assert_eq!(everything(&a), installed);

    // The same unit started twice is stopped by the same lock.
    let second =
        a.node.namespace().command(flanneld()).args([&file, "--lease-store=file:/nowhere"]).output().unwrap();
    let errors = String::from_utf8_lossy(&second.stderr);
    assert!(errors.contains(&pid) && second.status.code() == Some(1), "{errors}");

    a.agent.kill().unwrap();
    assert!(cleanup(&a, &[]).contains("removed: link flannel.1"), "a lock ends with its process");
    assert!(
        std::fs::read_dir(a.node.subnet_file().parent().unwrap())
            .unwrap()
            .all(|entry| { !entry.unwrap().path().to_string_lossy().contains("subnet.env") })
    );
}

#[test]
fn what_can_not_be_removed_or_seen_is_said_and_the_next_run_still_knows_what_to_remove() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join_with(&["--ip-masq"]), cluster.join());
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
    a.agent.terminate(LIMIT).unwrap();
    let (file, state, installed) = (file_of(&a), state_of(&a), everything(&a));
    let weak = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"];
    let (told, errors, code) = try_cleanup(&a, &weak, &[&file]);
    assert!(!told.contains("removed: file") && code == Some(1), "{told}{errors}");
    assert!(errors.contains("not everything could be removed"), "{errors}");
    assert!(state.exists() && a.node.subnet_file().exists());
    assert_eq!(everything(&a), installed);

    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    // The directory of the test has to let others in, as /run/flannel does.
    for directory in
        a.node.subnet_file().ancestors().skip(1).take_while(|path| path.starts_with(std::env::temp_dir()))
    {
        let _ = std::fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(0o755));
    }
    let (told, errors, code) = try_cleanup(&a, &nobody, &[&file, "--dry-run"]);
    assert!(told.contains("would remove: link flannel.1"), "{told}{errors}");
    assert!(errors.contains("not seen: traffic rules") && errors.contains("root"), "{errors}");
    assert_eq!(code, Some(1));

    let told = cleanup(&a, &["--dry-run"]);
    assert!(told.contains("would remove: nftables table ip flannel-ipv4\n"), "{told}");
    let told = cleanup(&a, &[]);
    assert!(told.contains("removed: nftables table ip flannel-ipv4\n"), "{told}");
    assert!(!state.exists() && !a.node.subnet_file().exists());
}
