//! Why etcd can't be used, in words that name the setting to look at.
//!
//! Two programs can fail to understand each other in many ways of which the client says only that the transport
//! is broken, and in other words each time: the server's reason arrives before or after the connection's end. So
//! where the reason is not plain, a connection of its own is made that says nothing and listens.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::tls::Tls;
use crate::text::{shortened, shortened_to};

/// How long to listen: the server's reason comes at once or never.
const PROBE_WITHIN: Duration = Duration::from_secs(2);

/// What stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// One of the two refuses the other: somebody has to change something.
    Refused(String),
    /// It does not answer.
    Away(String),
}

impl Reason {
    fn refused(text: impl Into<String>) -> Self {
        Self::Refused(text.into())
    }
}

/// The reason that an error tells by itself.
pub(super) fn plain(error: &(dyn Error + 'static), endpoint: &str, identified: bool) -> Option<Reason> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return of_tls(tls, endpoint, identified);
        }
        if let Some(io) = error.downcast_ref::<io::Error>()
            && let Some(reason) = of_io(io, endpoint, identified)
        {
            return Some(reason);
        }
        cause = error.source();
    }
    None
}

fn of_io(error: &io::Error, endpoint: &str, identified: bool) -> Option<Reason> {
    if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return of_tls(tls, endpoint, identified);
    }
    match error.kind() {
        ErrorKind::ConnectionRefused => Some(Reason::Away(format!(
            "nothing listens at {endpoint}: is etcd running? Look at --etcd-endpoints, or keep leases elsewhere with \
             --lease-store=file:DIR"
        ))),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            Some(Reason::Away(format!("there is no way to {endpoint}: {error}")))
        }
        _ if error.to_string().contains("failed to lookup address") => Some(Reason::Away(format!(
            "the name in {endpoint} can't be resolved: look at --etcd-endpoints and DNS"
        ))),
        _ => None,
    }
}

fn of_tls(error: &rustls::Error, endpoint: &str, identified: bool) -> Option<Reason> {
    Some(match error {
        rustls::Error::InvalidCertificate(error) => Reason::Refused(of_certificate(error, endpoint)),
        rustls::Error::AlertReceived(alert) => of_alert(*alert, identified),
        rustls::Error::InvalidMessage(_) => not_tls(endpoint),
        rustls::Error::PeerIncompatible(why) => Reason::Refused(format!(
            "etcd at {endpoint} and flanneld have no version or cipher of TLS in common: {why:?}; TLS 1.2 is the least"
        )),
        _ => return None,
    })
}

fn not_tls(endpoint: &str) -> Reason {
    Reason::Refused(format!("{endpoint} does not speak TLS: is it http? Look at --etcd-endpoints"))
}

/// We refuse etcd's certificate.
fn of_certificate(error: &CertificateError, endpoint: &str) -> String {
    let its = format!("etcd's certificate at {endpoint}");
    let text = error.to_string();
    match error {
        CertificateError::UnknownIssuer => format!(
            "{its} is signed by an authority that is not trusted here: give the authority's certificate with --etcd-cafile"
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let names = match error {
                CertificateError::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
                    shortened_to(&presented.join(", "), 200)
                }
                _ => "no name at all (subjectAltName)".to_owned(),
            };
            format!(
                "{its} is for {names}: give one of its names in --etcd-endpoints, or make one for this address"
            )
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("{its} has expired: renew it, or look at this host's clock")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("{its} is not valid yet: look at the clocks of both hosts")
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            format!("{its} is not a server's: its extendedKeyUsage has to have serverAuth")
        }
        _ if text.contains("UnsupportedSignatureAlgorithm") => format!(
            "{its}, or the one that signed it, has a key or signature that flanneld can't check (such as P-521, SHA-1, \
             or SHA-512 with P-384): make it with P-256, P-384 with SHA-384, Ed25519 or RSA"
        ),
        _ if text.contains("CaUsedAsEndEntity") => {
            format!("{its} is an authority's (CA:TRUE): make one for the server, signed by that authority")
        }
        _ if text.contains("UnsupportedCertVersion") => {
            format!("{its} is of X.509 version 1, which has no names: make one with subjectAltName")
        }
        CertificateError::BadSignature => {
            format!(
                "{its} has a signature that is wrong, or of an RSA key of fewer than 2048 bits: look at --etcd-cafile"
            )
        }
        _ => format!("{its} is refused here: {}", shortened(&text)),
    }
}

