//! Scripts that complete command lines in bash, zsh and fish.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::reference::{Flag, Topic, Values};
use crate::cli::Words;

/// How bash takes a line apart (at `=` too, unless COMP_WORDBREAKS says otherwise), after the tables of this program.
const BASH_BODY: &str = r#"
    if [[ $cur == = ]]; then
        flag=$before cur=
    elif [[ $before == = ]]; then
        flag=${COMP_WORDS[COMP_CWORD-2]}
    elif [[ $cur == -*=* ]]; then
        flag=${cur%%=*} cur=${cur#*=}
        prefix=$flag=
    elif [[ $before == -* && $cur != -* ]]; then
        flag=$before
        [[ " $booleans " == *" ${flag##*(-)} "* ]] && flag=
    fi
    flag=${flag##*(-)}
    case $flag in
"#;

/// How bash gives its answers.
const BASH_END: &str = r#"
    case $kind in
        files) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null ;;
        directories) mapfile -t COMPREPLY < <(compgen -d -- "$cur"); compopt -o filenames 2>/dev/null ;;
        *) mapfile -t COMPREPLY < <(compgen -W "$list" -- "$cur") ;;
    esac
    [[ ${COMPREPLY-} == *[=:] ]] && compopt -o nospace 2>/dev/null
    [[ -n $prefix ]] && COMPREPLY=("${COMPREPLY[@]/#/$prefix}")
    return 0
}
complete -F _flanneld flanneld
"#;

/// The script for bash.
pub(super) fn bash(topics: &[Topic]) -> String {
    let mut script = head("");
    script.push_str(
        "shopt -s extglob\n_flanneld() {\n    local cur=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} \
         command=${COMP_WORDS[1]}\n    local prefix= flag= flags= words= kind= list= booleans=\n    COMPREPLY=()\n    \
         ((COMP_CWORD > 1)) || command=\n    case $command in\n",
    );
    for topic in topics.iter().skip(1) {
        let (kind, words) = match topic.words {
            Words::None => ("none", String::new()),
            Words::Files => ("files", String::new()),
            Words::Directories => ("directories", String::new()),
            Words::OneOf(words) => ("", words.join(" ")),
        };
        let (name, flags) = (topic.name, bash_flags(topic));
        let _ = writeln!(script, "        {name}) kind={kind} words='{words}' flags='{flags}' ;;");
    }
    let names = commands(topics).collect::<Vec<_>>().join(" ");
    let _ = writeln!(script, "        help) words='{names}' ;;");
    let _ = writeln!(
        script,
        "        *) flags='{}'; ((COMP_CWORD > 1)) || words='{names} help' ;;\n    esac",
        bash_flags(&topics[0])
    );
    let flags = by_name(topics);
    let booleans =
        flags.iter().filter(|(_, values)| matches!(values, Values::Boolean { .. })).map(|(name, _)| *name);
    let _ = write!(script, "    booleans='{}'", booleans.collect::<Vec<_>>().join(" "));
    script.push_str(BASH_BODY);
    script.push_str("        '') [[ $cur == -* ]] && kind= list=$flags || list=$words ;;\n");
    for (name, values) in &flags {
        let answer = match values {
            Values::Boolean { .. } => "kind= list='true false'".to_owned(),
            Values::OneOf(choices) => format!("kind= list='{}'", choices.join(" ")),
            Values::Files => "kind=files".to_owned(),
            Values::Directories => "kind=directories".to_owned(),
            Values::Any => "kind=none".to_owned(),
        };
        let _ = writeln!(script, "        {name}) {answer} ;;");
    }
    script + "        *) kind=none ;;\n    esac" + BASH_END
}

fn bash_flags(topic: &Topic) -> String {
    let word = |flag: Flag<'_>| {
        let assigned = if flag.values() == (Values::Boolean { default: false }) { "" } else { "=" };
        format!("--{}{assigned}", flag.name)
    };
    topic.flags().map(word).chain(["--help".to_owned()]).collect::<Vec<_>>().join(" ")
}

/// The script for zsh.
pub(super) fn zsh(topics: &[Topic]) -> String {
    let mut script = head("#compdef flanneld\n");
    script.push_str("_flanneld() {\n    local -a commands\n    commands=(\n");
    for topic in topics.iter().skip(1) {
        let _ = writeln!(script, "        {}", quoted(&format!("{}:{}", topic.name, topic.summary)));
    }
    script.push_str(
        "        'help:say how a command is used'\n    )\n    if (( CURRENT == 2 )) && [[ $words[2] != -* ]]; then\n        \
         _describe -t commands command commands\n        return\n    fi\n    case $words[2] in\n",
    );
    for topic in topics.iter().skip(1) {
        let _ = writeln!(
            script,
            "        {})\n            shift words; (( CURRENT-- ))\n            _arguments \\",
            topic.name
        );
        topic.flags().for_each(|flag| zsh_flag(&mut script, &flag));
        let words = match topic.words {
            Words::None => "",
            Words::Files => " '1:file:_files'",
            Words::Directories => " '1:directory:_files -/'",
            Words::OneOf(words) => &format!(" '1:word:({})'", words.join(" ")),
        };
        let _ = writeln!(script, "                '--help[Print help]'{words} ;;");
    }
    script.push_str("        help) (( CURRENT == 3 )) && _describe -t commands command commands ;;\n        *)\n            _arguments \\\n");
    topics[0].flags().for_each(|flag| zsh_flag(&mut script, &flag));
    script
        + "                '--help[Print help]' ;;\n    esac\n}\nif [[ $funcstack[1] == _flanneld ]]; then\n    _flanneld \"$@\"\n\
           else\n    compdef _flanneld flanneld\nfi\n"
}

