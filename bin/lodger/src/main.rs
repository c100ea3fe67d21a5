//! `lodger`: the command line, and the process that runs a virtual machine.
//!
//! | file | what |
//! |---|---|
//! | `cli.rs` | the arguments and their help |
//! | `registry.rs` | everything that is linked in; the choice of an engine |
//! | `run.rs` | `lodger run` |
//! | `images.rs` | `lodger image` |
//! | `disk.rs` | `lodger disk` |
//! | `doctor.rs` | `lodger doctor` |
//! | `host.rs` | what the host has left |
//! | `status.rs` | exit statuses |
//! | `messages.rs` | what goes to standard error, and how |

mod cli;
mod disk;
mod doctor;
mod host;
mod images;
mod messages;
mod registry;
mod run;
mod status;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    messages::start(cli.verbose, cli.quiet);
    let result = match cli.command {
        Command::Run(args) => run::run(&args, cli.quiet),
        Command::Image(command) => images::serve(&command, cli.quiet),
        Command::Disk(command) => disk::serve(&command, cli.quiet),
        Command::Doctor => doctor::examine(),
    };
    result.unwrap_or_else(|error| {
        messages::error(&error);
        ExitCode::from(error.status())
    })
}