/// Etcd refuses our certificate, or its absence.
fn of_alert(alert: AlertDescription, identified: bool) -> Reason {
    use AlertDescription as Alert;
    let about_us = matches!(
        alert,
        Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError
            | Alert::NoCertificate
    );
    match (about_us, identified) {
        (true, false) => {
            Reason::refused("etcd asks for a client certificate: give --etcd-certfile and --etcd-keyfile")
        }
        (true, true) => Reason::Refused(format!(
            "etcd refuses this node's certificate ({alert:?}): --etcd-certfile has to be signed by an authority of etcd's \
             --trusted-ca-file, be valid now, and be for clientAuth"
        )),
        (false, _) => Reason::Refused(format!(
            "etcd ends the TLS handshake ({alert:?}): its certificate may have a key that flanneld can't check, such as \
             P-521: make it with P-256, P-384, Ed25519 or RSA"
        )),
    }
}

/// The reason that is found by listening; `None` if that tells nothing either.
pub(super) async fn probed(endpoint: &str, tls: &Tls) -> Option<Reason> {
    timeout(PROBE_WITHIN, probe(endpoint, tls)).await.ok().flatten()
}

async fn probe(endpoint: &str, tls: &Tls) -> Option<Reason> {
    let (scheme, authority) = endpoint.split_once("://")?;
    let host = authority.rsplit_once(':')?.0.trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).ok()?;
    let stream = TcpStream::connect(authority).await.ok()?;
    if scheme == "http" {
        // Without anybody to trust: that there is an answer is all that is of interest.
        let config =
            ClientConfig::builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let speaks_tls = match TlsConnector::from(Arc::new(config)).connect(name, stream).await {
            Ok(_) => true,
            Err(error) => error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<rustls::Error>())
                .is_some_and(|error| !matches!(error, rustls::Error::InvalidMessage(_))),
        };
        if speaks_tls {
            return Some(Reason::Refused(format!(
                "{endpoint} speaks TLS: is it https? Look at --etcd-endpoints"
            )));
        }
        return not_etcd(&answer_to_http(authority).await.ok()?, endpoint);
    }
    let config = client_config(tls)?;
    let error = match TlsConnector::from(Arc::new(config)).connect(name, stream).await {
        // What TLS 1.3 has to say about the client comes after the handshake.
        Ok(mut stream) => stream.read_u8().await.err()?,
        Err(error) => error,
    };
    match of_io(&error, endpoint, tls.has_identity()) {
        Some(reason) => Some(reason),
        None => answer_to_http(authority).await.ok()?.starts_with(b"HTTP/").then(|| not_tls(endpoint)),
    }
}

