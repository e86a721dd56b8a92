//! `flanneld report`: how all nodes and the ways between them stand, as one static page of HTML.
//!
//! The page has no script and loads nothing, and says so to the browser. Names on it come from others, so every text
//! passes through [`escaped`].

mod html;
mod matrix;

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;

use super::answers::{self, NodeAnswer};
use super::span;
use super::ways::{Grade, known};
use super::wrong::{Trouble, Wrong};
use crate::log::moment;
use crate::status::NodeStatus;
use html::{HEAD, TAIL, escaped, name_of};

/// What `report` runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReportOptions {
    /// Where the agent of this node serves health.
    pub(crate) at: SocketAddr,
    /// What `flanneld status --all --json` printed, instead of asking; `-` is standard input.
    pub(crate) from: Option<PathBuf>,
}

/// Asks all nodes, or reads what they answered before, and prints the page.
///
/// # Errors
/// A sentence, when this node's agent does not answer or the file can't be used.
pub(crate) fn run(options: &ReportOptions) -> anyhow::Result<()> {
    let nodes = match &options.from {
        Some(file) => saved(file)?,
        None => super::status::ask_all(options.at)?,
    };
    crate::output::stdout().write_all(page(&nodes).as_bytes())?;
    Ok(())
}

fn saved(file: &PathBuf) -> anyhow::Result<Vec<NodeAnswer>> {
    let mut text = Vec::new();
    let read = match file.to_str() {
        Some("-") => io::stdin().read_to_end(&mut text),
        _ => std::fs::File::open(file).and_then(|mut open| open.read_to_end(&mut text)),
    };
    read.with_context(|| format!("--from={} can't be read", file.display()))?;
    answers::from_json(&text).map_err(|error| {
        anyhow::anyhow!("--from={} is not what flanneld status --all --json prints: {error}", file.display())
    })
}

/// The page.
fn page(nodes: &[NodeAnswer]) -> String {
    let mut page = HEAD.to_owned();
    summary(&mut page, nodes);
    troubles(&mut page, nodes);
    matrix::write(&mut page, nodes);
    rows(&mut page, nodes);
    page + TAIL
}

/// The numbers that matter first.
fn summary(page: &mut String, nodes: &[NodeAnswer]) {
    let ready =
        nodes.iter().filter(|node| node.answer.as_ref().is_ok_and(|(status, _)| status.ready)).count();
    let silent = nodes.iter().filter(|node| node.answer.is_err()).count();
    let grades =
        |grade: Grade| nodes.iter().flat_map(known).filter(|entry| Grade::of(entry) == grade).count();
    let at = nodes.iter().filter_map(|node| Some(node.answer.as_ref().ok()?.0.at)).max().unwrap_or_default();
    let asked = moment(UNIX_EPOCH + Duration::from_secs(at));
    let _ = write!(page, "<h1>flannel</h1>\n<p class=dim>asked {}</p>\n<ul class=sum>\n", escaped(&asked));
    let mut figure = |class: &str, count: usize, word: &str| {
        let class = if count == 0 { "n" } else { class };
        let _ = writeln!(page, "<li class={class}><b>{count}</b> {word}</li>");
    };
    figure("n", nodes.len(), "nodes");
    figure("g", ready, "✔ ready");
    figure("b", nodes.len() - ready - silent, "✘ not ready");
    figure("b", silent, "✘ without an answer");
    figure("g", grades(Grade::Good), "✔ ways reachable");
    figure("l", grades(Grade::Lossy), "! ways degraded");
    figure("b", grades(Grade::Bad), "✘ ways unreachable");
    page.push_str("</ul>\n");
}

/// What is wrong, each with its remedy.
fn troubles(page: &mut String, nodes: &[NodeAnswer]) {
    let wrong = Wrong::with(nodes);
    if wrong.is_nothing() {
        return;
    }
    page.push_str("<h2>What is wrong</h2>\n<ul class=wrong>\n");
    for Trouble { text, nodes, others } in &wrong.troubles {
        let mut names = nodes.iter().map(|name| name_of(name)).collect::<Vec<_>>().join(", ");
        if *others > 0 {
            let _ = write!(names, " and {others} more");
        }
        let _ = writeln!(page, "<li><b>{names}</b>: {}</li>", escaped(text));
    }
    for (name, more) in &wrong.more_of {
        let _ = writeln!(
            page,
            "<li><b>{}</b>: {more} more: flanneld status and status --peers there</li>",
            name_of(name)
        );
    }
    if wrong.more > 0 {
        let _ = writeln!(page, "<li>and {} more: flanneld status on the nodes</li>", wrong.more);
    }
    page.push_str("</ul>\n");
}

/// A row for each node.
fn rows(page: &mut String, nodes: &[NodeAnswer]) {
    page.push_str(
        "<h2>Nodes</h2>\n<div class=scroll>\n<table>\n<tr><th scope=col>Node<th scope=col>Ready<th scope=col>Address<th scope=col>Subnets\
         <th scope=col>Way<th scope=col>MTU<th scope=col>Store<th scope=col title=\"usable by the kernel, of those known\">Peers\
         <th scope=col>Pods<th scope=col>Version</tr>\n",
    );
    for node in nodes {
        let name = name_of(&node.name);
        let _ = match &node.answer {
            Err(why) => writeln!(
                page,
                "<tr><th scope=row>{name}<td class=b>✘ no answer<td>{}<td colspan=7>{}</tr>",
                node.address,
                escaped(why)
            ),
            Ok((status, _)) => writeln!(page, "<tr><th scope=row>{name}{}</tr>", row(node, status)),
        };
    }
    page.push_str("</table>\n</div>\n");
}

fn row(node: &NodeAnswer, status: &NodeStatus) -> String {
    let own = status.node.as_ref();
    let ready = match (status.ready, status.ready_since) {
        (true, Some(since)) => format!("<td class=g>✔ {}", span(status.at.saturating_sub(since))),
        (true, None) => "<td class=g>✔ yes".to_owned(),
        (false, _) => "<td class=b>✘ no".to_owned(),
    };
    let store = if status.store.connected { "<td>connected" } else { "<td class=l>! away" };
    let peers = if status.peers.programmed < status.peers.usable { "<td class=b>✘ " } else { "<td>" };
    let pods: Vec<String> = status
        .pools
        .iter()
        .map(|pool| match pool.leaked {
            Some(leaked) if leaked > 0 => format!("{} of {}, {leaked} leaked", pool.used, pool.size),
            _ => format!("{} of {}", pool.used, pool.size),
        })
        .collect();
    let address = own.and_then(|own| own.public.first().copied()).unwrap_or(node.address);
    format!(
        "{ready}<td>{address}<td>{}<td>{}<td>{}{store}{peers}{}/{}<td>{}<td>{}",
        escaped(&own.map(|own| own.subnets.join(" ")).unwrap_or_default()),
        escaped(own.map(|own| own.backend.as_str()).unwrap_or_default()),
        own.map(|own| own.mtu.to_string()).unwrap_or_default(),
        status.peers.programmed,
        status.peers.known,
        escaped(&pods.join("; ")),
        escaped(&format!("{} ({})", status.version, status.commit)),
    )
}

#[cfg(test)]
mod tests;
