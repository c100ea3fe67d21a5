//! `lodger cp`: files into a guest and out of it, as a tar stream. What comes from a guest is put where the user has said, whatever
//! the guest sends.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lodger_guest_protocol::{
    Answer, CopyError, FileKind, FromGuest, Request, Source, Target, ToGuest, UnpackOptions, pack,
    read, target, unpack, write_data,
};

use super::{Agent, Guest};
use crate::cli::CopyArgs;
use crate::status::Error;

/// Bytes of a part of the stream.
const CHUNK: usize = 64 << 10;

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// In the guest of this VM.
    Guest(String, PathBuf),
    /// On the host.
    Host(PathBuf),
    /// Standard input or output.
    Stream,
}

impl Place {
    /// `VM:PATH`, unless there is a slash before the colon.
    fn parse(text: &OsStr) -> Place {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Place::Stream;
        }
        let colon = bytes.iter().position(|&b| b == b':' || b == b'/');
        match colon {
            Some(at) if at > 0 && bytes[at] == b':' && !bytes.starts_with(b".") => {
                let vm = String::from_utf8_lossy(&bytes[..at]).into_owned();
                // As in container tools, from the root on.
                let path = Path::new("/").join(OsStr::from_bytes(&bytes[at + 1..]));
                Place::Guest(vm, path)
            }
            _ => Place::Host(text.into()),
        }
    }
}

