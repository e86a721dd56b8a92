//! How the shipped programs are linked: without what a program that aborts on panic never reads.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

/// A release build ends with the panic message (`panic = "abort"`), so tables for unwinding are 0.8 MB of flanneld that
/// are only carried along. `/DISCARD/` because the tables of the standard library come compiled.
const WITHOUT_UNWINDING: &str = "SECTIONS { /DISCARD/ : { *(.eh_frame) } } INSERT AFTER .text;\n";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).unwrap_or_default();
    // The profile `release` aborts; CARGO_CFG_PANIC tells the target's default instead.
    if variable("PROFILE") != "release" || variable("CARGO_CFG_TARGET_ENV") != "gnu" {
        return;
    }
    let script = PathBuf::from(variable("OUT_DIR")).join("without-unwinding.ld");
    fs::write(&script, WITHOUT_UNWINDING).unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    // One bit for each pointer that is relocated at the start instead of 24 bytes (DT_RELR). The start-up code of glibc
    // reads them since 2.36; a linker that doesn't know them ignores the option.
    if glibc() >= (2, 36) {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

/// The version of the C library that is linked in, which is this machine's; 0.0 where it can't be told.
fn glibc() -> (u32, u32) {
    let told = Command::new("getconf").arg("GNU_LIBC_VERSION").output().map(|output| output.stdout);
    let told = String::from_utf8(told.unwrap_or_default()).unwrap_or_default();
    let mut numbers =
        told.trim().trim_start_matches("glibc ").split('.').map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
