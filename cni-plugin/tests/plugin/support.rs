//! A node to call the plugin on: a directory for everything it writes, and network namespaces.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// Where Debian's containernetworking-plugins are.
pub(crate) const PLUGINS: &str = "/usr/lib/cni";
/// A `CNI_NETNS` for delegates that don't look at it.
pub(crate) const NO_NETNS: &str = "/nowhere/netns";
/// `subnet.env` of most tests.
pub(crate) const V4: &str =
    "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

/// The plugin under test: `TEST_PLUGIN`, such as one that is linked with another C library, or that of this build.
pub(crate) fn flannel() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    PATH.get_or_init(|| std::env::var("TEST_PLUGIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_flannel").into()))
}

/// A network namespace that goes away with the value.
pub(crate) struct Namespace(String);

impl Namespace {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert_eq!(fs::metadata("/proc/self").unwrap().uid(), 0, "run as root: network namespaces are made");
        let name = format!("cni{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        Self(name)
    }

    pub(crate) fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// A program to be run in it.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }

    /// Whether an echo request to `address` is answered; it is repeated for a while.
    pub(crate) fn reaches(&self, address: &str) -> bool {
        let mut ping = self.command("ping");
        ping.args(["-n", "-c1", "-w10", "-i0.2", address]).stdout(Stdio::null());
        ping.status().expect("install the package iproute2").success()
    }

    /// The names of the links in it.
    pub(crate) fn links(&self) -> Vec<String> {
        let shown = self.ip(&["-json", "link"]);
        let links: Vec<Value> = serde_json::from_str(&shown).unwrap();
        links.iter().map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
    }

    /// Runs `ip` in it; gives what it printed.
    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        ip(&[&["-n", &self.0], arguments].concat())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub(crate) fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().expect("install the package iproute2");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a call of the plugin gave.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) success: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Answer {
    /// The result of a call that must succeed.
    #[track_caller]
    pub(crate) fn result(&self) -> Value {
        assert!(self.success, "{self:?}");
        serde_json::from_str(if self.stdout.is_empty() { "null" } else { &self.stdout }).unwrap()
    }

    /// Code and message of a call that must fail.
    #[track_caller]
    pub(crate) fn error(&self) -> (u64, String) {
        assert!(!self.success, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).unwrap();
        (error["code"].as_u64().unwrap(), error["msg"].as_str().unwrap().to_owned())
    }
}

