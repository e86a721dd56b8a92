//! Flannel's own tables, as the agent will want them.

use backends::nft::{Base, Chain, Hook, Op, Rule, Table, TableId, masquerade_flags, matches::*};
use ipnet::IpNet;
use subnet::Family;

use crate::Bed;

/// The tables of Go's nft mode with the decisions of its iptables mode.
pub(crate) fn flannel(family: Family) -> Table {
    let (name, network, own, multicast) = match family {
        Family::V4 => ("flannel-ipv4", "10.244.0.0/16", "10.244.1.0/24", "224.0.0.0/4"),
        Family::V6 => ("flannel-ipv6", "fd00:10:244::/48", "fd00:10:244:1::/64", "ff00::/8"),
    };
    let [network, own, multicast]: [IpNet; 3] = [network, own, multicast].map(|net| net.parse().unwrap());
    let masquerade = || masquerade(masquerade_flags::FULLY_RANDOM);

    let mut postrouting = Chain::base("postrtg", Base::nat(Hook::Postrouting, Base::SOURCE_NAT));
    postrouting.comment = Some("chain to manage traffic masquerading by flannel".to_owned());
    postrouting.rules = vec![
        Rule::new([mark_bits(0x4000, Op::Eq, 0x4000), leave()]),
        Rule::new([source(Op::Eq, own), destination(Op::Eq, network), leave()]),
        Rule::new([source(Op::Eq, network), destination(Op::Eq, own), leave()]),
        Rule::new([source(Op::Ne, network), destination(Op::Eq, own), leave()]),
        Rule::new([source(Op::Eq, network), destination(Op::Ne, multicast), masquerade()]),
        Rule::new([source(Op::Ne, network), destination(Op::Eq, network), masquerade()]),
    ];
    let mut forward = Chain::base("forward", Base::filter(Hook::Forward, 0));
    forward.comment = Some("chain to accept flannel traffic".to_owned());
    forward.rules = vec![
        Rule::new([source(Op::Eq, network), accept()]),
        Rule::new([destination(Op::Eq, network), accept()]),
    ];

    let mut table = Table::new(TableId::new(family, name));
    table.comment = Some(format!("rules for {name}"));
    table.chains = vec![postrouting, forward];
    table
}

#[test]
fn the_flannel_tables_read_as_gos_do() {
    let mut bed = Bed::new();
    bed.nft.apply(&Family::BOTH.map(flannel)).unwrap();
    assert_eq!(
        bed.list("table ip flannel-ipv4"),
        r#"table ip flannel-ipv4 {
	comment "rules for flannel-ipv4"
	chain postrtg {
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
	}

	chain forward {
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		ip saddr 10.244.0.0/16 accept
		ip daddr 10.244.0.0/16 accept
	}
}
"#
    );
    assert_eq!(
        bed.list("table ip6 flannel-ipv6"),
        r#"table ip6 flannel-ipv6 {
	comment "rules for flannel-ipv6"
	chain postrtg {
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip6 saddr fd00:10:244:1::/64 ip6 daddr fd00:10:244::/48 return
		ip6 saddr fd00:10:244::/48 ip6 daddr fd00:10:244:1::/64 return
		ip6 saddr != fd00:10:244::/48 ip6 daddr fd00:10:244:1::/64 return
		ip6 saddr fd00:10:244::/48 ip6 daddr != ff00::/8 masquerade fully-random
		ip6 saddr != fd00:10:244::/48 ip6 daddr fd00:10:244::/48 masquerade fully-random
	}

	chain forward {
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		ip6 saddr fd00:10:244::/48 accept
		ip6 daddr fd00:10:244::/48 accept
	}
}
"#
    );
}
