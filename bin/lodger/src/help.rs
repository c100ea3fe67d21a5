//! What is made from the description of the command line: shell completions and manual pages.

use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::{Cli, ManArgs};
use crate::messages;
use crate::status::Error;

/// `lodger completions`.
pub fn completions(shell: Shell) -> Result<ExitCode, Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "lodger", &mut script);
    messages::answer(String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// `lodger man`.
pub fn man(args: &ManArgs) -> Result<ExitCode, Error> {
    match &args.dir {
        Some(dir) => write_all(dir)?,
        None => print(&args.command)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn write_all(dir: &Path) -> Result<(), Error> {
    let written =
        std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir));
    written.map_err(|error| Error::File {
        path: dir.into(),
        what: error.to_string(),
    })
}

fn print(names: &[String]) -> Result<(), Error> {
    let mut command = Cli::command();
    command.build();
    let mut command = &command;
    for name in names {
        command = command.find_subcommand(name).ok_or_else(|| {
            Error::Usage(format!(
                "there is no command {name}; `lodger help` lists them"
            ))
        })?;
    }
    let mut page = Vec::new();
    let rendered = Man::new(command.clone()).render(&mut page);
    rendered.map_err(|source| Error::Host {
        what: "cannot make the page",
        source,
    })?;
    messages::answer(String::from_utf8_lossy(&page))
}