/// Copies.
pub fn copy(args: &CopyArgs, quiet: bool) -> Result<ExitCode, Error> {
    let find = |vm: &str| Guest::find(vm, quiet);
    match (Place::parse(&args.source), Place::parse(&args.target)) {
        (Place::Host(from), Place::Guest(vm, to)) => upload(&find(&vm)?, &from, &to, args.follow),
        (Place::Guest(vm, from), Place::Host(to)) => download(&find(&vm)?, &from, &to, args.follow),
        (Place::Stream, Place::Guest(vm, dir)) => take_stream(&find(&vm)?, &dir),
        (Place::Guest(vm, from), Place::Stream) => give_stream(&find(&vm)?, &from, args.follow),
        _ => Err(Error::Usage(
            "one of the two must be VM:PATH, a path in a guest; the other one is of the host (./a:b for one with a colon)"
                .into(),
        )),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// An error about a file of the guest's.
struct Wrong(Error);

impl Guest {
    fn stat(&self, path: &Path, follow: bool) -> Result<Option<FileKind>, Error> {
        let path = path.as_os_str().as_bytes().into();
        match self.ask(Request::Stat { path, follow })? {
            (_, Answer::Found(found)) => Ok(found),
            _ => Err(self.error("its agent does not know what a file is")),
        }
    }
}

impl From<CopyError> for Wrong {
    fn from(error: CopyError) -> Wrong {
        Wrong(Error::Usage(error.to_string()))
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> Error {
    move |error| Error::File {
        path: path.into(),
        what: error.to_string(),
    }
}

fn look(path: &Path, follow: bool) -> Result<Option<FileKind>, Error> {
    let found = match follow {
        true => fs::metadata(path),
        false => fs::symlink_metadata(path),
    };
    match found {
        Ok(found) => Ok(Some(FileKind::of(found.file_type()))),
        Err(error)
            if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) =>
        {
            Ok(None)
        }
        Err(error) => Err(at(path)(error)),
    }
}

/// A source that stands for a directory's contents is that directory.
fn follows(path: &Path, follow: bool) -> bool {
    follow || path.as_os_str().as_bytes().ends_with(b"/") || Source::of(path).contents
}

fn upload(guest: &Guest, from: &Path, to: &Path, follow: bool) -> Result<(), Error> {
    let follow = follows(from, follow);
    let missing = || at(from)(io::ErrorKind::NotFound.into());
    let kind = look(from, follow)?.ok_or_else(missing)?;
    let mut source = Source::of(from);
    if source.name.is_empty() {
        // `.` and `..` have names, too.
        let real = fs::canonicalize(from).map_err(at(from))?;
        source.name = real.file_name().unwrap_or(OsStr::new("root")).into();
    }
    let mut look = |path: &Path| guest.stat(path, true).map_err(Wrong);
    let found = target(&source, kind, to, &mut look);
    let Target { dir, name } = found.map_err(|Wrong(error)| match error {
        Error::Usage(text) => guest.error(text),
        other => other,
    })?;
    let dir = dir.into_os_string().into_vec();
    let (agent, _) = guest.ask(Request::Unpack { dir })?;
    let read = |stream: &UnixStream| {
        let to = BufWriter::with_capacity(CHUNK, Data(stream));
        pack(from, Path::new(&name), follow, to).map(drop)
    };
    send(agent, read)
}

/// Has `make` write a stream, and waits until the agent has put it in its place.
fn send(mut agent: Agent, make: impl FnOnce(&UnixStream) -> io::Result<()>) -> Result<(), Error> {
    let made = make(&agent.stream);
    // What the agent has to say about it is worth more than that it does not listen any more.
    let ended = match &made {
        Ok(()) => agent.say(&ToGuest::End),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => {
            return Err(agent.error(format!("not everything was copied: {error}")));
        }
    };
    let answer = agent.next();
    match (answer, ended) {
        (Ok(FromGuest::End), Ok(())) => Ok(()),
        (Ok(other), _) => Err(agent.unexpected(&other)),
        (Err(_), Err(error)) | (Err(error), Ok(())) => Err(error),
    }
}

/// What is written becomes messages of data.
struct Data<'a>(&'a UnixStream);

impl Write for Data<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        write_data::<ToGuest>(&mut self.0, data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The stream that the agent sends.
struct Stream<'a> {
    from: &'a UnixStream,
    part: io::Cursor<Vec<u8>>,
    ended: bool,
    /// What was said instead.
    other: Option<FromGuest>,
}

impl<'a> Stream<'a> {
    fn new(from: &'a UnixStream) -> Stream<'a> {
        Stream {
            from,
            part: io::Cursor::default(),
            ended: false,
            other: None,
        }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.part.read(data)?;
            if n > 0 || self.ended || data.is_empty() {
                return Ok(n);
            }
            match read(&mut self.from).map_err(io::Error::other)? {
                Some(FromGuest::Data(part)) => self.part = io::Cursor::new(part),
                Some(FromGuest::End) => self.ended = true,
                other => {
                    self.other = other;
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
    }
}

fn download(guest: &Guest, from: &Path, to: &Path, follow: bool) -> Result<(), Error> {
    let follow = follows(from, follow);
    let missing = || guest.error(format!("there is no {} in its guest", from.display()));
    let kind = guest.stat(from, follow)?.ok_or_else(missing)?;
    let mut source = Source::of(from);
    if source.name.is_empty() {
        source.name = guest.name.as_str().into();
    }
    let mut look = |path: &Path| look(path, true).map_err(Wrong);
    let found = target(&source, kind, to, &mut look);
    let Target { dir, name } = found.map_err(|Wrong(error)| error)?;
    let only = (name != ".").then(|| name.clone());
    let options = UnpackOptions {
        only,
        keep_special: false,
    };
    receive(guest, from, name.into_vec(), follow, |stream| {
        unpack(&dir, stream, &options).map(drop)
    })
}

/// Asks for a stream and has `take` read it.
fn receive(
    guest: &Guest,
    from: &Path,
    name: Vec<u8>,
    follow: bool,
    take: impl FnOnce(&mut Stream) -> io::Result<()>,
) -> Result<(), Error> {
    let path = from.as_os_str().as_bytes().into();
    let (agent, _) = guest.ask(Request::Pack { path, name, follow })?;
    let mut stream = Stream::new(&agent.stream);
    let taken = take(&mut stream);
    match (taken, stream.other) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(other)) => Err(agent.unexpected(&other)),
        (Err(error), None) => Err(agent.error(format!("not everything was copied: {error}"))),
    }
}

fn take_stream(guest: &Guest, dir: &Path) -> Result<(), Error> {
    if guest.stat(dir, true)? != Some(FileKind::Directory) {
        return Err(guest.error(format!("{} is not a directory of its guest", dir.display())));
    }
    let dir = dir.as_os_str().as_bytes().into();
    let (agent, _) = guest.ask(Request::Unpack { dir })?;
    send(agent, |stream| {
        let mut to = BufWriter::with_capacity(CHUNK, Data(stream));
        io::copy(&mut io::stdin().lock(), &mut to)?;
        to.flush()
    })
}

fn give_stream(guest: &Guest, from: &Path, follow: bool) -> Result<(), Error> {
    if rustix::termios::isatty(rustix::stdio::stdout()) {
        let text = "the tar stream is not for a terminal; send it to a file or a program";
        return Err(Error::Usage(text.into()));
    }
    let name = match from.file_name() {
        Some(name) if !Source::of(from).contents => name.as_bytes().into(),
        _ => b".".to_vec(),
    };
    receive(guest, from, name, follows(from, follow), |stream| {
        io::copy(stream, &mut io::stdout().lock()).map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let guest = |vm: &str, path: &str| Place::Guest(vm.into(), path.into());
        for (text, expected) in [
            ("web:/etc/hosts", guest("web", "/etc/hosts")),
            ("web:etc", guest("web", "/etc")),
            ("web:", guest("web", "/")),
            ("web:/a:b", guest("web", "/a:b")),
            ("./web:a", Place::Host("./web:a".into())),
            ("/tmp/a:b", Place::Host("/tmp/a:b".into())),
            ("dir/a:b", Place::Host("dir/a:b".into())),
            (":a", Place::Host(":a".into())),
            ("file", Place::Host("file".into())),
            ("-", Place::Stream),
        ] {
            assert_eq!(Place::parse(OsStr::new(text)), expected, "{text}");
        }
    }
}
