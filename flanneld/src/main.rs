//! The node agent: leases a subnet, and keeps the kernel in the state that all leases ask for.

#![cfg_attr(not(test), expect(dead_code, reason = "the agent that takes the options is not wired yet"))]

mod cli;
mod interface;
mod log;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1), |name| std::env::var_os(name)) {
        Ok(cli::Command::Print(print)) => print.print().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS),
        Ok(cli::Command::Run(options)) => {
            log::start(options.verbosity);
            options.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            tracing::error!(%options, "the agent is not wired yet");
            ExitCode::FAILURE
        }
        Ok(cli::Command::Cleanup(options)) => {
            log::start(options.verbosity);
            tracing::error!(?options, "cleanup is not wired yet");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("flanneld: {error}");
            ExitCode::from(cli::UsageError::EXIT_CODE)
        }
    }
}
