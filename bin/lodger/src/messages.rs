//! What Lodger itself says: messages on standard error, answers on standard output. In raw mode a line needs a carriage
//! return, too, and the guest may have left the cursor in the middle of one.

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use lodger_char::RawMode;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::status::Error;

/// The guest's last output on this terminal did not end a line.
static MID_LINE: AtomicBool = AtomicBool::new(false);

/// Standard error; a closed one is no reason to fail.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        let line_end: &[u8] = if RawMode::is_on() { b"\r\n" } else { b"\n" };
        if MID_LINE.swap(false, Ordering::Relaxed) {
            stderr.write_all(line_end)?;
        }
        for line in data.split_inclusive(|&b| b == b'\n') {
            match line.strip_suffix(b"\n") {
                Some(line) => stderr.write_all(&[line, line_end].concat())?,
                None => stderr.write_all(line)?,
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging: warnings, from `-v` on what happens, from `-vv` on details, from `-vvv` on everything.
pub fn start(verbose: u8, quiet: bool) {
    let level = match verbose {
        0 if quiet => LevelFilter::ERROR,
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(|| Stderr)
        .event_format(Plain)
        .init();
}

/// Log events look like the other messages.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            Level::INFO => "",
            Level::DEBUG => "debug: ",
            Level::TRACE => "trace: ",
        };
        write!(writer, "lodger: {level}")?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// The guest wrote `data` to this terminal.
pub fn guest_wrote(data: &[u8]) {
    if let Some(&last) = data.last() {
        MID_LINE.store(last != b'\n', Ordering::Relaxed);
    }
}

/// Ends the guest's last line.
pub fn end_line() {
    if MID_LINE.swap(false, Ordering::Relaxed) {
        let _ = io::stderr().write_all(b"\n");
    }
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

/// The answer to a command, on standard output. A reader that has seen enough is no failure.
pub fn answer(text: impl Display) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Host {
            what: "cannot write to standard output",
            source: error,
        }),
        _ => Ok(()),
    }
}

/// Prints counters on standard error, one a line.
pub fn print_stats(stats: &[(String, u64)]) {
    for (name, value) in stats {
        print(format_args!("{value:>14}  {name}"));
    }
}
