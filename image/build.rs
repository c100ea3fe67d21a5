//! Builds the agent that goes into images: a static program for the guest, by a cargo of its own, because it is linked in another
//! way than the rest.

use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let root = Path::new("..");
    for path in ["guest", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    let out: PathBuf = std::env::var_os("OUT_DIR").expect("cargo sets it").into();
    let cargo = std::env::var_os("CARGO").expect("cargo sets it");
    let mut build = Command::new(cargo);
    // What was meant for the host's programs is not for this one.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PROFILE_")
            || name.starts_with("CARGO_CFG_")
            || name.contains("RUSTFLAGS")
        {
            build.env_remove(&*name);
        }
    }
    let status = build
        .args([
            "build",
            "--quiet",
            "--locked",
            "--package",
            "lodger-agent",
            "--profile",
            "agent",
        ])
        .args(["--target", TARGET])
        .arg("--manifest-path")
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(out.join("agent"))
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static",
        )
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status();
    let status = status.unwrap_or_else(|error| panic!("cargo does not run: {error}"));
    assert!(
        status.success(),
        "the agent for guests cannot be built: it needs the C library for static programs (Debian: libc6-dev, of build-essential)"
    );
    let built = out.join("agent").join(TARGET).join("agent/lodger-agent");
    println!("cargo::rustc-env=LODGER_AGENT={}", built.display());
}
