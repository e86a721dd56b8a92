//! `flanneld docker-opts`: dockerd's options for this node's subnet, as Go flannel's `mk-docker-opts.sh` writes them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ipnet::Ipv4Net;
use subnet::{env_file, regular};

/// The file that is written.
pub(crate) const DEFAULT_OUTPUT: &str = "/run/docker_opts.env";
/// The variable with all options.
pub(crate) const DEFAULT_KEY: &str = "DOCKER_OPTS";
/// Variables of single options begin like this, also those of the environment.
const PREFIX: &str = "DOCKER_OPT_";
/// A unit without `Type=notify` starts this while the agent is still taking its lease.
const WAIT: Duration = Duration::from_secs(10);

/// Which variables are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One for each option.
    Individual,
    /// One with all options.
    Combined,
    /// Both of them.
    Both,
}

/// What to write, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DockerOptsOptions {
    /// The file that tells about this node.
    pub(crate) subnet_file: PathBuf,
    /// The file to write; `-` is standard output.
    pub(crate) output: PathBuf,
    /// Which variables.
    pub(crate) shape: Shape,
    /// Whether `--ip-masq` is among the options.
    pub(crate) masquerade: bool,
    /// The name of the variable with all options.
    pub(crate) key: String,
}

/// Writes the file.
///
/// # Errors
/// What is missing or wrong in the subnet file, or why the output can't be written.
pub(crate) fn run(options: &DockerOptsOptions) -> anyhow::Result<()> {
    let shown = options.subnet_file.display();
    let env = wait_for(&options.subnet_file).with_context(|| {
        format!("{shown} can't be read: flanneld writes it as soon as it has a subnet; see `flanneld status`")
    })?;
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let text = text(options, &env, environment).with_context(|| shown.to_string())?;
    write(options, &env, &text).with_context(|| options.output.display().to_string())
}

/// The content of the subnet file, once there is one.
fn wait_for(path: &Path) -> io::Result<String> {
    let started = Instant::now();
    loop {
        match regular::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && started.elapsed() < WAIT => {
                std::thread::sleep(Duration::from_millis(50));
            }
            outcome => return outcome,
        }
    }
}

/// What is written, byte for byte what the script writes.
fn text(
    options: &DockerOptsOptions,
    env: &str,
    environment: BTreeMap<String, String>,
) -> anyhow::Result<String> {
    let before = environment.get(&options.key).filter(|value| !value.is_empty());
    let mut combined = before.map(|value| format!("{value} ")).unwrap_or_default();
    let mut singles: BTreeMap<_, _> = environment
        .iter()
        .filter(|(name, _)| name.starts_with(PREFIX))
        .map(|(n, v)| (n.clone(), v.clone()))
        .collect();
    for (name, option) in of_node(env, options.masquerade)? {
        singles.insert(format!("{PREFIX}{name}"), option);
    }
    let mut text = String::new();
    for (name, option) in &singles {
        let single = assignment(name, option)?;
        if options.shape != Shape::Combined {
            text += &single;
        }
        combined += &format!(" {option}");
    }
    if options.shape != Shape::Individual {
        text += &assignment(&options.key, &combined)?;
    }
    Ok(text)
}

/// The options that follow from the subnet file.
fn of_node(env: &str, masquerade: bool) -> anyhow::Result<Vec<(&'static str, String)>> {
    let subnet = value(env, "FLANNEL_SUBNET").context(
        "it has no FLANNEL_SUBNET, the IPv4 subnet that dockerd's bridge gets: is it flanneld's file, and IPv4 enabled?",
    )?;
    ensure!(
        subnet.parse::<Ipv4Net>().is_ok(),
        "FLANNEL_SUBNET={subnet:?} is not an IPv4 address with a prefix length: restart flanneld"
    );
    let mut found = vec![("BIP", format!("--bip={subnet}"))];
    if let Some(mtu) = value(env, "FLANNEL_MTU") {
        ensure!(mtu.parse::<u32>().is_ok(), "FLANNEL_MTU={mtu:?} is not a number of bytes: restart flanneld");
        found.push(("MTU", format!("--mtu={mtu}")));
    }
    match value(env, "FLANNEL_IPMASQ").filter(|_| masquerade) {
        // Where flanneld masquerades, Docker must not, or pods of other nodes see this node's address.
        Some("true") => found.push(("IPMASQ", "--ip-masq=false".to_owned())),
        Some("false") => found.push(("IPMASQ", "--ip-masq=true".to_owned())),
        Some(other) => bail!("FLANNEL_IPMASQ={other:?} is neither true nor false: restart flanneld"),
        None => {}
    }
    Ok(found)
}

