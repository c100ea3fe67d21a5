//! `lodger ssh`: the user's own ssh, through the agent to the SSH server of a guest, with a key of Lodger's that the agent lets in.
//!
//! The way there is a Unix socket of the user's, so there is nobody in the middle whom a host key would keep out.

use std::fs::DirBuilder;
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use lodger_guest_protocol::{FromGuest, Request, ToGuest, write, write_data};

use super::Guest;
use crate::cli::SshArgs;
use crate::status::{Error, host_error};

/// Where SSH servers listen.
const PORT: u16 = 22;
/// Bytes that are read at a time.
const CHUNK: usize = 32 << 10;

/// Becomes ssh.
pub fn ssh(args: &SshArgs, quiet: bool) -> Result<ExitCode, Error> {
    let (user, vm) = match args.vm.split_once('@') {
        Some((user, vm)) => (user, vm),
        None => ("root", &args.vm[..]),
    };
    let guest = Guest::find(vm, quiet)?;
    let key = key()?;
    let public = key.with_extension("pub");
    let line = std::fs::read_to_string(&public).map_err(|error| Error::File {
        path: public,
        what: error.to_string(),
    })?;
    guest.ask(Request::AuthorizeKey {
        user: user.into(),
        key: line.trim().into(),
    })?;
    // Before ssh says it in its own way.
    guest
        .ask(Request::Dial { port: PORT })
        .map_err(|error| match error {
            Error::Named { name, what } => Error::Named {
                what: format!(
                    "no SSH server answers in its guest ({what}); `lodger exec -it {name} sh` needs none"
                ),
                name,
            },
            other => other,
        })?;
    let proxy = format!(
        "ProxyCommand={} ssh-proxy {}",
        quoted(&crate::monitor::executable()),
        guest.name
    );
    let host_keys = "UserKnownHostsFile=/dev/null";
    let error = Command::new("ssh")
        .args(["-o", &proxy, "-o", "IdentitiesOnly=yes", "-o", host_keys])
        .args(["-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"])
        .args(["-o", "GlobalKnownHostsFile=/dev/null", "-i"])
        .arg(key)
        .args(["-l", user, guest.name.as_str()])
        .args(&args.arguments)
        .exec();
    Err(no_ssh("ssh", error))
}

fn no_ssh(program: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::Usage(format!(
            "this host has no {program} (Debian: apt install openssh-client)"
        )),
        _ => Error::File {
            path: program.into(),
            what: error.to_string(),
        },
    }
}

/// For the shell that ssh gives the command to, which ssh looks for `%` in before.
fn quoted(path: &Path) -> String {
    let text = path
        .to_string_lossy()
        .replace('\'', "'\\''")
        .replace('%', "%%");
    format!("'{text}'")
}

/// Lodger's own key, made the first time.
fn key() -> Result<PathBuf, Error> {
    let dir = lodger_store::data_dir()?.join("ssh");
    let key = dir.join("id_ed25519");
    if key.exists() {
        return Ok(key);
    }
    let cannot = |error: io::Error| Error::File {
        path: dir.clone(),
        what: error.to_string(),
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .map_err(cannot)?;
    // Under another name first: two of us may be at it.
    let new = dir.join(format!("new-{}", std::process::id()));
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "lodger", "-f"])
        .arg(&new)
        .stdin(Stdio::null())
        .status()
        .map_err(|error| no_ssh("ssh-keygen", error))?;
    if !made.success() {
        return Err(cannot(io::Error::other("ssh-keygen has failed")));
    }
    let place = || -> io::Result<()> {
        std::fs::rename(new.with_extension("pub"), key.with_extension("pub"))?;
        std::fs::rename(&new, &key)
    };
    place().map_err(cannot)?;
    Ok(key)
}

/// `lodger ssh-proxy`: standard input and output as a connection to the guest's SSH server.
pub fn proxy(vm: &str) -> Result<ExitCode, Error> {
    let guest = Guest::find(vm, true)?;
    let (mut agent, _) = guest.ask(Request::Dial { port: PORT })?;
    let cannot = host_error("cannot use the connection");
    let mut stream = agent.stream.try_clone().map_err(&cannot)?;
    let outward = move || {
        let mut bytes = vec![0; CHUNK];
        while let Ok(n @ 1..) = io::stdin().lock().read(&mut bytes) {
            if write_data::<ToGuest>(&mut stream, &bytes[..n]).is_err() {
                return;
            }
        }
        // The server may have ended it before.
        let _ = write(&mut stream, &ToGuest::End);
    };
    let thread = std::thread::Builder::new().spawn(outward);
    thread.map_err(host_error("cannot start a thread"))?;
    let mut output = io::stdout().lock();
    loop {
        match agent.next()? {
            FromGuest::Data(data) => {
                let written = output.write_all(&data).and_then(|()| output.flush());
                if written.is_err() {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            FromGuest::End => return Ok(ExitCode::SUCCESS),
            other => return Err(agent.unexpected(&other)),
        }
    }
}