/// The first bytes of what is said to a plain request.
async fn answer_to_http(authority: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(authority).await?;
    stream.write_all(b"GET /version HTTP/1.0\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.take(512).read_to_end(&mut answer).await?;
    Ok(answer)
}

/// The reason, if that was not answered by etcd. A proxy answers so as well while its etcd is away.
fn not_etcd(answer: &[u8], endpoint: &str) -> Option<Reason> {
    if !answer.starts_with(b"HTTP/") || answer.windows(10).any(|part| part == b"etcdserver") {
        return None;
    }
    let line = String::from_utf8_lossy(answer.split(|byte| *byte == b'\r').next()?).into_owned();
    Some(Reason::Away(format!(
        "what answers at {endpoint} is no etcd ({}): look at --etcd-endpoints, or at the proxy if there is one in front of etcd",
        shortened(&line)
    )))
}

fn client_config(tls: &Tls) -> Option<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(crate::tls::certificates(&tls.roots().ok()?).ok()?);
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let mut config = match tls.identity() {
        Some((certificates, key)) => builder.with_client_auth_cert(certificates, key).ok()?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols.push(b"h2".to_vec());
    Some(config)
}

/// What etcd itself says, in words that name the setting. `user` is who asks, under `prefix`.
pub(super) fn of_status(code: i32, message: &str, user: Option<&str>, prefix: &str) -> Option<Reason> {
    // gRPC's codes: 3 invalid argument, 7 permission denied, 9 failed precondition, 16 unauthenticated. etcd says
    // that a password is wrong or missing with code 3.
    let text = match code {
        3 | 16 | 7 if message.contains("user name is empty") || message.contains("user name not found") => {
            "it asks for a user: give --etcd-username and --etcd-password".to_owned()
        }
        3 | 16 if message.contains("authentication failed") || message.contains("password") => format!(
            "user {} and the password are not accepted: look at --etcd-username and --etcd-password",
            shortened(user.unwrap_or("(none)"))
        ),
        7 if message.contains("permission denied") => denied(user, prefix),
        7 | 16 => shortened_to(message, 200),
        // What is there can still be read and renewed.
        8 if message.contains("database space exceeded") => {
            return Some(Reason::Away(
                "its database has reached its quota, so that nothing can be written: compact and defragment it, then \
                 `etcdctl alarm disarm`, or raise --quota-backend-bytes of etcd"
                    .to_owned(),
            ));
        }
        _ => return None,
    };
    Some(Reason::Refused(text))
}

/// The user may not read or write what is needed.
pub(super) fn denied(user: Option<&str>, prefix: &str) -> String {
    let who = match user {
        Some(user) => format!("user {}", shortened(user)),
        None => "the client without --etcd-username".to_owned(),
    };
    let prefix = shortened(prefix.trim_end_matches('/'));
    format!(
        "permission denied: {who} needs a role that may read and write under {prefix}/ (etcdctl role grant-permission ROLE \
         --prefix=true readwrite {prefix}/)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_names_the_setting_to_look_at() {
        let tls = |error| match of_tls(&error, "https://e:1", false) {
            Some(Reason::Refused(text)) => text,
            other => panic!("{other:?}"),
        };
        let invalid = |error| tls(rustls::Error::InvalidCertificate(error));
        assert!(invalid(CertificateError::UnknownIssuer).contains("--etcd-cafile"));
        assert!(invalid(CertificateError::NotValidForName).contains("--etcd-endpoints"));
        assert!(invalid(CertificateError::Expired).contains("renew"));
        assert!(invalid(CertificateError::InvalidPurpose).contains("serverAuth"));
        let alert = |alert| tls(rustls::Error::AlertReceived(alert));
        assert!(alert(AlertDescription::CertificateRequired).contains("--etcd-certfile and --etcd-keyfile"));
        assert_eq!(alert(AlertDescription::CertificateRequired), alert(AlertDescription::BadCertificate));
        assert!(alert(AlertDescription::HandshakeFailure).contains("P-521"));
        assert!(
            tls(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType))
                .contains("is it http?")
        );
    }

    #[test]
    fn what_etcd_refuses_names_the_user_and_the_right() {
        let said = |code, message, user| match of_status(code, message, user, "/coreos.com/network") {
            Some(Reason::Refused(text)) => text,
            other => panic!("{other:?}"),
        };
        assert!(
            said(3, "etcdserver: user name is empty", None).contains("--etcd-username and --etcd-password")
        );
        let refused =
            said(3, "etcdserver: authentication failed, invalid user ID or password", Some("flannel"));
        assert!(refused.contains("user flannel") && refused.contains("--etcd-password"), "{refused}");
        let denied = said(7, "etcdserver: permission denied", Some("flannel"));
        assert!(
            denied.contains("user flannel") && denied.contains("readwrite /coreos.com/network/"),
            "{denied}"
        );
        assert_eq!(of_status(14, "etcdserver: leader changed", None, ""), None);
        let Some(Reason::Away(full)) = of_status(8, "etcdserver: mvcc: database space exceeded", None, "")
        else {
            panic!()
        };
        assert!(full.contains("quota") && full.contains("etcdctl alarm disarm"), "{full}");
    }

    #[test]
    fn a_server_of_http_that_is_no_etcd_is_named_as_such() {
        let etcd = b"HTTP/1.0 200 OK\r\n\r\n{\"etcdserver\":\"3.4.23\",\"etcdcluster\":\"3.4.0\"}";
        assert_eq!(not_etcd(etcd, "http://10.0.0.1:2379"), None);
        assert_eq!(not_etcd(b"\0\0\x12\x04\0", "http://10.0.0.1:2379"), None);
        let Some(Reason::Away(text)) = not_etcd(b"HTTP/1.0 404 Not Found\r\nServer: x", "http://10.0.0.1:80")
        else {
            panic!()
        };
        assert!(text.contains("http://10.0.0.1:80 is no etcd (HTTP/1.0 404 Not Found)"), "{text}");
        assert!(text.contains("--etcd-endpoints"), "{text}");
    }

    #[test]
    fn a_port_on_which_nobody_listens_is_told_apart() {
        let error = io::Error::from(ErrorKind::ConnectionRefused);
        let Some(Reason::Away(text)) = plain(&error, "http://127.0.0.1:2379", false) else { panic!() };
        assert!(text.contains("is etcd running?") && text.contains("--lease-store=file:DIR"), "{text}");
    }
}
