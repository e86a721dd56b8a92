//! The `CNI_*` variables of a call, checked as the framework of Go plugins checks them (contract §7.5).

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::error::{self, CniError};
use crate::netns::Namespace;

/// What the runtime asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Connect a pod.
    Add,
    /// Disconnect it.
    Del,
    /// Say whether it is still connected as ADD left it.
    Check,
    /// Say whether an ADD would succeed.
    Status,
    /// Drop what belongs to no attachment of a list.
    Gc,
    /// Say which versions of the specification are spoken.
    Version,
}

impl Verb {
    /// The word in `CNI_COMMAND`.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Add, Self::Del, Self::Check, Self::Status, Self::Gc, Self::Version]
            .into_iter()
            .find(|verb| verb.word() == word)
    }

    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Self::Status | Self::Gc => &["CNI_PATH"],
            Self::Version => &[],
        }
    }
}

/// One call of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// `CNI_COMMAND`.
    pub(crate) verb: Verb,
    /// Which attachment is meant; its names are fit for files where the verb needs them, else empty.
    pub(crate) attachment: Attachment,
    /// `CNI_PATH`: the directories of the delegate plugins.
    pub(crate) path: OsString,
    /// `CNI_NETNS`: the pod's namespace; empty if the runtime does not know it any more.
    pub(crate) netns: OsString,
    /// `CNI_ARGS`.
    pub(crate) args: String,
    /// `FLANNEL_CNI_EXEC=1`: every delegate is a program.
    pub(crate) exec: bool,
    own_netns_allowed: bool,
}

impl Call {
    /// Reads the variables through `variable`.
    ///
    /// # Errors
    /// Code 4, with the texts of the Go framework.
    pub(crate) fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let bad = |msg: String| CniError::new(error::BAD_ENVIRONMENT, msg);
        let get = |name| variable(name).unwrap_or_default();
        let text = |name| get(name).to_string_lossy().into_owned();
        let word = text("CNI_COMMAND");
        let verb = Verb::parse(&word).ok_or_else(|| bad(format!("unknown CNI_COMMAND: {word}")))?;
        let required = verb.required();
        let missing: Vec<_> = required.iter().copied().filter(|name| get(name).is_empty()).collect();
        if !missing.is_empty() {
            return Err(bad(format!("required env variables [{}] missing", missing.join(","))));
        }
        let wanted = |name| if required.contains(&name) { text(name) } else { String::new() };
        let (container, ifname) = (wanted("CNI_CONTAINERID"), wanted("CNI_IFNAME"));
        if required.contains(&"CNI_CONTAINERID") && !is_identifier(&container) {
            return Err(CniError { details: container, ..bad("invalid characters in containerID".into()) });
        }
        if required.contains(&"CNI_IFNAME") {
            check_interface(&ifname)?;
        }
        let over = text("CNI_NETNS_OVERRIDE");
        let own_netns_allowed = over.eq_ignore_ascii_case("true") || over == "1";
        Ok(Self {
            verb,
            attachment: Attachment { container, ifname },
            path: get("CNI_PATH"),
            netns: get("CNI_NETNS"),
            args: text("CNI_ARGS"),
            exec: text("FLANNEL_CNI_EXEC") == "1",
            own_netns_allowed,
        })
    }

    /// Refuses a pod namespace that is the plugin's own. One that is gone is fine: its pod is gone too.
    ///
    /// # Errors
    /// Code 8.
    pub(crate) fn check_netns(&self) -> Result<(), CniError> {
        let own = || Namespace::own().and_then(Namespace::identity).ok();
        let given = fs::metadata(&self.netns).ok().map(|meta| (meta.dev(), meta.ino()));
        if self.own_netns_allowed || given.is_none() || own() != given {
            return Ok(());
        }
        Err(CniError::new(error::BAD_NETNS, "plugin's netns and netns from CNI_NETNS should not be the same"))
    }
}

