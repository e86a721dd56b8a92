//! What surrounds the page, and texts of others in it.

use crate::text::clean;

/// Names are cut to this many characters where they are shown; the whole name is in the title.
const MAX_NAME: usize = 32;

/// Everything before the first heading. The policy forbids scripts and outer resources in the whole page.
pub(super) const HEAD: &str = "\
<!DOCTYPE html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">
<meta name=viewport content=\"width=device-width\">
<title>flannel: nodes and the ways between them</title>
<style>
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#5b6570;--line:#cfd5da;--head:#f1f3f5;--good:#d3f0d7;--lossy:#ffe7a8;--bad:#f8b8b2;--none:#eaecee}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--dim:#9aa4ae;--line:#3a4148;--head:#20252a;--good:#1d4f2b;--lossy:#624d0c;--bad:#842823;--none:#282d32}}
body{font:14px/1.45 system-ui,sans-serif;margin:1.5em;color:var(--fg);background:var(--bg)}
h1{margin:0}h2{margin:1.4em 0 .4em}.dim{color:var(--dim)}
.sum{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.5em}.sum li{padding:.4em .8em;border-radius:.4em}
.wrong li{margin:.35em 0;overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:92vh;max-width:100%}
table{border-collapse:separate;border-spacing:0;border:solid var(--line);border-width:1px 0 0 1px}
th,td{padding:.25em .6em;border:solid var(--line);border-width:0 1px 1px 0;text-align:left}
th{background:var(--head);font-weight:600;white-space:nowrap;position:sticky;left:0;z-index:1}
tr:first-child th{top:0;z-index:2}tr:first-child th:first-child{z-index:3}
.m td{text-align:center;white-space:nowrap;min-width:2.6em}
.m tr:first-child th{vertical-align:bottom;padding:.4em .25em;text-align:left}.m tr:first-child span{writing-mode:vertical-rl;transform:rotate(180deg)}
.dense{font-size:10px;line-height:1.3}.dense td,.dense th{padding:1px 3px}.dense td{min-width:1.8em}
tr:hover>td,tr:hover>th{box-shadow:inset 0 0 0 99em #8883}
.g{background:var(--good)}.l{background:var(--lossy)}.b{background:var(--bad);font-weight:600}.n{background:var(--none)}
.bar{display:block;height:.9em;background:#5b8fc9}
.key span{padding:.15em .5em;margin-right:.5em;border-radius:.3em}
</style>
</head>
<body>
";

/// Everything after the last table.
pub(super) const TAIL: &str = "</body>\n</html>\n";

/// Text of others as text of a page, in an element or in a quoted attribute.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in clean(text, 2000).chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// A node's name; a long one is cut, and whole in its title.
pub(super) fn name_of(name: &str) -> String {
    if name.chars().count() <= MAX_NAME {
        return escaped(name);
    }
    format!("<span title=\"{}\">{}</span>", escaped(name), escaped(&clean(name, MAX_NAME)))
}
