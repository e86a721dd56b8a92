//! Credential plugins of a kubeconfig (`exec`): a program that prints a token or a certificate.
//!
//! It is run on a thread of its own and killed when it takes too long: meanwhile health is answered and
//! signals are heard meanwhile. Nothing that it prints is ever shown but the end of its error output when it fails.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::config::{AuthInfo, ExecConfig};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::json;

use crate::text::shortened_to;

/// How long a plugin may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What a plugin prints.
#[derive(Deserialize)]
struct Credential {
    status: Option<CredentialStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CredentialStatus {
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
}

/// Has the user's plugin give what it is asked for, and puts that in the plugin's place.
///
/// # Errors
/// A sentence with the program and the remedy.
pub(super) async fn credentials(user: &mut AuthInfo) -> Result<(), String> {
    let Some(exec) = user.exec.take() else { return Ok(()) };
    let program = exec.command.clone().filter(|command| !command.is_empty());
    let program = program.ok_or("exec has no command: name the program that prints the credentials")?;
    let at = format!("exec: {}", shortened_to(&program, 200));
    let status = tokio::task::spawn_blocking(move || run(&program, exec, TIMEOUT))
        .await
        .map_err(|error| format!("{at}: {error}"))?
        .map_err(|why| format!("{at}: {why}"))?;
    if let Some(token) = status.token.filter(|token| !token.is_empty()) {
        user.token = Some(token.into());
    }
    if let (Some(certificate), Some(key)) = (status.client_certificate_data, status.client_key_data) {
        user.client_certificate_data = Some(STANDARD.encode(certificate));
        user.client_key_data = Some(STANDARD.encode(key).into());
    }
    Ok(())
}

fn run(program: &str, exec: ExecConfig, limit: Duration) -> Result<CredentialStatus, String> {
    let version = exec.api_version.as_deref().unwrap_or("client.authentication.k8s.io/v1");
    let asked = json!({ "apiVersion": version, "kind": "ExecCredential", "spec": { "interactive": false } });
    let mut command = Command::new(program);
    command.args(exec.args.unwrap_or_default()).env("KUBERNETES_EXEC_INFO", asked.to_string());
    for variable in exec.env.iter().flatten() {
        if let (Some(name), Some(value)) = (variable.get("name"), variable.get("value")) {
            command.env(name, value);
        }
    }
    let output = output(command, limit).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            let hint = exec.install_hint.as_deref().map(|hint| format!(" ({})", shortened_to(hint, 200)));
            format!(
                "there is no such program here: install it, or give the user a token or a client certificate{}",
                hint.unwrap_or_default()
            )
        }
        _ => error.to_string(),
    })?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let last = complaint.trim().lines().last().unwrap_or("it says nothing about that");
        return Err(format!("it failed ({}): {}", output.status, shortened_to(last, 200)));
    }
    // What it printed may be a secret.
    let credential: Credential = serde_json::from_slice(&output.stdout)
        .map_err(|_| "it printed something else than an ExecCredential in JSON: run it by hand".to_owned())?;
    let status = credential.status.filter(|status| {
        status.token.is_some() || status.client_certificate_data.is_some() && status.client_key_data.is_some()
    });
    status.ok_or_else(|| {
        "its ExecCredential has neither a token nor a client certificate with its key".to_owned()
    })
}

/// What a program prints; one that takes longer than `limit` is killed, with its children.
fn output(mut command: Command, limit: Duration) -> io::Result<Output> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let group = Pid::from_child(&child);
    let (done, ended) = mpsc::channel();
    thread::spawn(move || done.send(child.wait_with_output()));
    ended.recv_timeout(limit).unwrap_or_else(|_| {
        let _ = kill_process_group(group, Signal::KILL);
        let text = format!("no answer within {} s, so it was killed", limit.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_that_hangs_is_killed_with_its_children() {
        let exec = ExecConfig { args: Some(vec!["-c".into(), "sleep 600 & wait".into()]), ..plugin() };
        let why = run("sh", exec, Duration::from_millis(200)).err().unwrap();
        assert_eq!(why, "no answer within 0 s, so it was killed");
    }

    fn plugin() -> ExecConfig {
        serde_json::from_value(json!({ "apiVersion": "client.authentication.k8s.io/v1" })).unwrap()
    }

    #[test]
    fn what_a_plugin_prints_is_used_and_never_shown() {
        let said = |script: &str| {
            let exec = ExecConfig { args: Some(vec!["-c".into(), script.into()]), ..plugin() };
            run("sh", exec, Duration::from_secs(60)).map(|status| status.token.unwrap_or_default())
        };
        assert_eq!(said(r#"echo '{"status":{"token":"abc"}}'"#).unwrap(), "abc");
        assert!(said("echo secret; echo why >&2; exit 3").unwrap_err().ends_with("exit status: 3): why"));
        for script in ["echo secret", "echo '{\"kind\":\"secret\"}'", "echo '{\"status\":{}}'"] {
            let why = said(script).unwrap_err();
            assert!(why.contains("ExecCredential") && !why.contains("secret"), "{why}");
        }
    }
}
