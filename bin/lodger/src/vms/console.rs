//! `lodger console`: this terminal as one of those at a guest's console.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use lodger_char::{Escape, Input, Notice, Output};
use lodger_clock::InputPort;
use lodger_control::Request;
use lodger_store::{Store, Vm};

use super::{connect, dial, refused};
use crate::cli::ConsoleArgs;
use crate::messages;
use crate::monitor::terminal::{catch_signals, raw_mode};
use crate::status::{self, Error, host_error};

/// What is typed, on its way to the monitor.
struct Typed(UnixStream);

impl InputPort for Typed {
    fn offer(&self, data: &[u8]) -> usize {
        let mut stream = &self.0;
        // A monitor that has gone ends the reading side, too.
        let _ = stream.write_all(data);
        data.len()
    }
}

/// How the user left; what is never a status.
const NOT_LEFT: u8 = u8::MAX;

/// Tells the guest how large this terminal is, if its console carries that: a serial line does not.
fn tell_size(vm: &Vm, columns: u16, rows: u16) {
    let request = Request::Resize { columns, rows };
    let told = dial(vm).and_then(|mut client| client.ask(&request));
    if let Err(error) = told {
        tracing::debug!("{error}");
    }
}

/// Shows the console until the user leaves or the machine ends.
pub fn console(args: &ConsoleArgs, quiet: bool) -> Result<ExitCode, Error> {
    let store = Store::open()?;
    let (vm, client) = connect(&store, &args.vm)?;
    let console = client.console();
    let mut console = console.map_err(|error| refused(&vm.name, error))?;
    let caught = catch_signals()?;
    let interactive = lodger_char::is_interactive();
    let output = Output::stdout().map_err(host_error("cannot use standard output"))?;
    let output = Arc::new(output);
    if interactive && !quiet {
        let name = &vm.name;
        messages::say(format_args!(
            "connected to {name}; Ctrl-A d leaves, Ctrl-A h helps"
        ));
    }
    let raw = raw_mode(interactive)?;
    let left = Arc::new(AtomicU8::new(NOT_LEFT));
    let clone = || {
        console
            .writer
            .try_clone()
            .map_err(host_error("cannot use the connection"))
    };
    let leave = {
        let (left, output, stream) = (Arc::clone(&left), Arc::clone(&output), clone()?);
        move |status| {
            left.store(status, Ordering::SeqCst);
            output.close();
            // Ends the reading below; fails only if it has ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    };
    if let Some((columns, rows)) = lodger_char::window_size().filter(|_| interactive) {
        tell_size(&vm, columns, rows);
    }
    let resized = vm.clone();
    let notice = move |notice| match notice {
        Notice::Help => messages::say(Escape::HELP_ATTACHED),
        Notice::Quit => leave(status::POWERED_OFF),
        Notice::Signal(number) => leave(status::signal(number)),
        Notice::Resized { columns, rows } => tell_size(&resized, columns, rows),
    };
    let escape = interactive.then(Escape::attached);
    let input = Input::start(Arc::new(Typed(clone()?)), caught, escape, notice);
    let input = input.map_err(host_error("cannot read standard input"))?;
    show(&mut console.reader, &output, interactive);
    drop(input);
    drop(raw);
    messages::end_line();
    let left = left.load(Ordering::SeqCst);
    if !quiet && interactive {
        messages::say(match left {
            NOT_LEFT => format!("{}: the console has ended with the machine", vm.name),
            _ => format!("left {}; it runs on", vm.name),
        });
    }
    Ok(match left {
        NOT_LEFT => ExitCode::SUCCESS,
        status => ExitCode::from(status),
    })
}

/// Shows what the guest prints until the connection ends.
fn show(from: &mut impl Read, output: &Output, interactive: bool) {
    let mut bytes = [0; 4096];
    loop {
        match from.read(&mut bytes) {
            Ok(n @ 1..) => {
                output.write(&bytes[..n]);
                if interactive {
                    messages::guest_wrote(&bytes[..n]);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}