/// One interface of one container: what an ADD makes and a DEL undoes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Attachment {
    /// `CNI_CONTAINERID`.
    pub(crate) container: String,
    /// `CNI_IFNAME`.
    pub(crate) ifname: String,
}

/// Whether `text` may name a container or a network: letters, digits, and after the first also `_.-`.
pub(crate) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// Refuses what can't be the name of an interface.
///
/// # Errors
/// Code 4, with the texts of the Go framework.
pub(crate) fn check_interface(name: &str) -> Result<(), CniError> {
    let bad = |msg: &str| Err(CniError::new(error::BAD_ENVIRONMENT, msg));
    if name.is_empty() {
        return bad("interface name is empty");
    }
    if name.len() > 15 {
        let details = "interface name should be less than 16 characters".into();
        return bad("interface name is too long").map_err(|error| CniError { details, ..error });
    }
    if name == "." || name == ".." {
        return bad("interface name is . or ..");
    }
    if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
        return bad("interface name contains / or : or whitespace characters");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::ffi::OsStr;

    fn read(command: &str, container: &str, ifname: &str) -> Result<Call, CniError> {
        Call::read(|name| match name {
            "CNI_COMMAND" => Some(command.into()),
            "CNI_CONTAINERID" => Some(container.into()),
            "CNI_IFNAME" => Some(ifname.into()),
            "CNI_NETNS" => Some("/nowhere".into()),
            "CNI_PATH" => Some("/opt/cni/bin".into()),
            _ => None,
        })
    }

    #[test]
    fn every_missing_variable_of_a_verb_is_listed() {
        let missing = |command: &str| {
            let error = Call::read(|name| (name == "CNI_COMMAND").then(|| command.into())).unwrap_err();
            assert_eq!(error.code, 4);
            error.msg
        };
        let all = "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing";
        assert_eq!(missing("ADD"), all);
        assert_eq!(missing("CHECK"), all);
        assert_eq!(missing("DEL"), "required env variables [CNI_CONTAINERID,CNI_IFNAME,CNI_PATH] missing");
        assert_eq!(missing("STATUS"), "required env variables [CNI_PATH] missing");
        assert_eq!(missing("GC"), "required env variables [CNI_PATH] missing");
        assert_eq!(missing("add"), "unknown CNI_COMMAND: add");
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for container in ["", ".", "..", "a/b", "../a", "-a", "a b", "ä", "a\n"] {
            assert_eq!(read("ADD", container, "eth0").unwrap_err().code, 4, "{container}");
        }
        for ifname in ["", ".", "..", "a/b", "eth0:1", "e 0", "a\u{2003}b", "sixteencharacter"] {
            assert_eq!(read("DEL", "c1", ifname).unwrap_err().code, 4, "{ifname}");
        }
        assert_eq!(read("DEL", "c1", "fifteencharacte").unwrap().attachment.ifname, "fifteencharacte");
    }

    #[test]
    fn the_own_namespace_is_refused_unless_the_runtime_insists() {
        let call = |netns: &str, over: &str| {
            let mut call = read("ADD", "c1", "eth0").unwrap();
            call.netns = netns.into();
            call.own_netns_allowed = over == "1";
            call.check_netns().map_err(|error| error.code)
        };
        assert_eq!(call("/proc/self/ns/net", ""), Err(8));
        assert_eq!(call("/proc/self/ns/net", "1"), Ok(()));
        assert_eq!(call("/proc/self/ns/uts", ""), Ok(()));
        assert_eq!(call("/nowhere", ""), Ok(()));
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_one_plain_file_name(container in ".{0,5}", ifname in ".{0,16}") {
            if let Ok(call) = read("ADD", &container, &ifname) {
                let Attachment { container, ifname } = call.attachment;
                for name in [container.clone(), format!("{container}-{ifname}")] {
                    prop_assert_eq!(std::path::Path::new(&name).file_name(), Some(OsStr::new(&name)));
                    prop_assert!(!name.starts_with('.') && !name.contains('/'));
                }
            }
        }
    }
}