/// Writes a program that can be run at once. This process never has it open for writing: a program that another test starts
/// at that moment would hold it until it is executed itself, and nobody could run it ("Text file busy").
pub(crate) fn write_program(path: &Path, text: &str) {
    let mut writer = Command::new("sh");
    writer.args(["-c", r#"cat >"$0" && chmod 755 "$0""#]).arg(path).stdin(Stdio::piped());
    let mut writer = writer.spawn().unwrap();
    writer.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(writer.wait().unwrap().success(), "{}", path.display());
}

/// The directories of a node, and the namespace in which its bridge is.
pub(crate) struct Node {
    directory: tempfile::TempDir,
    host: Option<Namespace>,
}

/// One attachment's variables.
#[derive(Clone, Copy)]
pub(crate) struct Pod<'a> {
    pub(crate) container: &'a str,
    pub(crate) ifname: &'a str,
    pub(crate) netns: &'a str,
}

impl Node {
    /// A node whose delegate only hands out addresses.
    pub(crate) fn new(subnet_env: &str) -> Self {
        let plugin = Path::new(PLUGINS).join("bridge");
        assert!(plugin.is_file(), "no {}: install the package containernetworking-plugins", plugin.display());
        let node = Self { directory: tempfile::tempdir().unwrap(), host: None };
        fs::write(node.path("subnet.env"), subnet_env).unwrap();
        node
    }

    /// A node with a network namespace of its own, for a bridge.
    pub(crate) fn with_namespace(subnet_env: &str) -> Self {
        Self { host: Some(Namespace::new()), ..Self::new(subnet_env) }
    }

    /// The network namespace of a node that has one.
    pub(crate) fn host(&self) -> &Namespace {
        self.host.as_ref().expect("made with a namespace")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A network configuration for this node, with its own directories.
    pub(crate) fn network(&self, name: &str, version: &str, delegate: Value) -> Value {
        json!({
            "name": name, "cniVersion": version, "type": "flannel", "delegate": delegate,
            "subnetFile": self.path("subnet.env"), "dataDir": self.path("flannel"),
            "ipam": {"dataDir": self.path("addresses")},
        })
    }

    pub(crate) fn call(&self, verb: &str, pod: Pod<'_>, network: &Value) -> Answer {
        self.call_with(verb, pod, &network.to_string(), &[])
    }

    /// Calls the plugin with more variables, or other values of the usual ones.
    pub(crate) fn call_with(&self, verb: &str, pod: Pod<'_>, stdin: &str, more: &[(&str, &str)]) -> Answer {
        self.call_plugin(flannel(), verb, pod, stdin, more)
    }

    /// Calls any plugin.
    pub(crate) fn call_plugin(
        &self,
        program: &str,
        verb: &str,
        pod: Pod<'_>,
        stdin: &str,
        more: &[(&str, &str)],
    ) -> Answer {
        let mut command = match &self.host {
            None => Command::new(program),
            Some(host) => host.command(program),
        };
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", pod.container)
            .env("CNI_IFNAME", pod.ifname)
            .env("CNI_NETNS", pod.netns)
            .env("CNI_PATH", PLUGINS)
            .envs(more.iter().copied());
        answer(command, stdin)
    }

    /// A directory with a stand-in for a delegate of CNI 1.1, named `stand-in-1.1`, since Debian's plugins
    /// know 1.0 at most. It notes each call as a line with the verb, the container, the interface and its
    /// standard input. Where there is a file `unwell` beside it, STATUS and GC fail with that content.
    pub(crate) fn stand_in(&self) -> StandIn {
        let directory = self.path("stand-in");
        fs::create_dir(&directory).unwrap();
        let program = directory.join("stand-in-1.1");
        write_program(&program, STAND_IN);
        StandIn(directory)
    }

    /// A directory with the program under test by the names of the plugins that it is.
    pub(crate) fn own_plugins(&self) -> String {
        let directory = self.path("own");
        fs::create_dir_all(&directory).unwrap();
        for name in ["flannel", "bridge", "host-local", "loopback", "portmap", "bandwidth"] {
            let _ = symlink(flannel(), directory.join(name));
        }
        directory.to_str().unwrap().to_owned()
    }

    /// Names of the files kept for DEL, sorted.
    pub(crate) fn kept(&self) -> Vec<String> {
        names(&self.path("flannel"))
    }

    /// The addresses that `host-local` holds for a network, sorted.
    pub(crate) fn reserved(&self, network: &str) -> Vec<String> {
        let mut names = names(&self.path("addresses").join(network));
        names.retain(|name| name.parse::<std::net::IpAddr>().is_ok());
        names
    }
}

impl Node {
    /// The directory of a network's reservations: mode and content of each file.
    pub(crate) fn reservations(&self, network: &str) -> BTreeMap<String, (u32, String)> {
        let directory = self.path("addresses").join(network);
        let file = |name: String| {
            let path = directory.join(&name);
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
            (name, (mode, fs::read_to_string(path).unwrap()))
        };
        names(&directory).into_iter().map(file).collect()
    }
}

const STAND_IN: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
printf '%s %s %s %s\n' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" "$(cat)" >>calls
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}' ;;
ADD) echo '{"cniVersion":"1.1.0","ips":[{"address":"10.1.17.9/24"}]}' ;;
STATUS | GC) if [ -e unwell ]; then cat unwell; exit 1; fi ;;
esac
"#;

/// The directory of a stand-in.
pub(crate) struct StandIn(PathBuf);

impl StandIn {
    /// `CNI_PATH`, with the real plugins behind it.
    pub(crate) fn path(&self) -> String {
        format!("{}:{PLUGINS}", self.0.display())
    }

    /// What STATUS and GC print from now on, as failures.
    pub(crate) fn falls_ill(&self, error: &str) {
        fs::write(self.0.join("unwell"), error).unwrap();
    }

    /// The calls since the last time that this was asked: what precedes the standard input, and that.
    pub(crate) fn calls(&self) -> Vec<(String, Value)> {
        let calls = self.0.join("calls");
        let text = fs::read_to_string(&calls).unwrap_or_default();
        let _ = fs::remove_file(calls);
        let call = |line: &str| {
            let (who, stdin) = line.split_at(line.find('{').unwrap());
            (who.trim().to_owned(), serde_json::from_str(stdin).unwrap())
        };
        text.lines().map(call).collect()
    }
}

/// Runs `command` with `stdin`.
pub(crate) fn answer(mut command: Command, stdin: &str) -> Answer {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}", output.status);
    Answer { success: output.status.success(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
