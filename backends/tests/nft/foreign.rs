//! Other people's tables: read, relieved of what a Go flannel left, given a rule.

use backends::nft::{
    Change, Expr, Hook, Op, Place, Policy, Rule, TableFamily, TableId, matches::*, may_refuse, removal,
};

use crate::Bed;

/// What Go flannel's iptables mode leaves behind, contract §6.1.
fn go_rules(program: &str, own: &str, network: &str, multicast: &str) -> String {
    let nat = format!("{program} -t nat");
    let masq = "-m comment --comment \"flanneld masq\"";
    let filter = format!("{program} -t filter");
    let fwd = "-m comment --comment \"flanneld forward\"";
    format!(
        "{nat} -N FLANNEL-POSTRTG
         {nat} -A POSTROUTING {masq} -j FLANNEL-POSTRTG
         {nat} -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN
         {nat} -A FLANNEL-POSTRTG -s {own} -d {network} {masq} -j RETURN
         {nat} -A FLANNEL-POSTRTG -s {network} -d {own} {masq} -j RETURN
         {nat} -A FLANNEL-POSTRTG ! -s {network} -d {own} {masq} -j RETURN
         {nat} -A FLANNEL-POSTRTG -s {network} ! -d {multicast} {masq} -j MASQUERADE --random-fully
         {nat} -A FLANNEL-POSTRTG ! -s {network} -d {network} {masq} -j MASQUERADE --random-fully
         {filter} -N FLANNEL-FWD
         {filter} -A FORWARD {fwd} -j FLANNEL-FWD
         {filter} -A FLANNEL-FWD -s {network} {fwd} -j ACCEPT
         {filter} -A FLANNEL-FWD -d {network} {fwd} -j ACCEPT"
    )
}

#[test]
fn what_go_flannel_left_with_iptables_is_removed_and_nothing_else() {
    const STRANGERS: &str = "iptables -t nat -N DOCKER
        iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
        iptables -t nat -A DOCKER -i docker0 -j RETURN
        iptables -t filter -P FORWARD DROP
        iptables -t filter -N DOCKER-USER
        iptables -t filter -A FORWARD -j DOCKER-USER
        ip6tables -t nat -A POSTROUTING -s fd00:17::/64 -j MASQUERADE
        ip6tables -t filter -A FORWARD -m comment --comment \"flanneld forward\" -j ACCEPT";
    const SHOW: &str = "iptables -t nat -S
        iptables -t filter -S
        ip6tables -t nat -S
        ip6tables -t filter -S";
    let mut bed = Bed::new();
    bed.iptables(STRANGERS);
    let before = bed.iptables(SHOW);
    bed.iptables(&go_rules("iptables", "10.244.1.0/24", "10.244.0.0/16", "224.0.0.0/4"));
    bed.iptables(&go_rules("ip6tables", "fd00:10:244:1::/64", "fd00:10:244::/48", "ff00::/8"));
    // Strangers' rules stand behind Go's, too.
    const LATER: &str = "iptables -t filter -A FORWARD -i docker0 -j ACCEPT";
    bed.iptables(LATER);
    let later = "-A FORWARD -j DOCKER-USER\n";
    let expected = before.replace(later, &format!("{later}-A FORWARD -i docker0 -j ACCEPT\n"));
    assert_ne!(bed.iptables(SHOW), expected);

    let families = [TableFamily::Ip, TableFamily::Ip6];
    let tables: Vec<TableId> = families
        .iter()
        .flat_map(|family| ["nat", "filter"].map(|name| TableId::new(*family, name)))
        .collect();
    let found = bed.nft.dump_tables(&tables).unwrap();
    let comments: Vec<_> = found.hooked(Hook::Postrouting).flat_map(|(_, chain)| &chain.rules).collect();
    assert!(comments.iter().any(|rule| rule.any_comment().as_deref() == Some("flanneld masq")));
    let targets = found.tables[0].chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.exprs);
    assert!(targets.filter_map(Expr::xt_target).any(|target| target == "MASQUERADE"));

    let mut changes = Vec::new();
    for table in &tables {
        changes.extend(removal(&found, table, &["FLANNEL-POSTRTG", "FLANNEL-FWD"]));
    }
    bed.nft.commit(&changes).unwrap();
    assert_eq!(bed.iptables(SHOW), expected);
    // Now there is nothing left to remove.
    let found = bed.nft.dump_tables(&tables).unwrap();
    assert!(
        tables.iter().all(|table| removal(&found, table, &["FLANNEL-POSTRTG", "FLANNEL-FWD"]).is_empty())
    );
}

