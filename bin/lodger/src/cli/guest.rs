//! The arguments of the commands that do something inside of a guest.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

/// `lodger exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  that of the command; 128+n if signal n has ended it; 127 if the guest has no such program, 126 if
  it cannot be run; 1 if Lodger failed, 2 for wrong arguments

Signals to lodger exec go to the command; the third one ends lodger exec, too.

Examples:
  lodger exec -it web sh
  lodger exec web systemctl status ssh
  lodger exec -u alice -w /srv -e DEBUG=1 web make
  tar c . | lodger exec -i web tar x -C /srv")]
pub struct ExecArgs {
    /// Pass standard input on to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set a variable of the command's environment; without VALUE to what it is here (repeatable)
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<OsString>,
    /// The directory in which it starts [default: the user's home]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// Who runs it, by name or number [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Name, or beginning of an id
    #[arg(value_name = "VM")]
    pub vm: String,
    /// The command and its arguments
    #[arg(
        value_name = "COMMAND",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<OsString>,
}

/// `lodger cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
As cp -r: into a directory that exists, else under the new name; DIR/. stands for what is in DIR. Files
keep permissions and times; in the guest they are root's, here yours. Paths of the guest begin at its
root. Sockets, devices and named pipes are left out.

Examples:
  lodger cp site web:/srv
  lodger cp web:/var/log/syslog .
  lodger cp web:/etc - | tar t
  git archive HEAD | lodger cp - web:/srv")]
pub struct CopyArgs {
    /// Copy what SOURCE, a symbolic link, leads to
    #[arg(short = 'L', long = "follow-link")]
    pub follow: bool,
    /// A file or directory, VM:PATH for one in a guest, or `-`: a tar stream from standard input
    #[arg(value_name = "SOURCE")]
    pub source: OsString,
    /// Where to, VM:PATH or PATH, or `-`: a tar stream to standard output
    #[arg(value_name = "TARGET")]
    pub target: OsString,
}

/// `lodger ssh`.
#[derive(Debug, Args)]
#[command(after_help = "\
It runs the ssh of this host. The connection goes through the agent in the guest, so no port need be
published; a key of Lodger's own (in ~/.local/share/lodger/ssh) is let in by the agent.

Examples:
  lodger ssh web
  lodger ssh alice@web -L 8080:localhost:80
  lodger ssh web uptime")]
pub struct SshArgs {
    /// Name, or beginning of an id; without USER, root logs in
    #[arg(value_name = "[USER@]VM")]
    pub vm: String,
    /// Options of ssh, and a command
    #[arg(
        value_name = "ARGUMENT",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub arguments: Vec<OsString>,
}
