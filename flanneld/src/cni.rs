//! The CNI configurations of this host, read as a container runtime reads them.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Where container runtimes look for configurations.
pub(crate) const DEFAULT_CONF_DIR: &str = "/etc/cni/net.d";
/// Where they look for plugins.
pub(crate) const DEFAULT_BIN_DIRS: &str = "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni";
/// Where `host-local` keeps reservations, unless it is told otherwise.
pub(crate) const DEFAULT_DATA_DIR: &str = "/var/lib/cni/networks";

/// A file of the directory.
pub(crate) struct ConfFile {
    pub(crate) path: PathBuf,
    /// What it says, or why it can't be used.
    pub(crate) conf: Result<Conf, String>,
}

/// A configuration or a list of them.
pub(crate) struct Conf {
    pub(crate) name: String,
    pub(crate) plugins: Vec<Value>,
}

/// The plugin `flannel` in a configuration.
pub(crate) struct Flannel<'a> {
    network: &'a str,
    plugin: &'a Value,
}

/// All configurations, in the order in which a runtime takes them: by file name; the first one counts.
pub(crate) fn read(directory: &Path) -> Vec<ConfFile> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let known = |path: &PathBuf| {
        matches!(path.extension().and_then(OsStr::to_str), Some("conf" | "conflist" | "json"))
    };
    let mut paths: Vec<PathBuf> = entries.filter(known).collect();
    paths.sort();
    paths.into_iter().map(|path| ConfFile { conf: parse(&path), path }).collect()
}

fn parse(path: &Path) -> Result<Conf, String> {
    let text = subnet::regular::read_to_string(path).map_err(|error| error.to_string())?;
    let value: Value = serde_json::from_str(&text).map_err(|error| format!("it is not JSON ({error})"))?;
    let name = value["name"].as_str().ok_or("it has no \"name\"")?.to_owned();
    let plugins = match value.get("plugins") {
        Some(plugins) => plugins.as_array().cloned().ok_or("its \"plugins\" are no list")?,
        None => vec![value],
    };
    match plugins.iter().find(|plugin| !plugin["type"].is_string()) {
        None if !plugins.is_empty() => Ok(Conf { name, plugins }),
        None => Err("it names no plugin".to_owned()),
        Some(_) => Err("a plugin of it has no \"type\"".to_owned()),
    }
}

impl Conf {
    /// The types of its plugins, in their order.
    pub(crate) fn types(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().filter_map(|plugin| plugin["type"].as_str())
    }

    /// The plugin `flannel`, if it has it.
    pub(crate) fn flannel(&self) -> Option<Flannel<'_>> {
        let plugin = self.plugins.iter().find(|plugin| plugin["type"] == "flannel")?;
        Some(Flannel { network: &self.name, plugin })
    }
}

impl<'a> Flannel<'a> {
    /// Where the addresses of its pods are reserved.
    pub(crate) fn reservations(self) -> PathBuf {
        let ipam = [&self.plugin["ipam"], &self.plugin["delegate"]["ipam"]];
        let told = ipam.into_iter().find_map(|ipam| ipam["dataDir"].as_str());
        Path::new(told.unwrap_or(DEFAULT_DATA_DIR)).join(self.network)
    }

    /// The plugin that attaches its pods.
    pub(crate) fn delegate(&self) -> &'a str {
        self.plugin["delegate"]["type"].as_str().unwrap_or("bridge")
    }

    /// The bridge of its pods.
    pub(crate) fn bridge(&self) -> &'a str {
        self.plugin["delegate"]["bridge"].as_str().unwrap_or("cni0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_taken_in_the_order_of_their_names_and_bad_ones_say_why() {
        let directory = tempfile::tempdir().unwrap();
        let ours = r#"{"name":"cbr0","plugins":[{"type":"flannel","ipam":{"dataDir":"/d"},"delegate":{"bridge":"br9"}},{"type":"portmap"}]}"#;
        for (name, text) in [
            ("10-flannel.conflist", ours),
            ("05-other.conf", r#"{"name":"other","type":"bridge"}"#),
            ("20-a.conflist", "{"),
            ("21-b.conflist", r#"{"plugins":[]}"#),
            ("22-c.json", r#"{"name":"c","plugins":[{}]}"#),
            ("notes.txt", "no configuration"),
        ] {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let files = read(directory.path());
        let names: Vec<_> =
            files.iter().map(|file| file.path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(
            names,
            ["05-other.conf", "10-flannel.conflist", "20-a.conflist", "21-b.conflist", "22-c.json"]
        );
        let conf = files[1].conf.as_ref().unwrap();
        assert_eq!(conf.types().collect::<Vec<_>>(), ["flannel", "portmap"]);
        assert_eq!(conf.flannel().unwrap().bridge(), "br9");
        assert_eq!(conf.flannel().unwrap().reservations(), Path::new("/d/cbr0"));
        assert!(files[0].conf.as_ref().unwrap().flannel().is_none());
        let why = |index: usize| files[index].conf.as_ref().err().unwrap().clone();
        assert!(
            why(2).contains("not JSON") && why(3).contains("no \"name\"") && why(4).contains("no \"type\"")
        );
        assert!(read(Path::new("/nonexistent")).is_empty());
    }
}
