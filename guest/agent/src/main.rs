//! Lodger's agent in a guest: what `lodger exec`, `cp` and `ssh` talk to. It runs as root, listens on the guest's stream sockets
//! (AF_VSOCK), and serves nobody but the host.
//!
//! | file | what |
//! |---|---|
//! | `vsock.rs` | the sockets |
//! | `serve.rs` | a connection: one request |
//! | `exec.rs`, `terminal.rs` | a command, and its terminal |
//! | `users.rs` | who runs it |
//! | `keys.rs` | keys for SSH |
//!
//! A static program without a configuration: it works in any guest whose kernel has a driver for virtio sockets and whose user
//! space need have nothing at all. Each connection has a thread.

// UNSAFETY: socket addresses of AF_VSOCK as the kernel has them; what a child process does before it becomes the command.
#![allow(unsafe_code)]

mod exec;
mod keys;
mod serve;
mod terminal;
mod users;
mod vsock;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use lodger_guest_protocol::PORT;

/// Connections at once, as many as there are usually descriptors for; more are closed.
const CONNECTIONS: usize = 100;
/// Bytes of a thread's stack.
const STACK: usize = 256 << 10;
/// How often the driver is looked for that may be about to be loaded, and how long.
const TRIES: u32 = 150;
const PAUSE: Duration = Duration::from_millis(200);

/// How it is used where a program of the guest's is not to be found at its root, as in images of registries.
const USAGE: &str =
    "usage: lodger-agent [--root DIR] [--environment] [--workdir DIR] [--user USER[:GROUP]]";

/// Takes what the command line says: where the commands' root is, and what they have unless the host says otherwise: the agent's
/// environment, a directory, a user.
fn settle(arguments: &[OsString]) -> Result<(), String> {
    let mut defaults = exec::Defaults::default();
    let mut root = None;
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().cloned().ok_or(USAGE);
        match argument.to_str() {
            Some("--root") => root = Some(value()?),
            Some("--environment") => defaults.environment = std::env::vars_os().collect(),
            Some("--workdir") => defaults.directory = Some(value()?.into()),
            Some("--user") => {
                let user = value()?.into_string().map_err(|_| USAGE)?;
                defaults.user = Some(user);
            }
            _ => return Err(USAGE.into()),
        }
    }
    if let Some(root) = root {
        let cannot = |error| format!("{}: {error}", root.display());
        rustix::process::chroot(&root).map_err(cannot)?;
        rustix::process::chdir("/").map_err(cannot)?;
    }
    exec::set_defaults(defaults);
    Ok(())
}

fn main() -> ExitCode {
    if std::env::args_os().any(|argument| argument == "--version") {
        println!("lodger-agent {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Err(text) = settle(&arguments) {
        eprintln!("lodger-agent: {text}");
        return ExitCode::FAILURE;
    }
    let mut tries = 0;
    let listener = loop {
        match vsock::listen(PORT) {
            Ok(listener) => break listener,
            Err(error) if tries == TRIES => {
                eprintln!("lodger-agent: cannot listen for the host: {error}");
                return ExitCode::FAILURE;
            }
            Err(_) => tries += 1,
        }
        std::thread::sleep(PAUSE);
    };
    let connections = std::sync::Arc::new(());
    loop {
        let connection = match vsock::accept(&listener) {
            Ok(Some(connection)) if std::sync::Arc::strong_count(&connections) <= CONNECTIONS => {
                connection
            }
            // Somebody else than the host, or too many: it is closed.
            Ok(_) => continue,
            // No descriptors left, for example.
            Err(_) => {
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        let counted = std::sync::Arc::clone(&connections);
        let thread = std::thread::Builder::new().stack_size(STACK);
        // Without a thread the connection is closed.
        let _ = thread.spawn(move || {
            let _counted = counted;
            serve::serve(connection);
        });
    }
}
