//! Why there is no answer from the API server, in words that name the setting to look at.

use std::error::Error;

use crate::store::with_causes;
use crate::text::shortened_to;

/// Refusals of the server's certificate: what the client's libraries call them, and what that means with the remedy.
/// `{}` stands for their whole text.
const CERTIFICATES: [(&[&str], &str); 8] = [
    (
        &["UnknownIssuer"],
        "is signed by an authority that is not trusted here: look at certificate-authority in --kubeconfig-file, or at the \
         service account's ca.crt",
    ),
    (
        &["not valid for name", "NotValidForName"],
        "is for other names ({}): look at server and tls-server-name",
    ),
    (
        &["certificate expired", "certificate not valid yet", ": Expired", ": NotValidYet"],
        "is not valid at this node's time ({}): renew it on the server, or set this node's clock",
    ),
    (
        &["CaUsedAsEndEntity"],
        "is an authority's own (CA:TRUE), as many self-signed ones are: make one for the server, signed by that authority, and \
         give the authority's as certificate-authority in --kubeconfig-file",
    ),
    (&["UnsupportedCertVersion"], "is of X.509 version 1, which has no names: make one with subjectAltName"),
    (
        &["UnsupportedSignatureAlgorithm"],
        "or the one that signed it has a key or signature that flanneld can't check: make it with P-256, P-384 with \
         SHA-384, Ed25519 or RSA",
    ),
    (
        &["InvalidPurpose", "extended key usage"],
        "is not a server's: its extendedKeyUsage has to have serverAuth",
    ),
    (&["invalid peer certificate"], "is refused here: {}"),
];

/// Whether one of both refuses the other, and why, with the setting to look at.
pub(super) fn in_words(error: &str) -> (bool, String) {
    // What the client's libraries put before the reason tells an operator nothing.
    let reason = error.rsplit("client error (Connect): ").next().unwrap_or(error);
    let reason = shortened_to(reason, 300);
    let has = |parts: &[&str]| parts.iter().any(|part| reason.contains(part));
    if let Some((_, meaning)) = CERTIFICATES.iter().find(|(parts, _)| has(parts)) {
        return (true, format!("the API server's certificate {}", meaning.replace("{}", &reason)));
    }
    if has(&["fatal alert", "certificate required"]) {
        let why = format!(
            "the API server refuses this node's certificate ({reason}): look at client-certificate in --kubeconfig-file"
        );
        return (true, why);
    }
    if has(&["Connection refused"]) {
        return (
            false,
            format!(
                "nothing listens there ({reason}): look at --kube-api-url or server in --kubeconfig-file"
            ),
        );
    }
    (has(&["failed to read token file"]), reason)
}

/// An error with its causes.
pub(super) fn explain(error: &(dyn Error + 'static)) -> String {
    with_causes(error.to_string(), error.source())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use rustls::{AlertDescription, CertificateError, Error as TlsError, OtherError};

    use super::*;

    /// As rustls wraps what it has no name for.
    #[derive(Debug, thiserror::Error)]
    #[error("CaUsedAsEndEntity")]
    struct CaUsedAsEndEntity;

    #[test]
    fn certificates_that_are_refused_are_named_with_the_remedy() {
        let bad = TlsError::InvalidCertificate;
        let other = CertificateError::Other(OtherError(Arc::new(CaUsedAsEndEntity)));
        let seconds = |seconds| rustls::pki_types::UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let (now, then) = (seconds(2_000_000_000), seconds(1_000_000_000));
        for (error, remedy) in [
            (bad(CertificateError::UnknownIssuer), "certificate-authority"),
            (bad(CertificateError::NotValidForName), "tls-server-name"),
            (bad(CertificateError::Expired), "this node's clock"),
            (bad(CertificateError::ExpiredContext { time: now, not_after: then }), "this node's clock"),
            (bad(CertificateError::NotValidYet), "this node's clock"),
            (bad(CertificateError::NotValidYetContext { time: then, not_before: now }), "this node's clock"),
            (bad(CertificateError::InvalidPurpose), "serverAuth"),
            (bad(other), "(CA:TRUE), as many self-signed ones are: make one for the server"),
            (bad(CertificateError::Revoked), "is refused here"),
            (TlsError::AlertReceived(AlertDescription::CertificateExpired), "client-certificate"),
            (TlsError::AlertReceived(AlertDescription::CertificateRequired), "client-certificate"),
        ] {
            let (denied, why) = in_words(&format!("client error (Connect): {error}"));
            assert!(denied && why.contains(remedy), "{error}: {why}");
            assert!(!why.contains("OtherError"), "{why}");
        }
    }
}
