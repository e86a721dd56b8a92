//! What the kernel says of a process: time on a CPU, memory.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// User and system time of all threads of a process, those that have ended included: what `/proc/PID/stat`
/// has as `utime` and `stime`, but not cut to 10 ms each.
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.try_into()?)).and_then(clock_gettime);
    clock.map(Duration::from).with_context(|| format!("no CPU clock of process {pid}"))
}

/// Resident memory in MiB (`VmRSS`).
pub fn resident_mib(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    let kib = text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let kib = kib.and_then(|kib| kib.trim().parse::<f64>().ok());
    Ok(kib.with_context(|| format!("no VmRSS in {path}"))? / 1024.0)
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
}