/// The value of a variable that has one; the last assignment counts, and quotes around it don't, as in a shell.
fn value<'e>(env: &'e str, name: &str) -> Option<&'e str> {
    let assigned = |line: &'e str| line.trim().strip_prefix(name)?.strip_prefix('=');
    let value = env.lines().filter_map(assigned).next_back()?.trim();
    let quoted = |mark| value.strip_prefix(mark).and_then(|value| value.strip_suffix(mark));
    Some(quoted('"').or(quoted('\'')).unwrap_or(value)).filter(|value| !value.is_empty())
}

/// `NAME="value"`, as shells and systemd read it.
fn assignment(name: &str, value: &str) -> anyhow::Result<String> {
    ensure!(!value.contains(char::is_control), "the variable {name} has a control character: remove it");
    let mut text = format!("{name}=\"");
    for letter in value.chars() {
        if matches!(letter, '"' | '\\' | '$' | '`') {
            text.push('\\');
        }
        text.push(letter);
    }
    Ok(text + "\"\n")
}

/// Replaces a file in one step; what is no file is written to as it is.
fn write(options: &DockerOptsOptions, env: &str, text: &str) -> anyhow::Result<()> {
    if options.output == Path::new("-") {
        return Ok(crate::output::stdout().write_all(text.as_bytes())?);
    }
    // Through a link, as a shell writes.
    let output = fs::canonicalize(&options.output).unwrap_or_else(|_| options.output.clone());
    if fs::metadata(&output).is_ok_and(|about| !about.is_file()) {
        return Ok(fs::OpenOptions::new().write(true).open(&output)?.write_all(text.as_bytes())?);
    }
    let text = if fs::canonicalize(&options.subnet_file).is_ok_and(|subnet_file| subnet_file == output) {
        eprintln!(
            "flanneld: {} is the subnet file: its lines stay, but a change of the subnet removes these options; give \
             Docker a file of its own, such as -d /run/flannel/docker",
            output.display()
        );
        beside(env, text, &options.key)
    } else {
        text.to_owned()
    };
    Ok(env_file::write_atomically(&output, text.as_bytes(), 0o644)?)
}