#[test]
fn a_chain_still_in_use_is_refused_by_name() {
    let mut bed = Bed::new();
    bed.iptables("iptables -t nat -N FLANNEL-POSTRTG\n iptables -t nat -A POSTROUTING -j FLANNEL-POSTRTG");
    let table = TableId::new(TableFamily::Ip, "nat");
    let change = Change::DeleteChain { table, chain: "FLANNEL-POSTRTG".to_owned() };
    let text = bed.nft.commit(&[change]).unwrap_err().to_string();
    assert!(
        text.starts_with("deletion of chain FLANNEL-POSTRTG in table ip nat: Device or resource busy"),
        "{text}"
    );
}

#[test]
fn a_rule_put_into_a_foreign_chain_is_seen_by_iptables_and_can_be_taken_out() {
    let mut bed = Bed::new();
    bed.iptables("iptables -P FORWARD DROP\n iptables -A FORWARD -i eth9 -j REJECT");
    let before = bed.iptables("iptables -S");
    let table = TableId::new(TableFamily::Ip, "filter");
    let add = |place, text: &str| Change::AddRule {
        table: table.clone(),
        chain: "FORWARD".to_owned(),
        rule: Rule::new([source(Op::Eq, text.parse().unwrap()), accept()]).with_comment("flanneld forward"),
        place,
    };
    bed.nft.commit(&[add(Place::First, "10.244.0.0/16"), add(Place::Last, "10.245.0.0/20")]).unwrap();
    assert_eq!(
        bed.iptables("iptables -S"),
        "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n\
         -A FORWARD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
         -A FORWARD -i eth9 -j REJECT --reject-with icmp-port-unreachable\n\
         -A FORWARD -s 10.245.0.0/20 -m comment --comment \"flanneld forward\" -j ACCEPT\n"
    );

    let found = bed.nft.dump_hook(Hook::Forward).unwrap();
    let rules = &found.table(&table).unwrap().chain("FORWARD").unwrap().rules;
    let ours = rules.iter().filter(|rule| rule.any_comment().as_deref() == Some("flanneld forward"));
    let delete = |rule: &Rule| Change::DeleteRule {
        table: table.clone(),
        chain: "FORWARD".to_owned(),
        handle: rule.handle.unwrap(),
    };
    let changes: Vec<_> = ours.map(delete).collect();
    assert_eq!(changes.len(), 2);
    bed.nft.commit(&changes).unwrap();
    assert_eq!(bed.iptables("iptables -S"), before);
    let text = bed.nft.commit(&changes).unwrap_err().to_string();
    assert!(text.starts_with("deletion of the rule with handle "), "{text}");
}

