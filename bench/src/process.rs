//! What the kernel says of processes (time on a CPU, memory, fields of `/proc/PID/stat`) and of devices.

use std::fmt::Display;
use std::fs;
use std::time::Duration;

use anyhow::Context;
use backends::testing::Namespace;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// User and system time of all threads of a process, those that have ended included: what `/proc/PID/stat`
/// has as `utime` and `stime`, but not cut to 10 ms each.
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.try_into()?)).and_then(clock_gettime);
    clock.map(Duration::from).with_context(|| format!("no CPU clock of process {pid}"))
}

/// User and system time of all children of this process that were waited for.
pub fn cpu_time_of_children() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("no CPU time of children")?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros.try_into()?))
}

/// Resident memory in MiB.
pub fn resident_mib(pid: u32) -> anyhow::Result<f64> {
    memory_mib(pid, "VmRSS")
}

/// A line of `/proc/PID/status`, such as `VmRSS` or `VmHWM`, in MiB.
pub fn memory_mib(pid: impl Display, name: &str) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    let kib = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.strip_suffix(" kB"));
    let kib = kib.and_then(|kib| kib.trim().parse::<f64>().ok());
    Ok(kib.with_context(|| format!("no {name} in {path}"))? / 1024.0)
}

/// A field of `/proc/PID/stat` by its number in proc(5), from 3 on.
pub fn stat(pid: impl Display, number: usize) -> anyhow::Result<i64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    // Field 2, the name, is in parentheses and may contain anything.
    let field = text.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(number - 3));
    field
        .and_then(|field| field.parse().ok())
        .with_context(|| format!("{path} has no field {number}: {text}"))
}

/// What a device counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Bytes that it received, headers included.
    pub received_bytes: u64,
    /// Packets that it received.
    pub received_packets: u64,
    /// Bytes that it sent.
    pub sent_bytes: u64,
}

/// The counters of a device in a namespace.
pub fn counters(namespace: &Namespace, device: &str) -> anyhow::Result<DeviceCounters> {
    let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/dev"));
    let text = text.context("can't read /proc/net/dev")?;
    parse(&text, device).with_context(|| format!("no counters of {device}"))
}

fn parse(text: &str, device: &str) -> Option<DeviceCounters> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [received_bytes, received_packets, .., sent_bytes, _, _, _, _, _, _, _] = fields[..] else {
        return None;
    };
    Some(DeviceCounters { received_bytes, received_packets, sent_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_threads_that_have_ended_counts() {
        let own = std::process::id();
        let before = cpu_time(own).unwrap();
        let busy =
            std::thread::spawn(move || while cpu_time(own).unwrap() < before + Duration::from_millis(20) {});
        busy.join().unwrap();
        assert!(cpu_time(own).unwrap() >= before + Duration::from_millis(20));
    }

    #[test]
    fn a_process_has_memory_and_one_that_is_not_there_an_error_with_its_number() {
        assert!(resident_mib(std::process::id()).unwrap() > 0.0);
        assert!(resident_mib(u32::MAX).unwrap_err().to_string().contains("/proc/4294967295/status"));
    }

    #[test]
    fn counters_are_those_of_the_device_of_that_very_name() {
        let text = "Inter-|   Receive          |  Transmit\n\
            flannel.10: 9 9 9 0 0 0 0 0 9 9 0 0 0 0 0 0\n\
             flannel.1: 1000 10 0 0 0 0 0 0 2000 20 0 0 0 0 0 0\n";
        let expected = DeviceCounters { received_bytes: 1000, received_packets: 10, sent_bytes: 2000 };
        assert_eq!(parse(text, "flannel.1"), Some(expected));
        assert_eq!(parse(text, "flannel"), None);
    }
}
