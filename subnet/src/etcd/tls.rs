//! TLS material for etcd, from the files that the flags name.

use std::path::{Path, PathBuf};

use etcd_client::{Certificate, Identity, TlsOptions};

use crate::store::StoreError;

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

    /// Reads the files. A CA file alone is used too: Go flannel ignores it and then trusts whatever the
    /// system trusts, which is more than the operator asked for.
    pub(super) fn load(&self) -> Result<TlsOptions, StoreError> {
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(self.roots()?));
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            let cert = read(cert, "--etcd-certfile", "-----BEGIN CERTIFICATE-----")?;
            let (path, key) = (key, read(key, "--etcd-keyfile", " PRIVATE KEY-----")?);
            if key.contains("ENCRYPTED") {
                return Err(StoreError::Unusable(format!(
                    "--etcd-keyfile {}: the key is encrypted: store it without a passphrase",
                    path.display()
                )));
            }
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        Ok(tls)
    }

    fn roots(&self) -> Result<String, StoreError> {
        const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
        if let Some(ca) = &self.ca {
            return read(ca, "--etcd-cafile", BEGIN);
        }
        let system = SYSTEM_ROOTS.iter().find_map(|path| std::fs::read_to_string(path).ok());
        system.ok_or_else(|| {
            StoreError::Unusable(
                "an https etcd endpoint needs a certificate authority and this system has none: name its file with --etcd-cafile".into(),
            )
        })
    }
}

fn read(path: &Path, flag: &str, wanted: &str) -> Result<String, StoreError> {
    let wrong = |why: String| StoreError::Unusable(format!("{flag} {}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    if text.contains(wanted) {
        Ok(text)
    } else {
        Err(wrong(format!("it has no line with {:?}: give a PEM file", wanted.trim())))
    }
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
        let pem = file("cert", "-----BEGIN CERTIFICATE-----\n");
        let (not_pem, absent) = (file("empty", "nothing"), Some(directory.path().join("absent")));
        let encrypted = file("key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\n");
        for (tls, parts) in [
            (Tls { cert: None, key: None, ca: absent.clone() }, ["--etcd-cafile", "absent"]),
            (Tls { cert: None, key: None, ca: not_pem.clone() }, ["--etcd-cafile", "PEM"]),
            (Tls { cert: absent, key: not_pem.clone(), ca: pem.clone() }, ["--etcd-certfile", "absent"]),
            (Tls { cert: pem.clone(), key: not_pem, ca: pem.clone() }, ["--etcd-keyfile", "PRIVATE KEY"]),
            (Tls { cert: pem.clone(), key: encrypted, ca: pem }, ["--etcd-keyfile", "passphrase"]),
        ] {
            let error = tls.load().err().unwrap().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
