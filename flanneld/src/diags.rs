//! `flanneld diags`: one archive with what a bug report needs, without secrets.

mod secrets;
mod tar;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use backends::diff;
use backends::kernel::netlink::Netlink;
use backends::state::is_tunnel_name;
use backends::{Kernel, KernelState, Scope};

use crate::ask;
use tar::Archive;

/// What the agent is asked for, with the files for its answers.
const ANSWERS: [(&str, &str); 4] = [
    ("/status?look", "status.json"),
    ("/peers", "peers.json"),
    ("/metrics", "metrics.txt"),
    ("/readyz?verbose", "readyz.json"),
];
/// Files of the host, of which those that exist are taken.
const FILES: [&str; 15] = [
    "/proc/version",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/net/dev",
    "/proc/net/snmp",
    "/proc/net/snmp6",
    "/proc/net/netstat",
    "/proc/net/softnet_stat",
    "/proc/net/fib_trie",
    "/proc/net/arp",
    "/proc/net/ip_tables_names",
    "/proc/net/ip6_tables_names",
    "/proc/modules",
    "/proc/mounts",
    "/etc/os-release",
];
/// Programs whose output is taken where they exist; an image with flanneld alone has none of them.
const PROGRAMS: [&[&str]; 12] = [
    &["ip", "-s", "-d", "link", "show"],
    &["ip", "address", "show"],
    &["ip", "rule", "show"],
    &["ip", "route", "show", "table", "all"],
    &["ip", "-6", "route", "show", "table", "all"],
    &["ip", "neighbour", "show"],
    &["bridge", "fdb", "show"],
    &["nft", "-a", "list", "ruleset"],
    &["iptables-save", "-c"],
    &["ip6tables-save", "-c"],
    &["ss", "-lnup"],
    &["journalctl", "--no-pager", "-n", "500", "-u", "flanneld"],
];
/// Settings below this directory are taken.
const SYSCTLS: &str = "/proc/sys/net";
/// More of a file is left out.
const MAX_BYTES: usize = 4 << 20;

/// What to collect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiagsOptions {
    /// The archive; `-` is standard output.
    pub(crate) file: Option<PathBuf>,
    /// Where the agent of this node serves health.
    pub(crate) at: SocketAddr,
    /// The file of the agent.
    pub(crate) subnet_file: PathBuf,
}

/// Collects and writes the archive.
///
/// # Errors
/// When the archive can't be written. What can't be collected is named in it.
pub(crate) fn run(options: &DiagsOptions) -> anyhow::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let file = options.file.clone().unwrap_or_else(|| PathBuf::from(format!("flannel-diags-{now}.tar")));
    let to_stdout = file == Path::new("-");
    anyhow::ensure!(
        !(to_stdout && io::stdout().is_terminal()),
        "an archive is nothing for a terminal: write it to a file, flanneld diags FILE, or pipe it"
    );
    let collected = collect(options);
    let write = |out: &mut dyn Write| -> io::Result<()> {
        let mut archive = Archive::new(out, now);
        for (name, text) in &collected {
            archive.add(&format!("flannel-diags/{name}"), secrets::removed(text).as_bytes())?;
        }
        archive.finish()
    };
    if to_stdout {
        write(&mut crate::output::stdout())?;
        return Ok(());
    }
    let shown = file.display();
    let mut out = private(&file).with_context(|| format!("{shown} can't be written"))?;
    write(&mut out).with_context(|| format!("{shown} can't be written"))?;
    writeln!(
        io::stdout(),
        "{shown}: {} files, without passwords, tokens and keys; it names addresses and nodes",
        collected.len()
    )?;
    Ok(())
}

/// A new file that only its owner may read.
fn private(path: &Path) -> io::Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Files by their names in the archive.
type Collected = Vec<(String, String)>;

fn collect(options: &DiagsOptions) -> Collected {
    let mut all: Collected = vec![(
        "version.txt".to_owned(),
        format!("v{} (commit {})\n", crate::version::VERSION, crate::version::commit()),
    )];
    for (path, name) in ANSWERS {
        let answer = ask::text(options.at, path);
        let text = answer.map(|body| String::from_utf8_lossy(&body).into_owned());
        all.push((format!("agent/{name}"), text.unwrap_or_else(|why| format!("not there: {why:#}\n"))));
    }
    all.push(("agent/subnet.env".to_owned(), file(&options.subnet_file)));
    let processes = agents().iter().map(|line| format!("{line}\n")).collect();
    all.push(("agent/processes.txt".to_owned(), processes));
    all.push(("kernel/own.txt".to_owned(), kernel().unwrap_or_else(|why| format!("not there: {why:#}\n"))));
    all.push((
        "kernel/nftables.txt".to_owned(),
        backends::ruleset_text().unwrap_or_else(|why| format!("not there: {why:#}\n")),
    ));
    all.push(("kernel/sysctls.txt".to_owned(), sysctls(Path::new(SYSCTLS))));
    all.extend(FILES.iter().map(|path| {
        (format!("host/{}", path.trim_start_matches('/').replace('/', "-")), file(Path::new(path)))
    }));
    for words in PROGRAMS {
        let name: String = words.join("-").replace("--", "-");
        all.push((format!("programs/{name}.txt"), program(words)));
    }
    all
}

/// A file's text, or why there is none.
fn file(path: &Path) -> String {
    match fs::read(path) {
        Ok(mut bytes) => {
            bytes.truncate(MAX_BYTES);
            String::from_utf8_lossy(&bytes).into_owned()
        }
        Err(error) => format!("not there: {error}\n"),
    }
}

/// A program's output, or why there is none.
fn program(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    match output {
        Ok(mut output) => {
            output.stdout.truncate(MAX_BYTES);
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
        }
        Err(error) => format!("not there: {error}\n"),
    }
}

/// Command lines of the agents of this host.
fn agents() -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let line = |entry: fs::DirEntry| {
        let name = entry
            .file_name()
            .into_string()
            .ok()
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
        let program = line.split(' ').next()?.rsplit('/').next()?;
        (program == "flanneld").then(|| format!("{name} {line}"))
    };
    processes.filter_map(line).collect()
}

/// Links, addresses and what flannel makes, as the kernel has it.
fn kernel() -> anyhow::Result<String> {
    let mut kernel = Netlink::open()?;
    let host = kernel.observe(&KernelState::default(), &Scope::default())?.host;
    let mut text = String::new();
    for link in host.links.values() {
        let state = if link.up { "up" } else { "down" };
        text += &format!("{}: {} {state} mtu {} address {}\n", link.index, link.name, link.mtu, link.mac);
        text.extend(link.addresses.iter().map(|address| format!("    {}\n", address.net)));
    }
    let devices = host.links.values().map(|link| link.name).filter(is_tunnel_name).collect();
    let found = kernel.observe(&KernelState::default(), &Scope { devices, ..Scope::default() })?;
    text.extend(diff::diff(&found.state, &KernelState::default()).iter().map(|change| format!("{change}\n")));
    Ok(text)
}

/// Settings of the kernel, a line each.
fn sysctls(directory: &Path) -> String {
    let mut text = String::new();
    let mut entries: Vec<PathBuf> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            text += &sysctls(&path);
        } else if let Ok(value) = fs::read_to_string(&path) {
            let key = path.strip_prefix("/proc/sys").unwrap_or(&path).to_string_lossy().replace('/', ".");
            text += &format!("{key} = {}\n", value.trim().replace('\n', " "));
        }
    }
    text
}
