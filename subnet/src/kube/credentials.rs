//! Certificates, keys and tokens that a kubeconfig names: whether they can work, before anything is sent.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::config::AuthInfo;
use secrecy::ExposeSecret;

use super::kubeconfig::KubeCluster;
use crate::regular;
use crate::tls::{Wrong, certificates, check_pair};

/// The certificates of the authorities that a cluster's server is known by, if it names any.
///
/// # Errors
/// A sentence with the member or the file, and the remedy.
pub(super) fn authorities(cluster: &KubeCluster) -> Result<Option<Vec<Vec<u8>>>, String> {
    let pem = pem("certificate-authority", cluster.authority_data.as_deref(), &cluster.authority)?;
    let Some((at, text)) = pem else { return Ok(None) };
    let all = certificates(&text).map_err(|why| format!("{at}: {why}"))?;
    Ok(Some(all.iter().map(|der| der.to_vec()).collect()))
}

/// Refuses what can't work.
///
/// # Errors
/// A sentence with the member or the file, and the remedy.
pub(super) fn check(user: &AuthInfo) -> Result<(), String> {
    if user.auth_provider.is_some() {
        return Err("the user's auth-provider is not supported, as in kubectl since 1.26: give a token, a tokenFile, a \
                    client certificate or exec"
            .into());
    }
    let certificate =
        pem("client-certificate", user.client_certificate_data.as_deref(), &user.client_certificate)?;
    let data = user.client_key_data.as_ref().map(ExposeSecret::expose_secret);
    let key = pem("client-key", data, &user.client_key)?;
    let ((cert_at, certificate), (key_at, key)) = match (certificate, key) {
        (Some(certificate), Some(key)) => (certificate, key),
        (Some((at, _)), None) => {
            return Err(format!("{at} has no key: give client-key or client-key-data as well"));
        }
        (None, Some((at, _))) => {
            return Err(format!(
                "{at} has no certificate: give client-certificate or client-certificate-data as well"
            ));
        }
        (None, None) => return Ok(()),
    };
    check_pair(&certificate, &key).map_err(|wrong| match wrong {
        Wrong::Certificate(why) => format!("{cert_at}: {why}"),
        Wrong::Key(why) => format!("{key_at}: {why}"),
        Wrong::Mismatch => {
            format!("the key in {key_at} is not that of the certificate in {cert_at}: give the two that belong together")
        }
    })
}

/// Where a PEM text is, and the text.
type Pem = Option<(String, Vec<u8>)>;

fn pem(member: &str, data: Option<&str>, file: &Option<String>) -> Result<Pem, String> {
    if let Some(data) = data {
        let member = format!("{member}-data");
        return match STANDARD.decode(data) {
            Ok(pem) => Ok(Some((member, pem))),
            Err(_) => Err(format!(
                "{member} is not base64: write the file's content as `base64 -w0 FILE` prints it"
            )),
        };
    }
    let Some(file) = file.as_deref().filter(|file| !file.is_empty()) else { return Ok(None) };
    match regular::read_small(file.as_ref()) {
        Ok(pem) => Ok(Some((format!("{member} {file}"), pem))),
        Err(error) => Err(format!("{member} {file}: {}", regular::with_remedy(&error))),
    }
}

/// Takes the token out of its file, without the line end that an editor puts behind it.
///
/// # Errors
/// A sentence with the file, never with the token.
pub(super) fn read_token(user: &mut AuthInfo) -> Result<(), String> {
    if let Some(file) = user.token_file.take().filter(|file| !file.is_empty()) {
        let read = regular::read_small(file.as_ref());
        let read = read.map_err(|error| format!("tokenFile {file}: {}", regular::with_remedy(&error)))?;
        let text = String::from_utf8_lossy(&read);
        user.token = Some(token(&text).map_err(|why| format!("tokenFile {file}: {why}"))?.into());
    } else if let Some(text) =
        user.token.as_ref().map(|token| token.expose_secret().to_owned()).filter(|text| !text.is_empty())
    {
        user.token = Some(token(&text).map_err(|why| format!("token: {why}"))?.into());
    }
    Ok(())
}

/// A token as it is sent.
fn token(text: &str) -> Result<String, &'static str> {
    let token = text.trim_start_matches('\u{feff}').trim();
    if token.is_empty() {
        return Err("it is empty: write the token into it");
    }
    if token.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(token.to_owned())
    } else {
        Err(
            "it has a space, a line end or another character that no token has: write the token alone into it",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_around_a_token_is_no_part_of_it_and_within_it_is_an_error() {
        for text in ["abc.d-e_f", "abc.d-e_f\n", " abc.d-e_f \r\n", "\u{feff}abc.d-e_f"] {
            assert_eq!(token(text).unwrap(), "abc.d-e_f", "{text:?}");
        }
        for text in ["", "\n", "two words", "two\nlines", "t\u{e9}"] {
            let error = token(text).unwrap_err();
            assert!(error.contains("token") && (text.trim().is_empty() || !error.contains(text)), "{error}");
        }
    }
}
