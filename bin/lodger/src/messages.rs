//! What goes to standard error. In raw mode a line needs a carriage return, too.

use std::fmt::Display;
use std::io::{self, Write};

use lodger_char::RawMode;
use tracing_subscriber::filter::LevelFilter;

/// Standard error; a closed one is no reason to fail.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if RawMode::is_on() {
            for line in data.split_inclusive(|&b| b == b'\n') {
                match line.strip_suffix(b"\n") {
                    Some(line) => stderr.write_all(&[line, b"\r\n"].concat())?,
                    None => stderr.write_all(line)?,
                }
            }
        } else {
            stderr.write_all(data)?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging: warnings, from `-v` on what happens, from `-vv` on details, from `-vvv` on everything.
pub fn start(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(|| Stderr)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .init();
}

/// `lodger: text`, each line of it.
pub fn say(text: impl Display) {
    let text = text.to_string();
    let lines: Vec<_> = text.lines().map(|l| format!("lodger: {l}\n")).collect();
    let _ = Stderr.write_all(lines.concat().as_bytes());
}

/// `lodger: error: text`.
pub fn error(text: impl Display) {
    let _ = Stderr.write_all(format!("lodger: error: {text}\n").as_bytes());
}

/// Text as it is.
pub fn print(text: impl Display) {
    let _ = Stderr.write_all(format!("{text}\n").as_bytes());
}
