//! TLS material for etcd, from the files that the flags name.

use std::path::{Path, PathBuf};

use etcd_client::{Certificate, Identity, TlsOptions};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::regular;
use crate::store::StoreError;
use crate::tls::{Wrong, certificates, check_pair};

const CERT_FLAG: &str = "--etcd-certfile";
const KEY_FLAG: &str = "--etcd-keyfile";
const CA_FLAG: &str = "--etcd-cafile";

/// Where distributions keep the certificates of public authorities, in the order in which Go looks.
const SYSTEM_ROOTS: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The files that the operator named.
pub(super) struct Tls {
    pub(super) cert: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
    pub(super) ca: Option<PathBuf>,
}

impl Tls {
    /// Whether this node can identify itself: only with both files, as in Go flannel.
    pub(super) fn has_identity(&self) -> bool {
        self.cert.is_some() && self.key.is_some()
    }

    /// Reads the files. A CA file alone is used too: Go flannel ignores it and then trusts what the
    /// system trusts, which is more than the operator asked for.
    pub(super) fn load(&self) -> Result<TlsOptions, StoreError> {
        let mut tls = TlsOptions::new();
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            let (certificate, private) = (read(cert, CERT_FLAG)?, read(key, KEY_FLAG)?);
            check_pair(&certificate, &private).map_err(|wrong| {
                StoreError::Unusable(match wrong {
                    Wrong::Certificate(why) => format!("{CERT_FLAG} {}: {why}", cert.display()),
                    Wrong::Key(why) => format!("{KEY_FLAG} {}: {why}", key.display()),
                    Wrong::Mismatch => format!(
                        "the key in {KEY_FLAG} {} is not that of the certificate in {CERT_FLAG} {}: give the two that belong \
                         together",
                        key.display(),
                        cert.display()
                    ),
                })
            })?;
            tls = tls.identity(Identity::from_pem(certificate, private));
        }
        Ok(tls.ca_certificate(Certificate::from_pem(self.roots()?)))
    }

    /// The certificate with its chain and the key, for a connection of one's own.
    pub(super) fn identity(&self) -> Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let (cert, key) = (self.cert.as_ref()?, self.key.as_ref()?);
        let certificates = certificates(&regular::read_small(cert).ok()?).ok()?;
        Some((certificates, PrivateKeyDer::from_pem_file(key).ok()?))
    }

    pub(super) fn roots(&self) -> Result<Vec<u8>, StoreError> {
        if let Some(ca) = &self.ca {
            let pem = read(ca, CA_FLAG)?;
            certificates(&pem)
                .map_err(|why| StoreError::Unusable(format!("{CA_FLAG} {}: {why}", ca.display())))?;
            return Ok(pem);
        }
        let system = SYSTEM_ROOTS.iter().find_map(|path| std::fs::read(path).ok());
        system.ok_or_else(|| {
            StoreError::Unusable(
                "an https etcd endpoint needs a certificate authority and this system has none: name its file with --etcd-cafile".into(),
            )
        })
    }
}

fn read(path: &Path, flag: &str) -> Result<Vec<u8>, StoreError> {
    regular::read_small(path).map_err(|error| {
        StoreError::Unusable(format!("{flag} {}: {}", path.display(), regular::with_remedy(&error)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusable_files_are_named_with_their_flag() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            Some(path)
        };
        let (not_pem, absent) = (file("empty", "nothing"), Some(directory.path().join("absent")));
        for (tls, parts) in [
            (
                Tls { cert: None, key: None, ca: absent.clone() },
                ["--etcd-cafile", "absent: No such file or directory (os error 2): correct the path"],
            ),
            (Tls { cert: None, key: None, ca: not_pem.clone() }, ["--etcd-cafile", "PEM"]),
            (Tls { cert: absent, key: not_pem.clone(), ca: None }, ["--etcd-certfile", "absent"]),
            (Tls { cert: not_pem.clone(), key: not_pem, ca: None }, ["--etcd-certfile", "PEM"]),
        ] {
            let error = tls.load().err().unwrap().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