/// The subnet file with these options at its end, in place of those of an earlier run.
fn beside(env: &str, text: &str, key: &str) -> String {
    let key = format!("{key}=");
    let others = env.lines().filter(|line| !line.starts_with(PREFIX) && !line.starts_with(&key));
    others.flat_map(|line| [line, "\n"]).chain([text]).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ENV: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    const ALL: &str = " --bip=10.244.3.1/24 --ip-masq=false --mtu=1450";

    fn options() -> DockerOptsOptions {
        DockerOptsOptions {
            subnet_file: PathBuf::new(),
            output: PathBuf::new(),
            shape: Shape::Both,
            masquerade: true,
            key: DEFAULT_KEY.to_owned(),
        }
    }

    fn made(options: &DockerOptsOptions, env: &str, environment: &[(&str, &str)]) -> Result<String, String> {
        let environment = environment.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        text(options, env, environment).map_err(|error| error.to_string())
    }

    #[test]
    fn the_output_is_that_of_the_script_byte_for_byte() {
        let single = "DOCKER_OPT_BIP=\"--bip=10.244.3.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=false\"\nDOCKER_OPT_MTU=\"--mtu=1450\"\n";
        let combined = format!("DOCKER_OPTS=\"{ALL}\"\n");
        let with = |shape| made(&DockerOptsOptions { shape, ..options() }, ENV, &[]).unwrap();
        assert_eq!(with(Shape::Both), format!("{single}{combined}"));
        assert_eq!(with(Shape::Individual), single);
        assert_eq!(with(Shape::Combined), combined);
        let key = DockerOptsOptions { key: "CUSTOM_KEY".into(), shape: Shape::Combined, ..options() };
        assert_eq!(made(&key, ENV, &[]).unwrap(), format!("CUSTOM_KEY=\"{ALL}\"\n"));
        let no_masquerade = DockerOptsOptions { masquerade: false, ..options() };
        assert_eq!(
            made(&no_masquerade, ENV, &[]).unwrap(),
            "DOCKER_OPT_BIP=\"--bip=10.244.3.1/24\"\nDOCKER_OPT_MTU=\"--mtu=1450\"\nDOCKER_OPTS=\" --bip=10.244.3.1/24 --mtu=1450\"\n"
        );
    }

    #[test]
    fn docker_masquerades_where_flanneld_does_not() {
        let env = ENV.replace("IPMASQ=true", "IPMASQ=false");
        let made = made(&DockerOptsOptions { shape: Shape::Combined, ..options() }, &env, &[]).unwrap();
        assert_eq!(made, "DOCKER_OPTS=\" --bip=10.244.3.1/24 --ip-masq=true --mtu=1450\"\n");
    }

    #[test]
    fn what_the_environment_has_comes_along_as_with_the_script() {
        let combined = DockerOptsOptions { shape: Shape::Combined, ..options() };
        let environment =
            [("DOCKER_OPTS", "--debug"), ("DOCKER_OPT_LOG", "--log=\"a\""), ("DOCKER_OPT_MTU", "--mtu=9")];
        assert_eq!(
            made(&combined, ENV, &environment).unwrap(),
            "DOCKER_OPTS=\"--debug  --bip=10.244.3.1/24 --ip-masq=false --log=\\\"a\\\" --mtu=1450\"\n"
        );
        let error = made(&combined, ENV, &[("DOCKER_OPT_LOG", "a\nB=1")]).unwrap_err();
        assert!(error.contains("DOCKER_OPT_LOG"), "{error}");
    }

    #[test]
    fn a_subnet_file_that_says_nothing_gives_no_options_but_a_reason() {
        for (env, part) in [
            ("", "FLANNEL_SUBNET"),
            ("FLANNEL_IPV6_SUBNET=fd00::1/64\nFLANNEL_MTU=1450\n", "FLANNEL_SUBNET"),
            ("FLANNEL_SUBNET=\n", "FLANNEL_SUBNET"),
            ("FLANNEL_SUBNET=10.244.3.1\n", "\"10.244.3.1\" is not"),
            ("FLANNEL_SUBNET=10.244.3.1/24; reboot\n", "reboot"),
            ("FLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=big\n", "\"big\""),
            ("FLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_IPMASQ=yes\n", "\"yes\""),
        ] {
            let error = made(&options(), env, &[]).unwrap_err();
            assert!(error.contains(part), "{env:?}: {error}");
        }
        let quoted = "FLANNEL_SUBNET=10.0.0.1/8\nFLANNEL_SUBNET='10.244.3.1/24'\nFLANNEL_MTU=\"1450\"\nFLANNEL_IPMASQ=true\n";
        assert_eq!(made(&options(), quoted, &[]), made(&options(), ENV, &[]));
    }

    #[test]
    fn the_file_is_replaced_and_the_subnet_file_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let [subnet_file, output] = ["subnet.env", "docker"].map(|name| directory.path().join(name));
        fs::write(&subnet_file, ENV).unwrap();
        let options =
            DockerOptsOptions { subnet_file: subnet_file.clone(), output: output.clone(), ..options() };
        for old in ["", "DOCKER_OPTS=\"old and longer than what comes\"\n".repeat(9).as_str()] {
            fs::write(&output, old).unwrap();
            write(&options, ENV, "new\n").unwrap();
            assert_eq!(fs::read_to_string(&output).unwrap(), "new\n");
        }
        fs::remove_file(&output).unwrap();
        write(&options, ENV, "new\n").unwrap();
        assert_eq!(fs::metadata(&output).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_to_string(&subnet_file).unwrap(), ENV);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);

        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&output, &link).unwrap();
        write(&DockerOptsOptions { output: link.clone(), ..options.clone() }, ENV, "linked\n").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&output).unwrap(), "linked\n");
        write(&DockerOptsOptions { output: "/dev/null".into(), ..options }, ENV, "gone\n").unwrap();
        assert!(!Path::new("/dev/null").is_file());
    }

    #[test]
    fn units_that_write_to_the_subnet_file_leave_it_usable() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("subnet.env");
        fs::write(&file, ENV).unwrap();
        let options = DockerOptsOptions { subnet_file: file.clone(), output: file.clone(), ..options() };
        let expected = format!("{ENV}{}", made(&options, ENV, &[]).unwrap());
        for _ in 0..2 {
            let env = fs::read_to_string(&file).unwrap();
            let text = made(&options, &env, &[]).unwrap();
            write(&options, &env, &text).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), expected, "also the second time");
        }
        let env = env_file::SubnetEnv {
            networks: [ipnet("10.244.0.0/16")].into_iter().collect(),
            subnets: [ipnet("10.244.3.0/24")].into_iter().collect(),
            mtu: 1450,
            ip_masq: true,
            policy_socket: None,
        };
        assert_eq!(env.standing(&file), env_file::FileStanding::Rewritten, "the agent leaves it alone");
    }

    fn ipnet(text: &str) -> ipnet::IpNet {
        text.parse().unwrap()
    }
}
