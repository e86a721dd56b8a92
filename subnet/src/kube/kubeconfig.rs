//! Reading a kubeconfig: its current context, as leniently as kubectl reads it.
//!
//! What the context does not lead to is not looked at, and a text is what is written: a token that looks like a number
//! stays a text, where kubectl gives an error.

use std::collections::HashMap;
use std::path::Path;

use kube::config::{AuthInfo, AuthProviderConfig, ExecConfig};

use super::yaml::{Documents, YamlValue};
use crate::regular;
use crate::text::shortened;

/// What the current context leads to.
pub(super) struct Kubeconfig {
    pub(super) cluster: KubeCluster,
    pub(super) user: AuthInfo,
}

/// A cluster's API server, and how it is known.
#[derive(Default)]
pub(super) struct KubeCluster {
    pub(super) server: Option<String>,
    pub(super) authority: Option<String>,
    pub(super) authority_data: Option<String>,
    pub(super) skip_verify: bool,
    pub(super) server_name: Option<String>,
    pub(super) proxy: Option<String>,
}

/// Reads the file.
///
/// # Errors
/// A sentence with the member and the remedy, never with a value that may be a secret.
pub(super) fn read(path: &Path) -> Result<Kubeconfig, String> {
    let bytes = regular::read_small(path).map_err(|error| regular::with_remedy(&error))?;
    let text = decoded(bytes).ok_or("it is not a text in UTF-8 or UTF-16: name a kubeconfig")?;
    parse(&text, path.parent().unwrap_or(Path::new("")))
}

/// The text of a file, which Windows writes in UTF-16.
fn decoded(bytes: Vec<u8>) -> Option<String> {
    let unit: fn([u8; 2]) -> u16 = match bytes.as_slice() {
        [0xff, 0xfe, ..] => u16::from_le_bytes,
        [0xfe, 0xff, ..] => u16::from_be_bytes,
        [0xef, 0xbb, 0xbf, text @ ..] => return String::from_utf8(text.to_vec()).ok(),
        _ => return String::from_utf8(bytes).ok(),
    };
    let (pairs, rest) = bytes.as_chunks::<2>();
    let units: Vec<u16> = pairs.iter().skip(1).copied().map(unit).collect();
    String::from_utf16(&units).ok().filter(|_| rest.is_empty())
}

/// Reads the text of a file in `directory`.
fn parse(text: &str, directory: &Path) -> Result<Kubeconfig, String> {
    let documents = Documents::read(text)?;
    let file = KubeconfigFile { documents, directory };
    let current = file.current_context()?;
    let context = match file.item("contexts", &current)? {
        Some(item) => item.member("context")?,
        None => None,
    };
    let context = context.ok_or_else(|| {
        let names = file.names("contexts");
        format!(
            "its current-context is {:?}, but it has the contexts [{names}]: choose one of them",
            shortened(&current)
        )
    })?;
    let cluster = file.cluster(&context)?;
    let user = file.user(&context)?;
    Ok(Kubeconfig { cluster, user })
}

/// The documents of one file: what an earlier one says counts.
struct KubeconfigFile<'a> {
    documents: Documents,
    directory: &'a Path,
}

