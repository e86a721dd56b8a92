use proptest::prelude::*;
use secrecy::ExposeSecret;

use super::*;

fn read_in(text: &str) -> Result<Kubeconfig, String> {
    parse(text, Path::new("/etc/k"))
}

/// A file with these members of its cluster and its user.
fn with(cluster: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\npreferences: {{}}\ncurrent-context: c\ncontexts:\n- name: c\n  context:\n    cluster: c\n    user: u\nclusters:\n- name: other\n  cluster: {{server: https://192.0.2.9}}\n- name: c\n  cluster:\n    {cluster}\nusers:\n- name: u\n  user:\n    {user}\n"
    )
}

fn user(members: &str) -> Result<AuthInfo, String> {
    read_in(&with("server: https://192.0.2.1", members)).map(|read| read.user)
}

fn cluster(members: &str) -> Result<KubeCluster, String> {
    read_in(&with(members, "token: t")).map(|read| read.cluster)
}

#[test]
fn a_text_is_what_is_written_whatever_it_looks_like() {
    for (written, meant) in [
        ("abc", Some("abc")),
        ("12345", Some("12345")),
        ("0123", Some("0123")),
        ("0x10", Some("0x10")),
        ("1e3", Some("1e3")),
        ("1.50", Some("1.50")),
        (".nan", Some(".nan")),
        ("2026-11-29", Some("2026-11-29")),
        ("yes", Some("yes")),
        ("no", Some("no")),
        ("on", Some("on")),
        ("true", Some("true")),
        ("!!str 12", Some("12")),
        ("!!int 12", Some("12")),
        ("!!binary aGVsbG8=", Some("hello")),
        ("!other abc", Some("abc")),
        ("'12'", Some("12")),
        ("'null'", Some("null")),
        ("\"null\"", Some("null")),
        ("\"\\u00e9\\n\"", Some("\u{e9}\n")),
        ("'a: b'", Some("a: b")),
        ("a #comment", Some("a")),
        ("a#b", Some("a#b")),
        ("a\n      b", Some("a b")),
        ("\"a\n      b\"", Some("a b")),
        ("|\n      a\n      b", Some("a\nb\n")),
        ("|-\n      a", Some("a")),
        (">\n      a\n      b", Some("a b\n")),
        ("&name abc", Some("abc")),
        ("", None),
        ("~", None),
        ("null", None),
        ("Null", None),
        ("NULL", None),
        ("\"\"", None),
        ("''", None),
        ("!!str", None),
    ] {
        let read = user(&format!("username: {written}\n    password: {written}")).unwrap();
        assert_eq!(read.username.as_deref(), meant, "{written:?}");
        assert_eq!(read.password.as_ref().map(ExposeSecret::expose_secret), meant, "{written:?}");
    }
    for name in ["12", "2026-11-29", "yes", "null-ish", "1.0"] {
        let text = with("server: s", "token: t").replace("name: u", &format!("name: {name}"));
        let text = text.replace("user: u", &format!("user: {name}"));
        assert!(read_in(&text).unwrap().user.token.is_some(), "{name}");
    }
}

#[test]
fn members_are_found_wherever_yaml_lets_them_be() {
    let token = |text: &str| {
        let token = read_in(text).unwrap_or_else(|error| panic!("{text}: {error}")).user.token;
        token.map(|token| token.expose_secret().to_owned())
    };
    let expected = Some("t".to_owned());
    let block = with("server: s", "token: t");
    assert_eq!(token(&block), expected);
    for text in [
        // JSON is YAML.
        r#"{"current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"clusters":[{"name":"c","cluster":{"server":"s"}}],"users":[{"name":"u","user":{"token":"t"}}]}"#.to_owned(),
        format!("\u{feff}{block}"),
        format!("%YAML 1.1\n---\n{block}...\n"),
        format!("# a comment\n\n{block}# another\n"),
        block.replace('\n', "\r\n"),
        with("server: s", "token: \"t\" # a comment"),
        with("server: s", "? token\n    : t"),
        with("server: s", "'token': t"),
        format!("shared: &s {{token: t}}\n{}", with("server: s", "<<: *s")),
        format!("shared: &s {{token: other}}\n{}", with("server: s", "<<: *s\n    token: t")),
        format!("a: &a {{token: t}}\nb: &b {{token: x}}\n{}", with("server: s", "<<: [*a, *b]")),
        format!("text: &t t\n{}", with("server: s", "token: *t")),
        // An earlier document wins, and what it lacks is in a later one.
        format!("---\n---\ncurrent-context: c\n---\n{}", block.replace("current-context: c", "current-context: d")),
        format!("{block}---\n{}", with("server: x", "token: x")),
    ] {
        assert_eq!(token(&text), expected, "{text}");
    }
}

#[test]
fn all_members_of_a_cluster_and_a_user_are_read() {
    let read = cluster(
        "server: https://192.0.2.1:6443\n    certificate-authority: ca.crt\n    certificate-authority-data: |\n      YWJj\n      ZGVm\n    insecure-skip-tls-verify: true\n    tls-server-name: api\n    proxy-url: http://192.0.2.2\n    disable-compression: true\n    extensions: [{name: x, extension: {a: 1}}]",
    )
    .unwrap();
    assert_eq!(read.server.as_deref(), Some("https://192.0.2.1:6443"));
    assert_eq!(read.authority.as_deref(), Some("/etc/k/ca.crt"));
    assert_eq!(read.authority_data.as_deref(), Some("YWJjZGVm"));
    assert!(read.skip_verify);
    assert_eq!((read.server_name.as_deref(), read.proxy.as_deref()), (Some("api"), Some("http://192.0.2.2")));

    let read = user(
        "username: me\n    token: t\n    tokenFile: ../t\n    client-certificate: /abs.crt\n    client-certificate-data: \"YWJj\\nZGVm\"\n    client-key: keys/k\n    client-key-data: YWJj\n    as: other\n    as-uid: 7\n    as-groups: [a, 1]\n    as-user-extra: {reason: [b, 2], none: ~}\n    auth-provider: {name: gcp, config: {a: 1}}",
    )
    .unwrap();
    assert_eq!(read.token_file.as_deref(), Some("/etc/k/../t"));
    assert_eq!(read.client_certificate.as_deref(), Some("/abs.crt"));
    assert_eq!(read.client_key.as_deref(), Some("/etc/k/keys/k"));
    assert_eq!(read.client_certificate_data.as_deref(), Some("YWJjZGVm"));
    assert_eq!(read.client_key_data.unwrap().expose_secret(), "YWJj");
    assert_eq!((read.impersonate.as_deref(), read.impersonate_uid.as_deref()), (Some("other"), Some("7")));
    assert_eq!(read.impersonate_groups.unwrap(), ["a", "1"]);
    let extra = read.impersonate_user_extra.unwrap();
    assert_eq!((&extra["reason"][..], extra.len()), (&["b".to_owned(), "2".to_owned()][..], 1));
    assert!(read.auth_provider.is_some() && read.exec.is_none());
}

#[test]
fn all_members_of_a_credential_plugin_are_read() {
    let exec = |members: &str| user(&format!("exec: {{{members}}}")).map(|user| user.exec.unwrap());
    let read = exec(
        "apiVersion: client.authentication.k8s.io/v1, command: get-token, args: [--port, 8080, true, ''], env: [{name: A, value: 1}, {name: B}], installHint: install it, interactiveMode: Never, provideClusterInfo: false",
    )
    .unwrap();
    assert_eq!(read.api_version.as_deref(), Some("client.authentication.k8s.io/v1"));
    assert_eq!(read.command.as_deref(), Some("get-token"), "looked for in PATH");
    assert_eq!(read.args.unwrap(), ["--port", "8080", "true", ""]);
    let env = read.env.unwrap();
    let env: Vec<_> = env.iter().map(|one| (one["name"].as_str(), one["value"].as_str())).collect();
    assert_eq!(env, [("A", "1"), ("B", "")]);
    assert_eq!(read.install_hint.as_deref(), Some("install it"));
    for (command, meant) in [("./x", "/etc/k/./x"), ("bin/x", "/etc/k/bin/x"), ("/bin/x", "/bin/x")] {
        assert_eq!(exec(&format!("command: {command}")).unwrap().command.as_deref(), Some(meant));
    }
    let read = exec("command: x, args: ~, env: ~").unwrap();
    assert!(read.args.is_none() && read.env.is_none());
    assert!(user("exec: ~\n    token: t").unwrap().exec.is_none());
    assert!(exec("").unwrap().command.is_none());
}

#[test]
fn flags_are_read_in_all_spellings_of_yaml() {
    for (written, meant) in [
        ("true", true),
        ("True", true),
        ("yes", true),
        ("'true'", true),
        ("on", true),
        ("false", false),
        ("no", false),
        ("OFF", false),
        ("~", false),
        ("", false),
    ] {
        let read = cluster(&format!("insecure-skip-tls-verify: {written}")).unwrap();
        assert_eq!(read.skip_verify, meant, "{written:?}");
    }
}

#[test]
fn a_context_may_lead_to_nobody() {
    let text = with("server: s", "token: t");
    for text in [
        text.replace("    user: u\n", ""),
        text.replace("    user: u\n", "    user: ''\n"),
        text.split("users:").next().unwrap().to_owned(),
        text.replace("    token: t\n", "    {}\n"),
        text.replace("  user:\n    token: t\n", "  user: ~\n"),
        text.replace("  user:\n    token: t\n", ""),
    ] {
        let read = read_in(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(read.user.token.is_none() && read.user.username.is_none(), "{text}");
    }
}

#[test]
fn what_is_wrong_is_named_and_nothing_secret_is_shown() {
    let whole = with("server: s", "token: secret");
    let changed = |from: &str, to: &str| whole.replace(from, to);
    for (text, parts) in [
        (String::new(), &["no contexts", "name another file"][..]),
        ("# nothing\n---\n".into(), &["no contexts"]),
        ("Network: secret".into(), &["no contexts"]),
        (changed("current-context: c", ""), &["no current-context", "kubectl config use-context"]),
        ("secret".into(), &["the file is not a mapping"]),
        ("[secret]".into(), &["the file is not a mapping"]),
        ("\u{1}secret".into(), &["not YAML", "line 1, column 1"]),
        ("a: b\n  c: d".into(), &["not YAML", "line 2, column 4"]),
        ("token: \"secret".into(), &["not YAML", "unclosed quote"]),
        ("token: *secret".into(), &["not YAML", "unknown anchor"]),
        ("token: @secret".into(), &["not YAML", "line 1"]),
        ("[".repeat(100_000), &["not YAML", "recursion limit"]),
        (changed("current-context: c", "current-context: [c]"), &["current-context is not a text"]),
        (changed("current-context: c", "current-context: d"), &["\"d\"", "contexts [c]", "choose one"]),
        (changed("contexts:\n", "contexts: []\nx:\n"), &["\"c\"", "contexts []"]),
        (changed("contexts:\n", "contexts: secret\nx:\n"), &["contexts is not a list"]),
        (changed("  context:\n", "  context: secret\n  x:\n"), &["contexts[0].context is not a mapping"]),
        (changed("    cluster: c\n", "    cluster: d\n"), &["no cluster \"d\"", "clusters [other, c]"]),
        (changed("    cluster: c\n", ""), &["no cluster \"\"", "clusters [other, c]"]),
        (changed("    user: u\n", "    user: v\n"), &["no user \"v\"", "users [u]", "name one"]),
        (changed("- name: u\n", "- secret\n- name: u\n"), &["users[0] is not a mapping"]),
        (changed("- name: u\n", "- ~\n- name: u\n"), &["users[0] is not a mapping"]),
        (changed("token: secret", "token: [secret]"), &["users[0].user.token is not a text", "quotes"]),
        (
            changed("token: secret", "token: secret\n    token: secret"),
            &["users[0].user has token twice", "remove one"],
        ),
        (changed("token: secret", "exec: secret"), &["users[0].user.exec is not a mapping"]),
        (changed("token: secret", "exec: {args: secret}"), &["users[0].user.exec.args is not a list"]),
        (changed("token: secret", "exec: {args: [[secret]]}"), &["users[0].user.exec.args[0] is not a text"]),
        (changed("token: secret", "exec: {env: [secret]}"), &["users[0].user.exec.env[0] is not a mapping"]),
        (changed("token: secret", "as-groups: secret"), &["as-groups is not a list"]),
        (
            changed("token: secret", "as-user-extra: {\"a\\n\": secret}"),
            &["as-user-extra.a\\n is not a list"],
        ),
        (
            changed("server: s", "insecure-skip-tls-verify: 1"),
            &["clusters[1].cluster.insecure-skip-tls-verify is \"1\"", "true or false"],
        ),
    ] {
        let error = read_in(&text).err().unwrap_or_else(|| panic!("is read: {text}"));
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(!error.contains("secret") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn aliases_and_merge_keys_that_multiply_or_lead_back_end() {
    let mut bomb = "a0: &a0 {x: y}\n".to_owned();
    for n in 1..200 {
        let before = format!("*a{}", n - 1);
        bomb += &format!("a{n}: &a{n} {{<<: [{}]}}\n", vec![before; 20].join(", "));
    }
    let text = format!("{bomb}{}", with("server: s", "<<: *a199"));
    assert!(read_in(&text).unwrap().user.token.is_none());
    assert!(read_in(&with("server: s", "&me <<: *me")).is_err());
    let text = with("server: s", "token: t").replace("  user:\n", "  user: &me\n    <<: *me\n");
    assert!(read_in(&text).unwrap().user.token.is_some());
    let error = read_in("current-context: c\ncontexts: &all [*all]").err().unwrap();
    assert!(error.contains("contexts[0] is not a mapping"), "{error}");
}

#[test]
fn files_are_decoded_as_windows_writes_them_and_what_is_no_kubeconfig_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config");
    let text = with("server: s", "tokenFile: t");
    let wide =
        |to: fn(u16) -> [u8; 2]| "\u{feff}".encode_utf16().chain(text.encode_utf16()).flat_map(to).collect();
    let found = directory.path().join("t").to_str().map(str::to_owned);
    for bytes in [
        text.clone().into_bytes(),
        format!("\u{feff}{text}").into_bytes(),
        wide(u16::to_le_bytes),
        wide(u16::to_be_bytes),
    ] {
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(read(&path).unwrap().user.token_file, found);
    }
    for (bytes, part) in [
        (b"\xff\xfea\0b".to_vec(), "not a text in UTF-8 or UTF-16"),
        (b"\xfe\xff\xd8\0".to_vec(), "not a text in UTF-8 or UTF-16"),
        (b"\x7fELF\x02\x01\x01\xff".to_vec(), "not a text in UTF-8 or UTF-16"),
        (b"\x7fELF\x02\x01\x01".to_vec(), "not YAML"),
        (vec![b'a'; 10 << 20], "more than 4 MiB"),
        (vec![b'a'; 4 << 20], "the file is not a mapping"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = read(&path).err().unwrap();
        assert!(error.contains(part), "{error}");
    }
    assert!(read(directory.path()).err().unwrap().contains("directory"));
    assert!(read(&directory.path().join("missing")).err().unwrap().contains("No such file"));
}

proptest! {
    #[test]
    fn any_text_in_quotes_is_read_as_it_is(text in any::<String>()) {
        let quoted = serde_json::to_string(&text).unwrap();
        let read = user(&format!("username: {quoted}"));
        prop_assert_eq!(read.unwrap().username.unwrap_or_default(), text);
    }

    #[test]
    fn no_text_makes_the_reader_panic(parts in prop::collection::vec(prop::sample::select(vec![
        "current-context", "contexts", "clusters", "users", "name", "context", "cluster", "user", "token", "exec", "env",
        ":", ": ", "- ", "\n", "\n  ", "\n    ", "[", "]", "{", "}", ",", "&a ", "*a", "<<: ", "!!binary ", "|", ">", "\"", "'",
        "---\n", "...\n", "? ", "#", "%", "\t", "~", "c", "\u{e9}", "\0",
    ]), 0..60)) {
        let _ = read_in(&parts.concat());
    }
}