fn zsh_flag(script: &mut String, flag: &Flag<'_>) {
    let help = flag.help().replace('\\', "\\\\").replace('[', "\\[").replace(']', "\\]");
    let name = flag.name;
    let value = flag.value_name().replace(':', "\\:");
    let repeated = if matches!(flag.argument.get_action(), clap::ArgAction::Append) { "*" } else { "" };
    let spec = match flag.values() {
        Values::Boolean { default: false } => format!("--{name}[{help}]"),
        Values::Boolean { default: true } => format!("--{name}=-[{help}]:{value}:(true false)"),
        Values::OneOf(choices) => {
            let choices = choices.join(" ").replace(':', "\\:");
            format!("--{name}=[{help}]:{value}:({choices})")
        }
        Values::Files => format!("--{name}=[{help}]:{value}:_files"),
        Values::Directories => format!("--{name}=[{help}]:{value}:_files -/"),
        Values::Any => format!("{repeated}--{name}=[{help}]:{value}: "),
    };
    let _ = writeln!(script, "                {} \\", quoted(&spec));
}

/// The script for fish.
pub(super) fn fish(topics: &[Topic]) -> String {
    let mut script = head("");
    let names = commands(topics).collect::<Vec<_>>().join(" ");
    let _ = write!(
        script,
        "function __flanneld_is\n    set -l words (commandline -opc)\n    test (count $words) -gt 1; and test \"$words[2]\" = \
         \"$argv[1]\"\nend\nfunction __flanneld_is_agent\n    set -l words (commandline -opc)\n    test (count $words) -lt 2; \
         or not contains -- \"$words[2]\" {names} help\nend\nfunction __flanneld_is_first\n    test (count (commandline -opc)) -eq 1\n\
         end\ncomplete -c flanneld -f\ncomplete -c flanneld -l help -d 'Print help'\n"
    );
    for topic in topics.iter().skip(1) {
        let summary = fish_quoted(topic.summary);
        let _ =
            writeln!(script, "complete -c flanneld -n __flanneld_is_first -a {} -d {summary}", topic.name);
    }
    script.push_str("complete -c flanneld -n __flanneld_is_first -a help -d 'say how a command is used'\n");
    let _ = writeln!(script, "complete -c flanneld -n '__flanneld_is help' -a '{names}'");
    for topic in topics {
        let condition = match topic.name {
            "" => "__flanneld_is_agent".to_owned(),
            name => format!("'__flanneld_is {name}'"),
        };
        for flag in topic.flags() {
            let value = match flag.values() {
                Values::Boolean { default: false } => String::new(),
                Values::Boolean { default: true } => " -x -a 'true false'".to_owned(),
                Values::OneOf(choices) => format!(" -x -a '{}'", choices.join(" ")),
                Values::Files => " -r -F".to_owned(),
                Values::Directories => " -x -a '(__fish_complete_directories)'".to_owned(),
                Values::Any => " -x".to_owned(),
            };
            let help = fish_quoted(&flag.help());
            let _ = writeln!(script, "complete -c flanneld -n {condition} -l {}{value} -d {help}", flag.name);
        }
        let words = match topic.words {
            Words::None => continue,
            Words::Files => "-F".to_owned(),
            Words::Directories => "-a '(__fish_complete_directories)'".to_owned(),
            Words::OneOf(words) => format!("-a '{}'", words.join(" ")),
        };
        let _ = writeln!(script, "complete -c flanneld -n {condition} {words}");
    }
    script
}

/// Every flag of any command, once.
fn by_name(topics: &[Topic]) -> BTreeMap<&str, Values> {
    topics.iter().flat_map(Topic::flags).map(|flag| (flag.name, flag.values())).collect()
}

fn commands(topics: &[Topic]) -> impl Iterator<Item = &'static str> {
    topics.iter().skip(1).map(|topic| topic.name)
}

fn head(first: &str) -> String {
    format!("{first}# Generated by flanneld v{}: flanneld completions\n", crate::version::VERSION)
}

/// As one word of zsh.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn fish_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}
