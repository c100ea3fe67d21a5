//! `lodger`: the command line, and the process that runs a virtual machine.
//!
//! | file | what |
//! |---|---|
//! | `cli.rs` | the arguments and their help |
//! | `registry.rs` | everything that is linked in; the choice of an engine |
//! | `run.rs`, `spec.rs` | `lodger run`; what a VM is started from |
//! | `monitor/` | the process that runs a VM |
//! | `vms/` | the commands about VMs that have a name |
//! | `guest/` | the commands that do something inside of a guest |
//! | `images.rs` | `lodger image` |
//! | `disk.rs` | `lodger disk` |
//! | `doctor.rs` | `lodger doctor` |
//! | `help.rs` | shell completions and manual pages |
//! | `host.rs` | what the host has left |
//! | `status.rs` | exit statuses |
//! | `messages.rs` | what goes to standard error, and how |

mod cli;
mod disk;
mod doctor;
mod guest;
mod help;
mod host;
mod images;
mod messages;
mod monitor;
mod registry;
mod run;
mod spec;
mod status;
mod vms;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    messages::start(cli.verbose, cli.quiet);
    let result = match cli.command {
        Command::Run(args) => run::run(&args, cli.verbose, cli.quiet),
        Command::Ps(args) => vms::ps(&args, cli.quiet),
        Command::Start(args) => vms::start(&args, cli.verbose, cli.quiet),
        Command::Stop(args) => vms::stop(&args, cli.quiet),
        Command::Restart(args) => vms::restart(&args, cli.verbose, cli.quiet),
        Command::Kill(vms) => vms::kill(&vms),
        Command::Pause(vms) => vms::pause(&vms, true),
        Command::Unpause(vms) => vms::pause(&vms, false),
        Command::Rename { vm, name } => vms::rename(&vm, &name),
        Command::Set(args) => vms::set(&args),
        Command::Rm(args) => vms::remove(&args),
        Command::Wait(vms) => vms::wait(&vms),
        Command::Logs(args) => vms::logs(&args),
        Command::Console(args) => vms::console(&args, cli.quiet),
        Command::Exec(args) => guest::exec(&args, cli.quiet),
        Command::Cp(args) => guest::copy(&args, cli.quiet),
        Command::Ssh(args) => guest::ssh(&args, cli.quiet),
        Command::SshProxy { vm } => guest::proxy(&vm),
        Command::Agent { file } => guest::write_agent(file.as_deref()),
        Command::Inspect(vms) => vms::inspect(&vms),
        Command::Up(args) => vms::up(&args, cli.verbose, cli.quiet),
        Command::Down(args) => vms::down(&args, cli.quiet),
        Command::Completions { shell } => help::completions(shell),
        Command::Man(args) => help::man(&args),
        Command::Monitor { dir } => monitor::serve(&dir),
        Command::Image(command) => images::serve(&command, cli.quiet),
        Command::Disk(command) => disk::serve(&command, cli.quiet),
        Command::Doctor => doctor::examine(),
    };
    result.unwrap_or_else(|error| {
        messages::error(&error);
        ExitCode::from(error.status())
    })
}
