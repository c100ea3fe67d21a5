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

fn main() -> ExitCode {
    if std::env::args_os().any(|argument| argument == "--version") {
        println!("lodger-agent {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
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
