//! `flanneld check-config`: reads a network configuration as the agent does, and says what it would say.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use backends::ActiveBackends;
use serde_json::json;
use subnet::net::bits_of;
use subnet::{NetworkConfig, Subnets};

/// No configuration is longer.
const MAX_BYTES: u64 = 1 << 20;

/// What to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CheckConfigOptions {
    /// The file; `-` is standard input.
    pub(crate) file: PathBuf,
    /// Subnets are given by Kubernetes, and not chosen from the network.
    pub(crate) given_subnets: bool,
    /// A JSON object instead of text.
    pub(crate) json: bool,
}

/// A configuration that can be used.
struct Checked {
    backend: String,
    networks: Vec<String>,
    warnings: Vec<String>,
}

/// Checks a configuration and prints what there is to say about it.
///
/// # Errors
/// Why it can't be used.
pub(crate) fn run(options: &CheckConfigOptions) -> anyhow::Result<()> {
    let shown = match options.file.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => options.file.display().to_string(),
    };
    let text = read(&options.file).with_context(|| shown.clone())?;
    let checked = check(&text, options.given_subnets);
    let text = match (&checked, options.json) {
        (Ok(Checked { backend, networks, warnings }), true) => {
            let answer = json!({ "schema": 1, "valid": true, "backend": backend, "networks": networks, "warnings": warnings });
            format!("{answer}\n")
        }
        (Err(why), true) => format!("{}\n", json!({ "schema": 1, "valid": false, "error": why })),
        (Ok(Checked { backend, networks, warnings }), false) => {
            let mut text = format!("{backend}\n");
            text.extend(networks.iter().map(|line| format!("{line}\n")));
            text.extend(warnings.iter().map(|line| format!("warning: {line}\n")));
            text
        }
        (Err(_), false) => String::new(),
    };
    crate::output::stdout().write_all(text.as_bytes())?;
    checked.map(drop).map_err(|why| anyhow::anyhow!("{shown}: {why}"))
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file != Path::new("-") {
        let bytes = subnet::regular::read(file)
            .map_err(|error| anyhow::anyhow!(subnet::regular::with_remedy(&error)))?;
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    let mut bytes = Vec::new();
    io::stdin().take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What the agent makes of a configuration.
fn check(text: &str, given_subnets: bool) -> Result<Checked, String> {
    let config = match given_subnets {
        true => NetworkConfig::parse_given_subnets(text, &Subnets::default()),
        false => NetworkConfig::parse(text),
    };
    let config = config.map_err(|error| error.to_string())?;
    let active = ActiveBackends::new(&config.backend, &config).map_err(|error| error.to_string())?;
    let networks = config.ranges().map(|range| {
        let network = range.network;
        match given_subnets {
            true => format!("network {network}: subnets are given by Kubernetes"),
            false => {
                let nodes = (bits_of(range.max) - bits_of(range.min)) / range.step() + 1;
                let (len, nodes) = (
                    range.subnet_len,
                    if nodes == 1 { "one node".into() } else { format!("each of up to {nodes} nodes") },
                );
                format!("network {network}: a /{len} for {nodes}")
            }
        }
    });
    Ok(Checked {
        backend: active.to_string(),
        networks: networks.collect(),
        warnings: config.warnings.0.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_told_in_the_agents_words() {
        let text = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Prot":1}}"#;
        let checked = check(text, false).unwrap();
        assert_eq!(checked.backend, "vxlan VNI 7 port 8472");
        assert_eq!(checked.networks, ["network 10.244.0.0/16: a /24 for each of up to 255 nodes"]);
        let bounded = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.9.0"}"#;
        assert!(check(bounded, false).unwrap().networks[0].ends_with("a /24 for one node"));
        assert!(checked.warnings.iter().any(|warning| warning.contains("Prot")), "{:?}", checked.warnings);
        assert!(check(text, true).unwrap().networks[0].contains("Kubernetes"));
    }

    #[test]
    fn what_the_agent_would_refuse_is_refused_with_its_reason() {
        for (text, part) in [
            ("{", "JSON"),
            (r#"{"Network":"10.244.0.0/33"}"#, "Network"),
            (r#"{"Network":"10.244.0.0/16","SubnetLen":40}"#, "SubnetLen"),
            (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":16777215}}"#, "VNI"),
            (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}"#, "ipsec"),
        ] {
            let why = check(text, false).err().unwrap();
            assert!(why.contains(part), "{text}: {why}");
        }
    }

    #[test]
    fn configurations_of_the_examples_can_be_used_without_a_warning() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
        let sites = std::fs::read_dir(examples).unwrap().map(|site| site.unwrap().path());
        let files =
            sites.flat_map(|site| [(site.join("net-conf.json"), true), (site.join("config.json"), false)]);
        let mut found = 0;
        for (file, given_subnets) in files.filter(|(file, _)| file.exists()) {
            let checked = check(&std::fs::read_to_string(&file).unwrap(), given_subnets);
            let checked = checked.unwrap_or_else(|why| panic!("{}: {why}", file.display()));
            assert_eq!(checked.warnings, [""; 0], "{}", file.display());
            found += 1;
        }
        assert!(found >= 4, "{found} configurations");
    }
}
