//! The ruleset as text for a bug report: tables, chains and rules in short, without the elements of sets.

use std::fmt::Write;

use super::expr::{Expr, Verdict};
use super::model::{Flowtable, Policy, Rule};
use super::quota::Quota;
use super::{Nft, NftError};

/// Everything that nftables has, a line for each table, chain, set and rule.
///
/// # Errors
/// [`NftError`] when it can't be read.
pub fn ruleset_text() -> Result<String, NftError> {
    let found = Nft::open()?.dump()?;
    let mut text = String::new();
    for table in &found.tables {
        let dormant = if table.dormant { " dormant" } else { "" };
        let _ = writeln!(text, "table {}{dormant}", table.id);
        for set in &table.sets {
            let _ = writeln!(text, "  set {}: {} elements", set.name, set.elements.len());
        }
        for Quota { name, bytes, depleted } in &table.quotas {
            let _ =
                writeln!(text, "  quota {name}: {bytes} bytes{}", if *depleted { ", used up" } else { "" });
        }
        for Flowtable { name, priority, devices, .. } in &table.flowtables {
            let _ = writeln!(text, "  flowtable {name} priority {priority}: {} devices", devices.len());
        }
        for chain in &table.chains {
            let base = chain.base.as_ref().map_or_else(String::new, |base| {
                let policy = if base.policy == Policy::Drop { "drop" } else { "accept" };
                format!(" type {} hook {:?} priority {} policy {policy}", base.kind, base.hook, base.priority)
            });
            let _ = writeln!(text, "  chain {}{base}", chain.name);
            for rule in &chain.rules {
                let _ = writeln!(text, "    {}", words(rule));
            }
        }
    }
    Ok(text)
}

/// What a rule does in the end, with its number, its counters and its comment.
fn words(rule: &Rule) -> String {
    let mut words = rule.handle.map_or_else(String::new, |handle| format!("handle {handle}:"));
    let conditions =
        rule.exprs.iter().filter(|expr| matches!(expr, Expr::Cmp { .. } | Expr::Lookup { .. })).count();
    if conditions > 0 {
        words += &format!(" {conditions} conditions,");
    }
    for expr in &rule.exprs {
        match expr {
            Expr::Verdict(Verdict::Accept) => words += " accept",
            Expr::Verdict(Verdict::Drop) => words += " drop",
            Expr::Verdict(Verdict::Return) => words += " return",
            Expr::Verdict(Verdict::Jump(chain)) => words += &format!(" jump {chain}"),
            Expr::Verdict(Verdict::Goto(chain)) => words += &format!(" goto {chain}"),
            Expr::Verdict(Verdict::Other(code)) => words += &format!(" verdict {code}"),
            Expr::Masquerade { .. } => words += " masquerade",
            Expr::Reject { .. } => words += " reject",
            Expr::Quota { name } => words += &format!(" quota {name}"),
            Expr::Offload { flowtable } => words += &format!(" flow add @{flowtable}"),
            Expr::Counter { packets, bytes } => words += &format!(" packets {packets} bytes {bytes}"),
            other => {
                words.extend(other.xt_target().or_else(|| other.xt_match()).map(|name| format!(" {name}")))
            }
        }
    }
    words.extend(rule.any_comment().map(|comment| format!(" # {comment}")));
    words
}
