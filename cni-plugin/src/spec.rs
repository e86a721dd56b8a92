//! Which versions of the CNI specification are spoken, and which verbs they know.

use crate::env::Verb;
use crate::error::{self, CniError};

/// Oldest first; the last is the plugin's own.
const SUPPORTED: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The answer to VERSION.
pub(crate) fn versions() -> String {
    format!("{{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"{}\"]}}\n", SUPPORTED.join("\",\""))
}

/// What someone sees who runs the plugin by hand.
pub(crate) fn about(plugin: &str) -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!(
        "CNI Plugin {plugin} version v{} ({}/{architecture}) commit {}\nCNI protocol versions supported: {}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        option_env!("FLANNEL_COMMIT").filter(|commit| !commit.is_empty()).unwrap_or("unknown"),
        SUPPORTED.join(", ")
    )
}

/// Whether a configuration in `version` may be used, and with `verb`.
///
/// # Errors
/// Code 1, with the texts of the Go framework.
pub(crate) fn check(verb: Verb, version: &str) -> Result<(), CniError> {
    let place = |version: &str| SUPPORTED.iter().position(|known| *known == version);
    let Some(given) = place(version) else {
        let details = format!("config is {version:?}, plugin supports [\"{}\"]", SUPPORTED.join("\" \""));
        return Err(CniError {
            details,
            ..CniError::new(error::INCOMPATIBLE_VERSION, "incompatible CNI versions")
        });
    };
    let since = match verb {
        Verb::Check => "0.4.0",
        Verb::Status | Verb::Gc => "1.1.0",
        Verb::Add | Verb::Del | Verb::Version => return Ok(()),
    };
    if place(since).is_some_and(|needed| given < needed) {
        let msg = format!("config version does not allow {}", verb.word());
        return Err(CniError::new(error::INCOMPATIBLE_VERSION, msg));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_need_the_version_that_brought_them() {
        let msg = |verb, version| check(verb, version).map_err(|error| (error.code, error.msg));
        assert_eq!(msg(Verb::Add, "0.1.0"), Ok(()));
        assert_eq!(msg(Verb::Check, "0.4.0"), Ok(()));
        assert_eq!(msg(Verb::Check, "0.3.1"), Err((1, "config version does not allow CHECK".into())));
        assert_eq!(msg(Verb::Gc, "1.1.0"), Ok(()));
        assert_eq!(msg(Verb::Status, "1.0.0"), Err((1, "config version does not allow STATUS".into())));
        for version in ["", "1.2.0", "1", "v1.0.0"] {
            assert_eq!(msg(Verb::Del, version), Err((1, "incompatible CNI versions".into())), "{version}");
        }
        assert_eq!(
            check(Verb::Add, "9.0.0").unwrap_err().details,
            r#"config is "9.0.0", plugin supports ["0.1.0" "0.2.0" "0.3.0" "0.3.1" "0.4.0" "1.0.0" "1.1.0"]"#
        );
    }

    #[test]
    fn the_answer_to_version_is_gos() {
        let go = r#"{"cniVersion":"1.1.0","supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#;
        assert_eq!(versions().trim_end(), go);
    }
}
