//! CNI plugins as a container runtime calls them, with all their files in a directory of the measurement.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use backends::testing::Namespace;
use serde_json::{Value, json};

/// Where the distribution keeps the delegates.
pub(crate) const DELEGATES: &str = "/usr/lib/cni";

/// A plugin with its configuration.
pub(crate) struct Plugin {
    pub(crate) program: PathBuf,
    pub(crate) config: String,
}

impl Plugin {
    /// `flannel` on a node whose subnet file and state are in `directory`.
    pub(crate) fn flannel(program: PathBuf, directory: &Path) -> anyhow::Result<Self> {
        let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        fs::write(directory.join("subnet.env"), env).context("can't write subnet.env")?;
        let mut config = flannel_config(&directory.join("subnet.env"), directory);
        config["name"] = "cbr0".into();
        config["cniVersion"] = "1.0.0".into();
        Ok(Self { program, config: config.to_string() })
    }

    /// The delegate `bridge`, with the configuration that `flannel` generated for it: it keeps it for DEL in a file
    /// named after the container.
    pub(crate) fn delegate(flannel: &Self, node: &Namespace, directory: &Path) -> anyhow::Result<Self> {
        let program = Path::new(DELEGATES).join("bridge");
        ensure!(program.is_file(), "no {}: apt-get install containernetworking-plugins", program.display());
        let (pod, container) = (Namespace::new()?, "bench-generated");
        node.run(|| flannel.call("ADD", container, &pod))?;
        let kept = directory.join("cni").join(container);
        let config = fs::read_to_string(&kept).with_context(|| format!("can't read {}", kept.display()))?;
        node.run(|| flannel.call("DEL", container, &pod))?;
        Ok(Self { program, config })
    }

    /// Calls the plugin from a thread that is in the node's namespace; gives its answer.
    pub(crate) fn call(&self, verb: &str, container: &str, pod: &Namespace) -> anyhow::Result<String> {
        self.call_with(verb, container, pod, "")
    }

    /// The same with `CNI_ARGS`, in which a runtime says which pod it is.
    pub(crate) fn call_with(
        &self,
        verb: &str,
        container: &str,
        pod: &Namespace,
        args: &str,
    ) -> anyhow::Result<String> {
        let mut child = Command::new(&self.program)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", DELEGATES)
            .env("CNI_ARGS", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't run {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(self.config.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{verb} failed: {answer}");
        Ok(answer)
    }
}

/// The plugin's part of the shipped configuration, with its files in `directory`.
pub(crate) fn flannel_config(subnet_file: &Path, directory: &Path) -> Value {
    json!({
        "type": "flannel",
        "subnetFile": subnet_file,
        "dataDir": directory.join("cni"),
        "ipam": {"dataDir": directory.join("ipam")},
        "delegate": {"hairpinMode": true, "isDefaultGateway": true},
    })
}
