//! Real programs as commands.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::run::{MAX_OUTPUT, Output, run};
use super::words::Variables;
use super::*;

/// Long enough for a machine that does something else.
const LIMIT: Duration = Duration::from_secs(60);

/// Programs and files of a test.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// A script; `DIR` in it stands for this place.
    fn script(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        let text = text.replace("DIR", &self.0.path().display().to_string());
        subnet::testing::write_program(&path, &format!("#!/bin/sh\n{text}\n")).unwrap();
        path.display().to_string()
    }
}

fn variables(pairs: &[(&str, &str)]) -> Variables {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

async fn said(command: &str, data: &str) -> Result<Output, String> {
    run(command, &variables(&[("SUBNET", "10.244.2.0/24")]), data, LIMIT).await
}

fn is_gone(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.split(' ').nth(1)).unwrap_or("gone");
    ["gone", "Z"].contains(&state)
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_command_gets_its_words_its_variables_and_its_data_and_no_shell() {
    let place = Place::new();
    let script = place.script("s", "for word; do echo \"<$word>\"; done; echo \"$SUBNET\"; cat");
    let output =
        said(&format!("{script} a  '$SUBNET ${{SUBNET}}b $NONE $(id) ; >x"), "one\ntwo").await.unwrap();
    assert_eq!(
        output.text,
        "<a>\n<'10.244.2.0/24>\n<10.244.2.0/24b>\n<>\n<$(id)>\n<;>\n<>x>\n10.244.2.0/24\none\ntwo"
    );
    assert!(!output.cut);
}

#[tokio::test]
async fn data_of_any_kind_and_size_arrives_as_it_is_with_a_line_break() {
    let place = Place::new();
    let script = place.script("s", "cat >DIR/data");
    for data in ["", "\"q\" 'q' `id` $(id) \\ %s \u{1}", "nul\0byte", &"x\"$(y)\n".repeat(150_000)] {
        said(&script, data).await.unwrap();
        assert!(
            fs::read(place.path("data")).unwrap() == format!("{data}\n").as_bytes(),
            "{} bytes",
            data.len()
        );
    }
    // It is not read, and nothing waits for that.
    let idle = place.script("idle", "exit 0");
    assert!(said(&idle, &"x".repeat(1 << 20)).await.is_ok());
}

#[tokio::test]
async fn of_a_long_output_the_beginning_is_kept() {
    let place = Place::new();
    let script = place.script("s", "head -c 10000000 /dev/zero | tr '\\0' x; echo end >&2");
    let output = said(&script, "").await.unwrap();
    assert!(output.cut && output.text.len() == MAX_OUTPUT, "{}", output.text.len());
    let both = place.script("both", "echo out; echo err >&2");
    assert_eq!(said(&both, "").await.unwrap().text, "out\nerr");
}

#[tokio::test]
async fn a_command_that_hangs_is_killed_with_its_children() {
    let place = Place::new();
    let script = place.script("s", "sleep 600 & echo $! >DIR/child; mv DIR/child DIR/pid; wait");
    let hanging = run(&script, &Variables::new(), "", Duration::from_secs(2)).await;
    let why = hanging.unwrap_err();
    assert!(why.contains("did not end within 2 s") && why.contains("killed"), "{why}");
    let child = place.read("pid");
    assert!(!child.is_empty());
    until("the child's end", || is_gone(&child)).await;
}

#[tokio::test]
async fn a_daemon_that_keeps_the_output_open_keeps_nobody_waiting() {
    let place = Place::new();
    let script = place.script("s", "sleep 600 & echo $! >DIR/pid; echo started");
    let output = said(&script, "").await.unwrap();
    assert_eq!(output.text, "started");
    let daemon = place.read("pid");
    assert!(!is_gone(&daemon), "it may go on");
    let pid = rustix::process::Pid::from_raw(daemon.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn what_can_not_be_run_or_fails_is_named_with_the_reason_and_the_remedy() {
    let place = Place::new();
    let plain = place.path("plain");
    fs::write(&plain, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&plain, PermissionsExt::from_mode(0o644)).unwrap();
    let text = place.path("text");
    subnet::testing::write_program(&text, "echo x\n").unwrap();
    let failing = place.script("failing", "echo first; echo why >&2; exit 3");
    let repeating = place.script("repeating", "cat >&2; exit 1");
    let killed = place.script("killed", "kill -9 $$");
    for (command, parts) in [
        ("/nonexistent/program x".to_owned(), ["no program /nonexistent/program", "docs/extension.md"]),
        ("no-such-program-here".to_owned(), ["no program no-such-program-here in PATH", "mount a directory"]),
        (plain.display().to_string(), ["plain is not executable", "chmod 755"]),
        (text.display().to_string(), ["text is neither a program nor a script", "#!/bin/sh"]),
        (
            "/dev/null".to_owned(),
            ["/dev/null is a directory, a device, a pipe or a socket", "name a program"],
        ),
        (place.0.path().display().to_string(), [&place.0.path().display().to_string(), "directory"]),
        ("$NONE x".to_owned(), ["name is empty", "not set"]),
        (" \n".to_owned(), ["it is empty", ""]),
        ("sh \0".to_owned(), ["sh can't be run", "nul"]),
        (failing, ["failed (exit status: 3)", ": why"]),
        (repeating, ["failed (exit status: 1)", "is not shown"]),
        (killed, ["signal: 9", "printed nothing"]),
    ] {
        let why = said(&command, "secret").await.unwrap_err();
        assert!(parts.iter().all(|part| why.contains(part)) && !why.contains("secret"), "{command}: {why}");
    }
}

#[tokio::test]
async fn what_the_first_command_prints_is_published_and_more_than_a_lease_takes_is_refused() {
    let place = Place::new();
    let with = |pre_startup: String| ExtensionConfig { pre_startup, ..ExtensionConfig::default() };
    let script = place.script("s", "cat >DIR/stdin; echo '  {\"a\": \"b\"} '");
    assert_eq!(prepare(&with(script)).await.unwrap().as_deref(), Some("{\"a\": \"b\"}"));
    assert_eq!(place.read("stdin"), "\n");
    assert_eq!(prepare(&with(String::new())).await.unwrap(), None);
    let long = place.script("long", "head -c 100000 /dev/zero | tr '\\0' x");
    let why = prepare(&with(long)).await.unwrap_err();
    assert!(why.contains("PreStartupCommand") && why.contains("64 KiB"), "{why}");
}

/// A task with its health, the loop's end of the conversation, and commands that write what they are told.
struct Bed {
    place: Place,
    hooks: Hooks,
    health: Health,
    task: JoinHandle<std::convert::Infallible>,
}

impl Bed {
    fn new() -> Self {
        Self::at(Place::new(), true)
    }

    fn at(place: Place, allowed: bool) -> Self {
        for hook in ["add", "remove"] {
            // One line for each run; it fails or hangs as long as there is a file that says so.
            let script = format!(
                "data=$(cat)\ncase $SUBNET in *.99.0/24) while [ -e DIR/hang ]; do sleep 0.05; done;; esac\n\
                 echo \"{hook} $* $PUBLIC_IP $IPV6SUBNET $PUBLIC_IPV6 [$data]\" >>DIR/log\n[ ! -e DIR/fail ]"
            );
            place.script(hook, &script);
        }
        place.script("post", "echo \"post $NETWORK $SUBNET $IPV6SUBNET $PUBLIC_IP $PUBLIC_IPV6\" >>DIR/log\n[ ! -e DIR/fail-post ]");
        let health = Health::new(LIMIT, []);
        let (hooks, task) = Hooks::new(allowed, place.path("x.extension.json"), health.clone());
        Self { place, hooks, health, task: tokio::spawn(task.run()) }
    }

    fn facts(&self, peers: &[(u8, u8, &str)]) -> ExtensionFacts {
        let command = |name: &str| format!("{} $SUBNET", self.place.path(name).display());
        let own: Subnets = ["10.244.1.0/24".parse().unwrap()].into_iter().collect();
        let networks = ["10.244.0.0/16".parse().unwrap()].into_iter().collect();
        let address = |last: u8| PublicAddrs { v4: Some([192, 0, 2, last].into()), v6: None };
        let peer = |(number, last, data): &(u8, u8, &str)| {
            let subnets = [format!("10.244.{number}.0/24").parse().unwrap()].into_iter().collect();
            (subnets, Entry { public: address(*last), data: (*data).to_owned() })
        };
        ExtensionFacts {
            config: ExtensionConfig {
                subnet_add: command("add"),
                subnet_remove: command("remove"),
                ..ExtensionConfig::default()
            },
            start: StartupFacts { command: command("post"), networks, own, local: address(1) },
            peers: peers.iter().map(peer).collect(),
        }
    }

    fn tell(&self, peers: &[(u8, u8, &str)]) {
        self.hooks.told.send_replace(ExtensionUse::Facts(Arc::new(self.facts(peers))));
    }

    fn log(&self) -> Vec<String> {
        self.place.read("log").lines().map(str::to_owned).collect()
    }

    async fn logs(&self, lines: &[&str]) {
        until(&format!("{lines:?} in {:?}", self.log()), || self.log() == lines).await;
    }

    /// What is noted on disk: for which subnets, and whether a command has succeeded.
    fn noted(&self) -> Vec<(String, bool)> {
        let memory = Memory::read(&self.place.path("x.extension.json")).unwrap();
        memory.peers.iter().map(|(subnets, noted)| (subnets.to_string(), noted.by.is_some())).collect()
    }

    async fn notes(&self, peers: &[(&str, bool)]) {
        let wanted: Vec<(String, bool)> =
            peers.iter().map(|(net, done)| ((*net).to_owned(), *done)).collect();
        until(&format!("{wanted:?} in {:?}", self.noted()), || self.noted() == wanted).await;
    }

    /// Kills the task as the process' death would, and starts another one.
    async fn restarted(self, allowed: bool) -> Self {
        self.task.abort();
        let _ = self.task.await;
        let _ = fs::remove_file(self.place.path("log"));
        Self::at(self.place, allowed)
    }
}

const POST: &str = "post 10.244.0.0/16 10.244.1.0/24 ::/0 192.0.2.1 <nil>";
const ADD_2: &str = "add 10.244.2.0/24 192.0.2.2 ::/0 <nil> [hello]";

#[tokio::test]
async fn commands_run_once_for_each_peer_that_comes_changes_and_goes() {
    let bed = Bed::new();
    bed.tell(&[(2, 2, "hello")]);
    bed.logs(&[POST, ADD_2]).await;
    assert!(bed.hooks.started.borrow().is_some());
    bed.notes(&[("10.244.2.0/24", true)]).await;
    bed.tell(&[(2, 9, "hello")]);
    let changed = [
        "remove 10.244.2.0/24 192.0.2.2 ::/0 <nil> [hello]",
        "add 10.244.2.0/24 192.0.2.9 ::/0 <nil> [hello]",
    ];
    bed.logs(&[POST, ADD_2, changed[0], changed[1]]).await;
    bed.tell(&[]);
    let gone = "remove 10.244.2.0/24 192.0.2.9 ::/0 <nil> [hello]";
    bed.logs(&[POST, ADD_2, changed[0], changed[1], gone]).await;
    bed.notes(&[]).await;
    until("no file", || !bed.place.path("x.extension.json").exists()).await;
    assert_eq!(bed.health.ready(), Ok(()));
}

#[tokio::test]
async fn a_command_that_fails_is_named_and_tried_again_until_it_succeeds() {
    let bed = Bed::new();
    fs::write(bed.place.path("fail"), "").unwrap();
    bed.tell(&[(2, 2, "hello")]);
    let notes = || bed.health.all().1.join("\n");
    until("the note", || notes().contains("SubnetAddCommand for 10.244.2.0/24")).await;
    assert!(notes().contains("exit status: 1"), "{}", notes());
    assert_eq!(bed.health.ready(), Ok(()), "one peer is no reason");
    bed.notes(&[("10.244.2.0/24", false)]).await;
    fs::remove_file(bed.place.path("fail")).unwrap();
    bed.notes(&[("10.244.2.0/24", true)]).await;
    until("no note", || notes().is_empty()).await;
    assert!(bed.log().iter().filter(|line| *line == ADD_2).count() >= 2);
}

#[tokio::test]
async fn a_node_is_not_ready_and_adds_no_peers_before_the_command_of_its_start_has_succeeded() {
    let bed = Bed::new();
    fs::write(bed.place.path("fail-post"), "").unwrap();
    bed.tell(&[(2, 2, "hello")]);
    until("the reason", || {
        bed.health
            .ready()
            .is_err_and(|why| why[0].0 == CONDITION && why[0].1.contains("PostStartupCommand: "))
    })
    .await;
    assert!(bed.hooks.started.borrow().is_none() && !bed.log().contains(&ADD_2.to_owned()));
    fs::remove_file(bed.place.path("fail-post")).unwrap();
    until("readiness", || bed.health.ready().is_ok()).await;
    until("the peer", || bed.log().last().is_some_and(|line| line == ADD_2)).await;
}

#[tokio::test]
async fn a_command_that_hangs_keeps_no_other_peer_waiting() {
    let bed = Bed::new();
    fs::write(bed.place.path("hang"), "").unwrap();
    bed.tell(&[(99, 9, "x"), (2, 2, "hello"), (3, 3, "y")]);
    bed.notes(&[("10.244.2.0/24", true), ("10.244.3.0/24", true), ("10.244.99.0/24", false)]).await;
    fs::remove_file(bed.place.path("hang")).unwrap();
    until("the last one", || bed.noted().iter().all(|(_, done)| *done)).await;
}

#[tokio::test]
async fn what_an_agent_that_was_killed_had_begun_is_finished_or_undone_by_the_next() {
    for (stays, line) in [(true, "add 10.244.99.0/24"), (false, "remove 10.244.99.0/24")] {
        let bed = Bed::new();
        fs::write(bed.place.path("hang"), "").unwrap();
        bed.tell(&[(99, 9, "x")]);
        bed.notes(&[("10.244.99.0/24", false)]).await;
        let bed = bed.restarted(true).await;
        fs::remove_file(bed.place.path("hang")).unwrap();
        bed.tell(if stays { &[(99, 9, "x")] } else { &[] });
        until(line, || bed.log().last().is_some_and(|last| last.starts_with(line))).await;
        bed.notes(if stays { &[("10.244.99.0/24", true)] } else { &[] }).await;
    }
}

#[tokio::test]
async fn a_peer_that_left_while_the_agent_was_down_is_removed_and_one_that_stayed_is_left_alone() {
    let bed = Bed::new();
    bed.tell(&[(2, 2, "hello"), (3, 3, "")]);
    bed.notes(&[("10.244.2.0/24", true), ("10.244.3.0/24", true)]).await;
    let bed = bed.restarted(true).await;
    bed.tell(&[(3, 3, "")]);
    bed.logs(&[POST, "remove 10.244.2.0/24 192.0.2.2 ::/0 <nil> [hello]"]).await;
    bed.notes(&[("10.244.3.0/24", true)]).await;
}

#[tokio::test]
async fn with_another_backend_what_commands_made_is_undone_if_commands_are_allowed() {
    let bed = Bed::new();
    bed.tell(&[(2, 2, "hello")]);
    bed.notes(&[("10.244.2.0/24", true)]).await;
    let bed = bed.restarted(false).await;
    bed.hooks.told.send_replace(ExtensionUse::Other);
    until("the note", || bed.health.all().1.join("").contains("--allow-extension-commands")).await;
    assert!(bed.log().is_empty() && bed.noted().len() == 1);
    let bed = bed.restarted(true).await;
    bed.hooks.told.send_replace(ExtensionUse::Other);
    bed.logs(&["remove 10.244.2.0/24 192.0.2.2 ::/0 <nil> [hello]"]).await;
    bed.notes(&[]).await;
}

#[tokio::test]
async fn without_commands_nothing_runs_and_the_node_is_ready() {
    let bed = Bed::new();
    let facts = bed.facts(&[(2, 2, "hello")]);
    let start = StartupFacts { command: String::new(), ..facts.start.clone() };
    let facts = ExtensionFacts { config: ExtensionConfig::default(), start: start.clone(), ..facts };
    bed.hooks.told.send_replace(ExtensionUse::Facts(Arc::new(facts)));
    until("the start", || *bed.hooks.started.borrow() == Some(start.clone())).await;
    bed.notes(&[("10.244.2.0/24", true)]).await;
    bed.hooks.told.send_replace(ExtensionUse::Other);
    bed.notes(&[]).await;
    assert!(bed.log().is_empty());
}

#[test]
fn commands_need_the_permission_of_this_node() {
    let (hooks, _) = Hooks::new(false, Path::new("/nonexistent").into(), Health::new(LIMIT, []));
    let config = |allowed| ExtensionConfig { allowed, ..ExtensionConfig::default() };
    assert!(Hooks::permit(Some(&hooks), &config(false)).unwrap_err().contains("--allow-extension-commands"));
    assert!(Hooks::permit(Some(&hooks), &config(true)).is_ok());
    assert!(Hooks::permit(Some(&Hooks { allowed: true, ..hooks }), &config(false)).is_ok());
    assert!(Hooks::permit(None, &config(true)).is_err());
}
