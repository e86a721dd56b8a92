//! TLS as Go has it, for what etcdctl and kubectl accept: keys of this node, and whether they are a certificate's.
//!
//! rustls refuses a client certificate of X.509 version 1, which `openssl x509 -req` makes where no extensions are
//! asked for, as soon as it compares it with its key. The server decides about it, so here the two are compared
//! without regard to the version.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, KeyProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};

/// The object identifier of the curve P-521, as DER.
const P521: [u8; 7] = [0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23];
/// A file with a passphrase names this in one of the forms of PEM.
const ENCRYPTED: &str = "ENCRYPTED";

/// Makes this the TLS of the process; calling it again changes nothing.
pub(crate) fn install() {
    // A second provider elsewhere in the program would be as good.
    let _ = CryptoProvider { key_provider: &PemKeys, ..ring::default_provider() }.install_default();
}

#[derive(Debug)]
struct PemKeys;

impl KeyProvider for PemKeys {
    fn load_private_key(&self, key: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
        let key = ring::default_provider().key_provider.load_private_key(key)?;
        Ok(Arc::new(Uncompared(key)))
    }
}

/// A key that rustls does not compare with its certificate: [`check_pair`] has done so.
#[derive(Debug)]
struct Uncompared(Arc<dyn SigningKey>);

impl SigningKey for Uncompared {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        self.0.choose_scheme(offered)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.0.algorithm()
    }
}

/// What is wrong with a certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// With the certificate.
    Certificate(String),
    /// With the key.
    Key(String),
    /// The key is not the certificate's.
    Mismatch,
}

/// Checks that this node can identify itself with what these PEM files contain.
pub(crate) fn check_pair(certificate: &[u8], key: &[u8]) -> Result<(), Wrong> {
    let certificates = certificates(certificate).map_err(Wrong::Certificate)?;
    let text = String::from_utf8_lossy(key);
    if text.contains(ENCRYPTED) {
        return Err(Wrong::Key("the key is encrypted: store it without a passphrase".into()));
    }
    let der = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
        Wrong::Key("it has no line with \"PRIVATE KEY-----\" that begins a key: give a PEM file".into())
    })?;
    let loaded = ring::default_provider().key_provider.load_private_key(der.clone_key());
    let loaded = loaded.map_err(|_| Wrong::Key(unusable(&der)))?;
    let own = loaded.public_key();
    match (own.as_deref().and_then(key_of), certificates.first().and_then(|der| public_key(der))) {
        (_, None) => Err(Wrong::Certificate("its certificate is damaged: give a PEM file".into())),
        (Some(own), Some(certified)) if own != certified => Err(Wrong::Mismatch),
        _ => Ok(()),
    }
}

/// The certificates of a PEM file.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err("it has no line with \"-----BEGIN CERTIFICATE-----\": give a PEM file".into()),
        Err(error) => Err(format!("it is no PEM file: {error}")),
    }
}

/// Why a key can't be used that may well be a good one.
fn unusable(key: &PrivateKeyDer<'_>) -> String {
    let der = key.secret_der();
    let is_rsa = matches!(key, PrivateKeyDer::Pkcs1(_)) || der.windows(RSA.len()).any(|part| part == RSA);
    let what = if der.windows(P521.len()).any(|part| part == P521) {
        "a key on the curve P-521"
    } else if is_rsa {
        "an RSA key of fewer than 2048 or more than 4096 bits"
    } else {
        "a key of a kind that is not known, or damaged"
    };
    format!(
        "it is {what}, with which flanneld can't sign: make one with P-256, P-384, Ed25519 or RSA of 2048 to 4096 bits"
    )
}

/// The object identifier of RSA keys, as DER.
const RSA: [u8; 11] = [0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];

/// The public key of a certificate of any version.
fn public_key(certificate: &[u8]) -> Option<&[u8]> {
    let (_, certificate, _) = element(certificate)?;
    let (_, mut fields, _) = element(certificate)?;
    if fields.first() == Some(&0xa0) {
        (_, _, fields) = element(fields)?; // the version; without one it is the first
    }
    for _ in ["serial number", "signature algorithm", "issuer", "validity", "subject"] {
        (_, _, fields) = element(fields)?;
    }
    key_of(fields)
}

/// The key proper of a `SubjectPublicKeyInfo`.
fn key_of(info: &[u8]) -> Option<&[u8]> {
    let (_, info, _) = element(info)?;
    let (_, _, key) = element(info)?;
    Some(element(key)?.1)
}

/// Tag and content of the first DER element, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (first, mut rest) = rest.split_first()?;
    let mut length = usize::from(*first);
    if *first >= 0x80 {
        let (bytes, behind) =
            rest.split_at_checked(usize::from(first & 0x7f)).filter(|(bytes, _)| bytes.len() <= 4)?;
        length = bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        rest = behind;
    }
    let (content, behind) = rest.split_at_checked(length)?;
    Some((*tag, content, behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_certificates_and_keys_are_errors() {
        let pem = |name: &str, body: &str| format!("-----BEGIN {name}-----\n{body}\n-----END {name}-----\n");
        let certificate = pem("CERTIFICATE", "MAA=");
        assert!(matches!(check_pair(b"nothing", b""), Err(Wrong::Certificate(_))));
        assert!(matches!(check_pair(certificate.as_bytes(), b"nothing"), Err(Wrong::Key(_))));
        let encrypted = pem("ENCRYPTED PRIVATE KEY", "MAA=");
        let error = check_pair(certificate.as_bytes(), encrypted.as_bytes()).unwrap_err();
        assert!(matches!(&error, Wrong::Key(why) if why.contains("passphrase")), "{error:?}");
        let damaged = pem("PRIVATE KEY", "MAA=");
        let error = check_pair(certificate.as_bytes(), damaged.as_bytes()).unwrap_err();
        assert!(matches!(&error, Wrong::Key(why) if why.contains("can't sign")), "{error:?}");
        for bytes in
            [&[][..], &[0x30], &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff], &[0x30, 0x88, 1, 1, 1, 1, 1, 1, 1, 1]]
        {
            assert_eq!(public_key(bytes), None);
        }
    }
}