#[test]
fn chains_that_may_refuse_forwarded_packets_are_found() {
    let mut bed = Bed::new();
    bed.iptables(
        "iptables -P FORWARD DROP
         ip6tables -N REFUSE
         ip6tables -A FORWARD -i eth9 -j REFUSE
         ip6tables -A REFUSE -j REJECT
         ip6tables -N UNUSED
         ip6tables -A UNUSED -j DROP",
    );
    bed.script(
        "table inet firewalld {
            set zones { type ifname; elements = { \"eth9\" }; }
            chain filter_FORWARD { type filter hook forward priority 10; policy accept;
                ct state established accept; iifname @zones goto filter_FWD_public; }
            chain filter_FWD_public { jump deeper; }
            chain deeper { reject with icmpx admin-prohibited; }
            chain filter_INPUT { type filter hook input priority 10; policy drop; }
         }
         table ip harmless { chain forward { type filter hook forward priority 0; ip saddr 10.0.0.0/8 accept; }; }
         table netdev n { chain c { comment \"no hook at all\"; }; }",
    );
    let found = bed.nft.dump_hook(Hook::Forward).unwrap();
    let named: Vec<_> = found
        .hooked(Hook::Forward)
        .map(|(table, chain)| (table.id.to_string(), chain.name.as_str(), may_refuse(table, chain)))
        .collect();
    let expected = [
        ("ip filter", "FORWARD", true),
        ("ip6 filter", "FORWARD", true),
        ("inet firewalld", "filter_FORWARD", true),
        ("ip harmless", "forward", false),
    ];
    assert_eq!(named, expected.map(|(table, chain, refuses)| (table.to_owned(), chain, refuses)));
    let policy = |table: &str| {
        let table = found.tables.iter().find(|found| found.id.to_string() == table);
        table.and_then(|table| table.chain("FORWARD")?.base.clone()).map(|base| base.policy)
    };
    assert_eq!((policy("ip filter"), policy("ip6 filter")), (Some(Policy::Drop), Some(Policy::Accept)));
    // Chains that nothing at the hook leads to aren't read.
    let chains = found.tables.iter().flat_map(|table| &table.chains);
    let names: Vec<_> = chains.map(|chain| chain.name.as_str()).collect();
    assert!(!names.contains(&"UNUSED") && !names.contains(&"filter_INPUT"), "{names:?}");
    assert!(names.contains(&"deeper"), "{names:?}");
}

#[test]
fn all_that_nft_can_say_is_read_without_loss() {
    let mut bed = Bed::new();
    bed.script(
        "table inet zoo { comment \"all sorts\"; flags dormant;
            set timed { type ipv4_addr; flags timeout; timeout 1h; elements = { 10.0.0.1 }; }
            set wide { type ipv6_addr . inet_service; flags interval; elements = { fd00::/64 . 80-90 }; }
            map nat { type inet_service : ipv4_addr; elements = { 80 : 10.0.0.1 }; }
            map verdicts { type ipv4_addr : verdict; elements = { 10.0.0.1 : goto other, * : drop }; }
            chain other { comment \"to go to\"; meta mark set 7 comment \"sets\"; ct mark set 1; }
            chain c { type nat hook prerouting priority dstnat; policy accept;
                tcp dport { 80, 443 } ct state new,established counter packets 5 bytes 6 accept
                meta nfproto ipv4 dnat ip to tcp dport map @nat
                limit rate 5/second log prefix \"x\" drop
                fib daddr type local reject
                ip saddr vmap @verdicts
                tcp dport vmap { 22 : accept, 23 : drop }
                ip saddr 10.0.0.1-10.0.0.9 meta l4proto tcp notrack
                ct direction original meta iif lo numgen inc mod 2 0 continue
                update @timed { ip saddr timeout 5s }
            }
         }",
    );
    let found = bed.nft.dump().unwrap();
    let [table] = found.tables.as_slice() else { panic!("{found:?}") };
    assert_eq!((table.comment.as_deref(), table.dormant), (Some("all sorts"), true));
    assert_eq!(table.chain("c").unwrap().rules.len(), 9);
    assert_eq!(table.chain("other").unwrap().rules[0].comment.as_deref(), Some("sets"));
    assert_eq!(table.set("timed").unwrap().elements.len(), 1);
    assert_eq!(table.set("nat").unwrap().elements.len(), 1);
    let counters: Vec<_> = table.chain("c").unwrap().rules[0]
        .exprs
        .iter()
        .filter(|expr| matches!(expr, Expr::Counter { packets: 5, bytes: 6 }))
        .collect();
    assert_eq!(counters.len(), 1);
    let unknown = table.chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.exprs);
    let names: std::collections::BTreeSet<&str> = unknown
        .filter_map(|expr| match expr {
            Expr::Unknown { name, .. } => Some(name.as_str()),
            _ => None,
        })
        .collect();
    assert!(names.contains("log") && names.contains("fib") && names.contains("meta"), "{names:?}");
}
