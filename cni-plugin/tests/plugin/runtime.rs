//! What a container runtime does with a list of plugins (a `.conflist`).

use serde_json::{Map, Value};

use crate::support::{Answer, Node, PLUGINS, Pod, flannel};

/// A list, and the attachments that it made.
pub(crate) struct List<'a> {
    node: &'a Node,
    conflist: Value,
    directory: String,
}

/// What a runtime remembers of an attachment.
pub(crate) struct Attached<'a> {
    pod: Pod<'a>,
    arguments: Value,
    /// The result of the last plugin.
    pub(crate) result: Value,
}

impl<'a> List<'a> {
    pub(crate) fn new(node: &'a Node, conflist: Value) -> Self {
        Self { node, conflist, directory: PLUGINS.into() }
    }

    /// With the plugins of another directory.
    pub(crate) fn with_plugins(self, directory: &str) -> Self {
        Self { directory: directory.into(), ..self }
    }

    /// Runs the plugins in order, each with the result of the one before; `arguments` are handed to those
    /// that have the capability of the same name.
    #[track_caller]
    pub(crate) fn add<'p>(&self, pod: Pod<'p>, arguments: Value) -> Attached<'p> {
        let mut result = None;
        for plugin in self.plugins() {
            result = Some(self.call("ADD", pod, plugin, &arguments, result.as_ref()).result());
        }
        Attached { pod, arguments, result: result.expect("a list has plugins") }
    }

    /// Runs the plugins in order, each with the result of the whole list; gives the one that failed, and what
    /// it said.
    pub(crate) fn check(&self, attached: &Attached<'_>) -> Result<(), (String, String)> {
        for plugin in self.plugins() {
            let Attached { pod, arguments, result } = attached;
            let answer = self.call("CHECK", *pod, plugin, arguments, Some(result));
            if !answer.success {
                return Err((plugin["type"].as_str().unwrap().to_owned(), answer.error().1));
            }
        }
        Ok(())
    }

    /// Runs the plugins in reverse order, each with the result of the whole list.
    #[track_caller]
    pub(crate) fn del(&self, attached: &Attached<'_>) {
        for plugin in self.plugins().rev() {
            self.call("DEL", attached.pod, plugin, &attached.arguments, Some(&attached.result)).result();
        }
    }

    fn plugins(&self) -> impl DoubleEndedIterator<Item = &Map<String, Value>> {
        self.conflist["plugins"].as_array().unwrap().iter().map(|plugin| plugin.as_object().unwrap())
    }

    pub(crate) fn call(
        &self,
        verb: &str,
        pod: Pod<'_>,
        plugin: &Map<String, Value>,
        arguments: &Value,
        previous: Option<&Value>,
    ) -> Answer {
        let mut config = plugin.clone();
        for key in ["name", "cniVersion"] {
            config.insert(key.into(), self.conflist[key].clone());
        }
        let capable = |name: &str| plugin.get("capabilities").is_some_and(|all| all[name] == true);
        let mut wanted = arguments.as_object().unwrap().clone();
        wanted.retain(|name, _| capable(name));
        if !wanted.is_empty() {
            config.insert("runtimeConfig".into(), wanted.into());
        }
        config.extend(previous.map(|result| ("prevResult".into(), result.clone())));
        let kind = plugin["type"].as_str().unwrap();
        let program = if kind == "flannel" { flannel() } else { &format!("{}/{kind}", self.directory) };
        self.node.call_plugin(program, verb, pod, &Value::from(config).to_string(), &[])
    }
}
