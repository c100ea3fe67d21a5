//! Programs of the host that a build runs, and what they complain of.

use std::io::{self, Read};
use std::process::{Command, ExitStatus, Output, Stdio};

use crate::cache::Workshop;
use crate::error::{Error, IoContext, Result, says_full};

/// A program of the host's, run with the lock as its standard input.
pub(crate) struct Tool {
    program: &'static str,
    pub(crate) command: Command,
}

impl Tool {
    pub(crate) fn new(program: &'static str, workshop: &Workshop) -> Result<Tool> {
        let lock = workshop
            .lock
            .try_clone()
            .while_trying("share the lock in", &workshop.scratch)?;
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").stdin(lock);
        Ok(Tool { program, command })
    }

    /// Runs it to its end, whatever that is.
    pub(crate) fn run(&mut self) -> Result<Output> {
        self.command.output().map_err(|error| self.no_start(error))
    }

    /// Runs it, and takes its standard output.
    pub(crate) fn output(&mut self) -> Result<String> {
        let output = self.run()?;
        if !output.status.success() {
            return Err(self.failed(&output.stderr, output.status));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs it, and lets `take` read its standard output as it comes.
    pub(crate) fn read<T>(
        &mut self,
        take: impl FnOnce(&mut dyn Read) -> io::Result<T>,
    ) -> Result<T> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().map_err(|error| self.no_start(error))?;
        let mut stdout = child.stdout.take().expect("it is piped");
        let taken = take(&mut stdout);
        // A program that has more to say than was asked for need not wait for ever.
        let _ = io::copy(&mut stdout, &mut io::sink());
        let output = child
            .wait_with_output()
            .map_err(|error| self.no_start(error))?;
        if !output.status.success() {
            return Err(self.failed(&output.stderr, output.status));
        }
        taken.map_err(|error| self.error(error.to_string()))
    }

    pub(crate) fn no_start(&self, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::NotFound => Error::NoApt {
                program: self.program,
            },
            _ => self.error(error.to_string()),
        }
    }

    pub(crate) fn failed(&self, stderr: &[u8], status: ExitStatus) -> Error {
        self.error(match complaints(stderr) {
            text if text.is_empty() => status.to_string(),
            text => text,
        })
    }

    fn error(&self, detail: String) -> Error {
        let words = [self.command.get_program()]
            .into_iter()
            .chain(self.command.get_args())
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>();
        Error::Tool {
            command: words.join(" "),
            detail,
        }
    }
}

/// What a program complained of: a full disk, which explains everything else, or its first errors and warnings, or else
/// its last line.
pub(crate) fn complaints(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    if let Some(line) = text.lines().find(|line| says_full(line)) {
        return line.trim().to_owned();
    }
    let marked = text
        .lines()
        .filter_map(|line| line.strip_prefix("E: ").or(line.strip_prefix("W: ")))
        .map(|line| line.trim_end_matches('.'))
        .take(2)
        .collect::<Vec<_>>();
    if marked.is_empty() {
        return text
            .lines()
            .next_back()
            .unwrap_or_default()
            .trim()
            .to_owned();
    }
    marked.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_complains_of() {
        for (stderr, expected) in [
            ("", ""),
            ("one\ntwo\n", "two"),
            ("W: a.\nnoise\nE: b\nE: c\n", "a; b"),
            (
                "W: a\ntar: b: No space left on device\ntar failed\n",
                "tar: b: No space left on device",
            ),
        ] {
            assert_eq!(complaints(stderr.as_bytes()), expected);
        }
    }
}
