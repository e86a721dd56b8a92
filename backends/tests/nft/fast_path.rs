//! The fast path on the real kernel, whether or not it has flowtables: `nft` is the witness.

use backends::fast_path::{Abilities, FastPath};
use backends::firewall::nftables::{NftFirewall, Offloaded};

use crate::Bed;

fn fast_path(pods: &[&str]) -> FastPath {
    let names = |all: &[&str]| all.iter().map(|name| name.parse().unwrap()).collect();
    FastPath {
        networks: vec!["10.244.0.0/16".parse().unwrap()],
        outer: names(&["outer"]),
        pods: names(pods),
        requests_only: false,
        // Armed from the start.
        abilities: Abilities { quotas: false, ..Abilities::default() },
    }
}

/// Whether this kernel has flowtables.
fn has_flowtables(bed: &Bed) -> bool {
    let words =
        "add table ip witness; add flowtable ip witness f { hook ingress priority 0; devices = { lo }; }";
    let made = bed.namespace.command("nft").arg(words).output().unwrap().status.success();
    bed.script("add table ip witness; delete table ip witness");
    made
}

#[test]
fn a_kernel_without_flowtables_is_recognised_and_nothing_is_left() {
    let bed = Bed::new();
    bed.namespace.ip("link add outer type veth peer name pod1").unwrap();
    let mut firewall = bed.namespace.run(|| NftFirewall::open().unwrap());
    let has = has_flowtables(&bed);
    let outcome = firewall.offload(&[fast_path(&["pod1"])], &[], false).unwrap();
    assert_eq!(outcome == Offloaded::Lacking, !has, "{outcome:?}");
    assert_eq!(bed.list("ruleset").contains("flowtable pods"), has);
    // A device that is gone is no missing module.
    let outcome = firewall.offload(&[fast_path(&["gone"])], &[], false);
    assert_eq!(outcome.is_err(), has, "{outcome:?}");
    assert!(matches!(
        firewall.offload(&[], &["10.244.0.0/16".parse().unwrap()], false),
        Ok(Offloaded::Done { .. })
    ));
    assert!(!bed.list("ruleset").contains("flannel-fast-path"));
}