impl KubeconfigFile<'_> {
    fn current_context(&self) -> Result<String, String> {
        for root in self.documents.roots() {
            if let Some(name) = text_of(&root, "current-context")? {
                return Ok(name.to_owned());
            }
        }
        if self.items("contexts")?.is_empty() {
            return Err("it has no contexts, and so is no kubeconfig: name another file".into());
        }
        Err("it has no current-context: choose one with `kubectl config use-context NAME`".into())
    }

    /// All items of a list.
    fn items(&self, list: &str) -> Result<Vec<YamlValue<'_>>, String> {
        let mut all = Vec::new();
        for root in self.documents.roots() {
            if let Some(list) = root.member(list)? {
                all.append(&mut list.items()?);
            }
        }
        Ok(all)
    }

    /// The first item of this name.
    fn item(&self, list: &str, name: &str) -> Result<Option<YamlValue<'_>>, String> {
        for item in self.items(list)? {
            if text_of(&item, "name")? == Some(name) {
                return Ok(Some(item));
            }
        }
        Ok(None)
    }

    /// The names in a list, for a message.
    fn names(&self, list: &str) -> String {
        let items = self.items(list).unwrap_or_default();
        let names = items.iter().filter_map(|item| text_of(item, "name").ok().flatten());
        names.take(10).map(shortened).collect::<Vec<_>>().join(", ")
    }

    /// The cluster of a context.
    fn cluster(&self, context: &YamlValue<'_>) -> Result<KubeCluster, String> {
        let name = text_of(context, "cluster")?.unwrap_or_default();
        let cluster = match self.item("clusters", name)? {
            Some(item) => item.member("cluster")?,
            None => None,
        };
        let Some(cluster) = cluster else {
            return Err(format!(
                "it has no cluster {:?}, which its context names, but the clusters [{}]: name one of them",
                shortened(name),
                self.names("clusters")
            ));
        };
        Ok(KubeCluster {
            server: owned(&cluster, "server")?,
            authority: self.path(&cluster, "certificate-authority")?,
            authority_data: base64(&cluster, "certificate-authority-data")?,
            skip_verify: boolean(&cluster, "insecure-skip-tls-verify")?,
            server_name: owned(&cluster, "tls-server-name")?,
            proxy: owned(&cluster, "proxy-url")?,
        })
    }

    /// The user of a context. As in kubectl, there need not be one: the API server decides what an anonymous user may do.
    fn user(&self, context: &YamlValue<'_>) -> Result<AuthInfo, String> {
        let Some(name) = text_of(context, "user")? else { return Ok(AuthInfo::default()) };
        let Some(item) = self.item("users", name)? else {
            let names = self.names("users");
            return if names.is_empty() {
                Ok(AuthInfo::default())
            } else {
                Err(format!(
                    "it has no user {:?}, which its context names, but the users [{names}]: name one of them",
                    shortened(name)
                ))
            };
        };
        let Some(user) = item.member("user")? else { return Ok(AuthInfo::default()) };
        Ok(AuthInfo {
            username: owned(&user, "username")?,
            password: owned(&user, "password")?.map(Into::into),
            token: owned(&user, "token")?.map(Into::into),
            token_file: self.path(&user, "tokenFile")?,
            client_certificate: self.path(&user, "client-certificate")?,
            client_certificate_data: base64(&user, "client-certificate-data")?,
            client_key: self.path(&user, "client-key")?,
            client_key_data: base64(&user, "client-key-data")?.map(Into::into),
            impersonate: owned(&user, "as")?,
            impersonate_uid: owned(&user, "as-uid")?,
            impersonate_groups: texts(&user, "as-groups")?,
            impersonate_user_extra: extra(&user)?,
            auth_provider: user.member("auth-provider")?.map(|_| AuthProviderConfig::default()),
            exec: user.member("exec")?.map(|exec| self.exec(&exec)).transpose()?,
            ..AuthInfo::default()
        })
    }

    fn exec(&self, exec: &YamlValue<'_>) -> Result<ExecConfig, String> {
        // A name without a directory is looked for in PATH.
        let command = owned(exec, "command")?;
        let command = command.map(|name| if name.contains('/') { self.found(&name) } else { Ok(name) });
        Ok(ExecConfig {
            api_version: owned(exec, "apiVersion")?,
            command: command.transpose()?,
            args: texts(exec, "args")?,
            env: environment(exec)?,
            install_hint: owned(exec, "installHint")?,
            ..ExecConfig::default()
        })
    }

    /// A path, which is relative to the directory of the file.
    fn path(&self, value: &YamlValue<'_>, member: &str) -> Result<Option<String>, String> {
        text_of(value, member)?.map(|path| self.found(path)).transpose()
    }

    fn found(&self, path: &str) -> Result<String, String> {
        let joined = self.directory.join(path);
        let text = joined.to_str().map(str::to_owned);
        text.ok_or_else(|| format!("{} is not UTF-8: rename that directory", joined.display()))
    }
}

/// The text of a member; one that is empty is as good as missing.
fn text_of<'a>(value: &YamlValue<'a>, member: &str) -> Result<Option<&'a str>, String> {
    let Some(member) = value.member(member)? else { return Ok(None) };
    Ok(Some(member.text()?).filter(|text| !text.is_empty()))
}

fn owned(value: &YamlValue<'_>, member: &str) -> Result<Option<String>, String> {
    Ok(text_of(value, member)?.map(str::to_owned))
}

/// Base64 without the line ends that YAML leaves in a long one, which Go's decoder skips.
fn base64(value: &YamlValue<'_>, member: &str) -> Result<Option<String>, String> {
    Ok(text_of(value, member)?.map(|text| text.split_ascii_whitespace().collect()))
}

fn boolean(value: &YamlValue<'_>, member: &str) -> Result<bool, String> {
    let Some(member_value) = value.member(member)? else { return Ok(false) };
    match member_value.text()?.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "y" => Ok(true),
        "false" | "no" | "off" | "n" => Ok(false),
        other => Err(format!("{} is {:?}: write true or false", member_value.at(), shortened(other))),
    }
}

fn texts(value: &YamlValue<'_>, member: &str) -> Result<Option<Vec<String>>, String> {
    value.member(member)?.map(|list| texts_in(&list)).transpose()
}

fn texts_in(list: &YamlValue<'_>) -> Result<Vec<String>, String> {
    list.items()?.iter().map(|item| item.text().map(str::to_owned)).collect()
}

fn extra(user: &YamlValue<'_>) -> Result<Option<HashMap<String, Vec<String>>>, String> {
    let Some(extra) = user.member("as-user-extra")? else { return Ok(None) };
    let pairs = extra.members()?.into_iter().map(|(name, list)| Ok((name.to_owned(), texts_in(&list)?)));
    pairs.collect::<Result<_, _>>().map(Some)
}

/// The environment of a credential plugin.
fn environment(exec: &YamlValue<'_>) -> Result<Option<Vec<HashMap<String, String>>>, String> {
    let Some(list) = exec.member("env")? else { return Ok(None) };
    let variable = |item: &YamlValue<'_>| {
        let text = |member: &str| Ok::<_, String>(owned(item, member)?.unwrap_or_default());
        Ok(HashMap::from([("name".to_owned(), text("name")?), ("value".to_owned(), text("value")?)]))
    };
    list.items()?.iter().map(variable).collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests;
