//! The command line as a whole: the agent's flags with the environment, and the commands.

use super::*;

fn parse(args: &[&str], environment: &[(&str, &str)]) -> Result<Command, UsageError> {
    super::parse(args.iter().map(OsString::from), |name| {
        environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    })
}

fn options(args: &[&str], environment: &[(&str, &str)]) -> Options {
    match parse(args, environment).unwrap() {
        Command::Run(options) => *options,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_environment_fills_in_what_the_command_line_leaves_out() {
    let environment = [
        ("FLANNELD_SUBNET_FILE", "/tmp/environment"),
        ("FLANNELD_HEALTHZ_PORT", "0x1f91"),
        ("FLANNELD_IFACE", "eth0,eth1"),
        ("FLANNELD_PUBLIC_IP", ""),
    ];
    let read = options(&["--healthz-port=9000"], &environment);
    assert_eq!(read.subnet_file.to_str(), Some("/tmp/environment"));
    assert_eq!(read.health.unwrap().port(), 9000);
    assert_eq!(read.selectors.iface, ["eth0,eth1"], "a repeatable flag gets one element");
    assert_eq!(read.selectors.public.v4, None);
    assert_eq!(options(&[], &environment).health.unwrap().port(), 8081);
}

#[test]
fn a_wrong_variable_is_named_as_the_variable_that_it_is() {
    for (variable, value, part) in [
        ("FLANNELD_HEALTHZ_PORT", "high", "whole number"),
        ("FLANNELD_IP_MASQ", "yes", "true or false"),
        ("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440", "1 to 1439"),
        ("FLANNELD_V", "much", "whole number"),
    ] {
        let text = parse(&[], &[(variable, value)]).unwrap_err().to_string();
        assert!(text.starts_with(&format!("{variable}={value:?}")) && text.contains(part), "{text}");
    }
    for (variable, value) in
        [("FLANNELD_KUBE_API_URL", "ftp://a"), ("NODE_NAME", "Node 1"), ("NODE_NAME", "")]
    {
        let environment = [("NODE_NAME", "n1"), (variable, value)];
        let environment = &environment[usize::from(variable == "NODE_NAME")..];
        let text = parse(&["--kube-subnet-mgr"], environment).unwrap_err().to_string();
        assert!(text.starts_with(&format!("{variable}: ")) && text.contains(value), "{text}");
    }
}

#[test]
fn a_misspelled_variable_is_named_with_the_one_that_is_meant_and_those_of_others_are_not() {
    for (name, meant) in [
        ("FLANNELD_ETCD_ENDPOINT", Some("FLANNELD_ETCD_ENDPOINTS")),
        ("FLANNELD_IPMASQ", Some("FLANNELD_IP_MASQ")),
        ("FLANNELD_INTERFACE", None),
        ("FLANNELD_IFACE", None),
        ("FLANNELD_LOG_BACKTRACE_AT", None),
        ("FLANNELD_VERSION", None),
        ("FLANNELD_OPTS", None),
        // Of a Service `flanneld` in Kubernetes.
        ("FLANNELD_PORT", None),
        ("FLANNELD_PORT_8081_TCP_ADDR", None),
        ("FLANNELD_SERVICE_HOST", None),
        ("FLANNEL_IFACE", None),
    ] {
        let said = misspelled([OsString::from(name)].into_iter());
        let expected = meant.map(|meant| format!("{name} has no effect: did you mean {meant}?"));
        assert_eq!(said, expected.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn a_word_that_a_flag_does_not_know_is_named_with_those_that_it_knows() {
    let text = parse(&["doctor", "--fix=everything"], &[]).unwrap_err().to_string();
    assert_eq!(text, r#"--fix="everything" can't be used: give leaked-addresses"#);
}

#[test]
fn the_version_is_printed_whatever_the_environment_says() {
    let wanted = Print::VersionFlag(version());
    for args in [&["--version"][..], &["-version=T", "--kube-subnet-mgr"]] {
        match parse(args, &[("FLANNELD_V", "much"), ("FLANNELD_VERSION", "false")]).unwrap() {
            Command::Print(print) => assert_eq!(print, wanted),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(parse(&[], &[("FLANNELD_VERSION", "true")]), Ok(Command::Run(_))));
}

#[test]
fn version_and_help_are_commands_too() {
    let text = version();
    assert!(text.starts_with(concat!("v", env!("CARGO_PKG_VERSION"), " (commit ")), "{text}");
    let Command::Print(print) = parse(&["version"], &[]).unwrap() else { panic!() };
    assert_eq!(print, Print::Version(text));
    let text = |args: &[&str]| match parse(args, &[]).unwrap() {
        Command::Print(Print::Help(text)) => text,
        other => panic!("{other:?}"),
    };
    assert_eq!(text(&["help"]), text(&["--help"]));
    assert_eq!(text(&["help", "cleanup"]), text(&["cleanup", "--help"]));
    assert!(text(&["help"]).contains("Examples:\n  flanneld --etcd-endpoints="));
    assert!(text(&["help", "cleanup"]).contains("--all"));
    assert!(parse(&["help", "me"], &[]).unwrap_err().to_string().contains("flanneld help cleanup"));
}

#[test]
fn help_lists_every_flag_with_its_variable_and_every_default() {
    for args in [["-h"], ["--help"], ["-help"]] {
        let Command::Print(Print::Help(text)) = parse(&args, &[]).unwrap() else { panic!("{args:?}") };
        for argument in RunFlags::command().get_arguments() {
            let flag = argument.get_long().unwrap();
            assert!(text.contains(&format!("--{flag}")), "--{flag} is missing");
            let variable = grammar::variable(flag);
            assert_eq!(text.contains(&format!("[env: {variable}]")), flag != "version", "{variable}");
            for default in argument.get_default_values() {
                assert!(text.contains(default.to_str().unwrap()), "default of --{flag}");
            }
        }
        assert!(text.contains("flanneld cleanup"));
    }
    let Command::Print(Print::Help(text)) = parse(&["cleanup", "-h"], &[]).unwrap() else { panic!() };
    assert!(text.contains("--dry-run") && text.contains("FLANNELD_SUBNET_FILE"), "{text}");
}

#[test]
fn cleanup_has_its_own_flags() {
    let environment = [("FLANNELD_SUBNET_FILE", "/tmp/a")];
    for (args, dry_run, file) in [
        (&["cleanup"][..], false, "/tmp/a"),
        (&["cleanup", "--dry-run"], true, "/tmp/a"),
        (&["cleanup", "-dry-run=f", "-subnet-file", "/tmp/b"], false, "/tmp/b"),
    ] {
        let Command::Cleanup(options) = parse(args, &environment).unwrap() else { panic!("{args:?}") };
        assert_eq!((options.dry_run, options.subnet_file.to_str()), (dry_run, Some(file)));
        assert!(options.named && !options.all);
        assert_eq!(options.verbosity, crate::log::Verbosity::new(0));
    }
    let text = parse(&["cleanup", "--iface=eth0"], &[]).unwrap_err().to_string();
    assert!(text.contains("--iface is not a flag of flanneld cleanup"), "{text}");
    let text = parse(&["-v=1", "cleanup"], &[]).unwrap_err().to_string();
    assert!(text.contains("first"), "{text}");
}

#[test]
fn the_last_value_counts_and_an_empty_one_unsets_what_has_no_default() {
    let read =
        options(&["--public-ip=x", "--public-ip=192.0.2.1", "--etcd-cafile=/a", "--etcd-cafile="], &[]);
    assert_eq!(read.selectors.public.to_string(), "192.0.2.1");
    let options::StoreOptions::Etcd(etcd) = read.store else { panic!() };
    assert_eq!(etcd.ca, None);
    let error = parse(&["--public-ip=192.0.2.1", "--public-ip=x"], &[]).unwrap_err().to_string();
    assert!(error.starts_with("--public-ip=\"x\" is not an IP address"), "{error}");
    assert!(parse(&["--subnet-file="], &[]).is_err());
}

#[test]
fn arguments_stand_before_and_after_flags_and_behind_two_dashes() {
    for args in [
        &["policy", "list", "a/b", "--subnet-file=/f"][..],
        &["policy", "--subnet-file", "/f", "list", "--", "a/b"],
    ] {
        let Command::Policy(question) = parse(args, &[]).unwrap() else { panic!("{args:?}") };
        assert_eq!(question.query, policy::Query::List(Some("a/b".into())));
        assert_eq!(question.subnet_file.to_str(), Some("/f"));
    }
    let error = parse(&["polcy", "list"], &[]).unwrap_err().to_string();
    assert!(error.contains("did you mean flanneld policy?"), "{error}");
}

#[test]
fn only_flags_of_the_agent_have_variables() {
    let environment = [("FLANNELD_PROTOCOL", "UDP"), ("FLANNELD_ALL", "true"), ("FLANNELD_V", "2")];
    assert!(parse(&["policy", "list"], &environment).is_ok());
    let Command::Cleanup(options) = parse(&["cleanup"], &environment).unwrap() else { panic!() };
    assert!(!options.all && options.verbosity == crate::log::Verbosity::new(2));
}

#[test]
fn the_log_shows_every_flag_that_has_an_effect() {
    let shown = options(&["--ip-masq-fully-random-disable", "--vmodule=a=1"], &[]).to_string();
    assert!(shown.starts_with("--subnet-lease-renew-margin=60 --etcd-endpoints=http"), "{shown}");
    assert!(shown.contains(" --ip-masq-fully-random-disable=true"), "{shown}");
    for absent in ["vmodule", "version", "lease-store", "kube-", "network-policy", "public-ip", "password"] {
        assert!(!shown.contains(absent), "{absent} in {shown}");
    }
}

#[test]
fn arguments_and_variables_that_are_not_utf8_are_refused() {
    use std::os::unix::ffi::OsStringExt;
    let broken = || OsString::from_vec(b"--iface=eth\xff".to_vec());
    let error = super::parse([broken()], |_| None).unwrap_err().to_string();
    assert!(error.contains("UTF-8"), "{error}");
    let error = super::parse([], |name| (name == "FLANNELD_IFACE").then(broken)).unwrap_err().to_string();
    assert!(error.contains("FLANNELD_IFACE") && error.contains("UTF-8"), "{error}");
}

/// What `deploy` ships as `/etc/default/flanneld`, also the settings that are comments there.
#[test]
fn settings_files_that_are_shipped_can_be_used() {
    let deploy = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    for file in
        ["package/flanneld.default", "examples/etcd/flanneld.default", "examples/files/flanneld.default"]
    {
        let text = std::fs::read_to_string(deploy.join(file)).unwrap();
        let setting =
            |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let set: Vec<_> =
            text.lines().filter(|line| line.starts_with("FLANNELD_")).filter_map(setting).collect();
        let offered = text.lines().filter_map(|line| line.strip_prefix("#FLANNELD_")?.split_once('='));
        let offered = offered.map(|(name, value)| vec![(format!("FLANNELD_{name}"), value.to_owned())]);
        assert!(!set.is_empty(), "{file}");
        for settings in offered.chain([set]) {
            let read = super::parse([], |name| {
                settings.iter().find(|(key, _)| key == name).map(|(_, value)| OsString::from(value))
            });
            assert!(matches!(read, Ok(Command::Run(_))), "{file}: {settings:?}: {}", read.err().unwrap());
            let shape = RunFlags::command();
            let known = |name: &str| {
                shape
                    .get_arguments()
                    .any(|flag| flag.get_long().is_some_and(|flag| grammar::variable(flag) == *name))
            };
            assert!(
                settings.iter().all(|(name, _)| known(name)),
                "{file}: {settings:?} has a variable of no flag"
            );
        }
    }
}
