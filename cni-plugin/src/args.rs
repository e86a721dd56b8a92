//! `CNI_ARGS`: pairs that a runtime or an operator gives to a plugin.

/// The pairs, in the order of the variable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Args(Vec<(String, String)>);

impl Args {
    /// Reads `KEY=VALUE;KEY=VALUE`.
    ///
    /// # Errors
    /// A sentence with the pair, in the words of Go plugins.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let pair = |pair: &str| match pair.split('=').collect::<Vec<_>>()[..] {
            [key, value] => Ok((key.to_owned(), value.to_owned())),
            _ => Err(format!("ARGS: invalid pair {pair:?}")),
        };
        text.split(';').map(pair).collect::<Result<_, _>>().map(Self)
    }

    /// Without the pairs of one key.
    pub(crate) fn without(&self, key: &str) -> Self {
        Self(self.0.iter().filter(|(name, _)| name != key).cloned().collect())
    }

    /// The last value of `key`, if it is not empty. All other keys are refused, unless `IgnoreUnknown` is set.
    ///
    /// # Errors
    /// The pairs with other keys, in the words of Go plugins.
    pub(crate) fn only(&self, key: &str) -> Result<Option<&str>, String> {
        let value =
            |key: &str| self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        let lenient =
            value("IgnoreUnknown").is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true"));
        let unknown: Vec<_> = self
            .0
            .iter()
            .filter(|(name, _)| name != key && name != "IgnoreUnknown")
            .map(|(name, value)| format!("{:?}", format!("{name}={value}")))
            .collect();
        if !lenient && !unknown.is_empty() {
            return Err(format!("ARGS: unknown args [{}]", unknown.join(" ")));
        }
        Ok(value(key).filter(|value| !value.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_takes_its_own_key_and_tolerates_others_on_request() {
        let args = |text: &str, key: &str| Args::parse(text)?.only(key).map(|value| value.map(str::to_owned));
        let kubelet = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=a;IP=10.1.17.9";
        assert_eq!(args(kubelet, "IP"), Ok(Some("10.1.17.9".into())));
        assert_eq!(args(kubelet, "MAC"), Ok(None));
        assert_eq!(args("", "MAC"), Ok(None));
        assert_eq!(args("IP=1;B=2", "IP"), Err(r#"ARGS: unknown args ["B=2"]"#.into()));
        for bad in ["IP", "IP=1=2", "IP=1;", ";"] {
            assert!(args(bad, "IP").unwrap_err().starts_with("ARGS: invalid pair"), "{bad}");
        }
    }
}
