//! `lodger disk`: disk images as files.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use clap::Subcommand;
use lodger_block::{CheckReport, Convert, CreateOptions, Format, ImageInfo, ManageError};
use lodger_host_sys::signals::{self, Signals};
use lodger_image::Progress;
use serde::Serialize;

use crate::cli::parse_size;
use crate::images::Bar;
use crate::messages;
use crate::status::{self, Error};

/// The status of a check that has found something, besides the common ones.
const NOT_SOUND: u8 = 3;

#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make an empty disk, or one that continues another image
    Create {
        /// The new file
        file: PathBuf,
        /// The size of the disk, 10G for example; that of the backing file if it is not given
        #[arg(value_parser = parse_size, required_unless_present = "backing")]
        size: Option<u64>,
        /// The format: qcow2, or raw [default: by the name, raw for .img and .raw]
        #[arg(long, value_name = "FORMAT")]
        format: Option<Format>,
        /// The image that the new one continues: what is not written in the new one is read from there.
        /// A relative name is relative to the new file
        #[arg(long, value_name = "FILE")]
        backing: Option<PathBuf>,
        /// The format of that image [default: what its first bytes tell]
        #[arg(long, value_name = "FORMAT", requires = "backing")]
        backing_format: Option<Format>,
    },
    /// Tell what an image is; it may be in use
    Info {
        /// The image
        file: PathBuf,
        /// Its format [default: what its first bytes tell]
        #[arg(long, value_name = "FORMAT")]
        format: Option<Format>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a new image with the contents of another one and of its backing files
    Convert {
        /// The image to read
        from: PathBuf,
        /// The new file
        to: PathBuf,
        /// The format of the new image [default: by its name, raw for .img and .raw, else qcow2]
        #[arg(long = "to", value_name = "FORMAT")]
        to_format: Option<Format>,
        /// The format of the image to read; needed if it has a backing file [default: what its first
        /// bytes tell]
        #[arg(long, value_name = "FORMAT")]
        format: Option<Format>,
    },
    /// Check that a qcow2 image is sound. The status is 3 if it is not
    Check {
        /// The image; nobody may be writing it
        file: PathBuf,
        /// Its format [default: what its first bytes tell]
        #[arg(long, value_name = "FORMAT")]
        format: Option<Format>,
        /// Put right what can be
        #[arg(long)]
        repair: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a disk larger; partitions and file systems on it are grown by the guest
    Resize {
        /// The image; nobody may be using it
        file: PathBuf,
        /// The new size, or what is added to it: 20G, +5G
        size: NewSize,
        /// Its format [default: what its first bytes tell]
        #[arg(long, value_name = "FORMAT")]
        format: Option<Format>,
    },
}

/// A size, absolute or more than before.
#[derive(Debug, Clone, Copy)]
pub enum NewSize {
    To(u64),
    By(u64),
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<NewSize, String> {
        match text.strip_prefix('+') {
            Some(more) => parse_size(more).map(NewSize::By),
            None => parse_size(text).map(NewSize::To),
        }
    }
}

/// Carries out the command.
pub fn serve(command: &DiskCommand, quiet: bool) -> Result<ExitCode, Error> {
    let say = |text: String| {
        if !quiet {
            messages::say(text);
        }
    };
    match command {
        DiskCommand::Create {
            file,
            size,
            format,
            backing,
            backing_format,
        } => {
            let format = match backing {
                Some(_) => format.unwrap_or(Format::Qcow2),
                None => format_of(file, *format),
            };
            let options = CreateOptions {
                format,
                size: *size,
                backing: backing.clone(),
                backing_format: *backing_format,
            };
            let size = lodger_block::create(file, &options)?;
            say(format!(
                "made {}: {format}, {}",
                file.display(),
                human(size)
            ));
            if backing.is_some() {
                say(format!("use it as --disk {},format=qcow2", file.display()));
            }
        }
        DiskCommand::Info { file, format, json } => {
            let info = lodger_block::info(file, *format).map_err(ManageError::from)?;
            match json {
                true => answer_json(&info)?,
                false => messages::answer(describe(&info))?,
            }
        }
        DiskCommand::Convert {
            from,
            to,
            to_format,
            format,
        } => convert(from, to, *format, format_of(to, *to_format), quiet)?,
        DiskCommand::Check {
            file,
            format,
            repair,
            json,
        } => {
            let report = lodger_block::check(file, *format, *repair).map_err(ManageError::from)?;
            match json {
                true => answer_json(&report)?,
                false => messages::answer(tell(file, &report))?,
            }
            if !report.is_sound() {
                return Ok(ExitCode::from(NOT_SOUND));
            }
        }
        DiskCommand::Resize { file, size, format } => {
            let new = |old: u64| match *size {
                NewSize::To(size) => size,
                NewSize::By(more) => old.saturating_add(more),
            };
            let (old, new) = lodger_block::resize(file, *format, new)?;
            say(format!(
                "{}: from {} to {}",
                file.display(),
                human(old),
                human(new)
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The format of a new image, by its name if it is not said.
fn format_of(path: &Path, format: Option<Format>) -> Format {
    let name = path.extension().and_then(|e| e.to_str());
    format.unwrap_or(match name {
        Some("img" | "raw") => Format::Raw,
        _ => Format::Qcow2,
    })
}

fn convert(
    from: &Path,
    to: &Path,
    from_format: Option<Format>,
    format: Format,
    quiet: bool,
) -> Result<(), Error> {
    let caught = Signals::catch(&[signals::HANGUP, signals::INTERRUPT, signals::TERMINATE]);
    let caught = caught.map_err(|source| Error::Host {
        what: "cannot catch signals",
        source,
    })?;
    let mut bar = Bar::new(quiet);
    let mut begun = false;
    let mut ended_by = None;
    let mut progress = |done, total| {
        if !begun {
            begun = true;
            bar.step(&format!("converting {}", from.display()), Some(total));
        }
        bar.advance(done);
        ended_by = caught.next();
        match ended_by {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    };
    let job = Convert {
        from,
        from_format,
        to,
        format,
    };
    let done = lodger_block::convert(&job, &mut progress);
    bar.finish();
    match (done, ended_by) {
        (Err(ManageError::Interrupted), Some(signal)) => Err(Error::Ended(status::signal(signal))),
        (done, _) => Ok(done?),
    }
}

fn answer_json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).expect("plain data");
    messages::answer(text + "\n")
}

/// Bytes for a person.
fn human(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let number = format!("{value:.1}");
    format!(
        "{} {}",
        number.strip_suffix(".0").unwrap_or(&number),
        units[unit]
    )
}

fn describe(info: &ImageInfo) -> String {
    let mut lines = vec![
        ("file", info.path.display().to_string()),
        ("format", info.format.to_string()),
        (
            "disk",
            format!("{} ({} bytes)", human(info.size), info.size),
        ),
        ("takes", human(info.allocated)),
    ];
    if let Some(q) = &info.qcow2 {
        lines.push(("version", q.version.to_string()));
        lines.push(("clusters", human(q.cluster_size)));
        lines.push(("compression", q.compression.into()));
        if q.snapshots > 0 {
            lines.push(("snapshots", q.snapshots.to_string()));
        }
        if let (Some(name), Some(path)) = (&q.backing, &q.backing_path) {
            let format = q.backing_format.as_deref().unwrap_or("format not named");
            let there = match path.exists() {
                true => "",
                false => ", which is not there",
            };
            lines.push((
                "backing",
                format!("{name} ({format}) at {}{there}", path.display()),
            ));
        }
        if q.needs_check {
            lines.push((
                "state",
                "not closed properly: lodger disk check --repair".into(),
            ));
        }
    }
    lines
        .into_iter()
        .map(|(name, value)| format!("{name:12} {value}\n"))
        .collect()
}

fn tell(path: &Path, report: &CheckReport) -> String {
    let name = path.display();
    if report.format == Format::Raw {
        return format!("{name}: a raw image has nothing that could be checked\n");
    }
    let mut text = format!(
        "{name}: {} of {} clusters are allocated, {} of them compressed\n",
        report.allocated_clusters, report.total_clusters, report.compressed_clusters
    );
    for message in &report.messages {
        text += &format!("error: {message}\n");
    }
    text += &match (report.is_sound(), report.repaired) {
        (true, false) => "it is sound\n".into(),
        (_, repaired) => format!(
            "{} errors, {} clusters that nobody uses{}; {}\n",
            report.errors,
            report.leaks,
            if report.not_closed {
                ", not closed properly"
            } else {
                ""
            },
            match (repaired, report.errors) {
                (true, _) => "put right".to_owned(),
                (false, 0) => format!("no harm, but space: lodger disk check --repair {name}"),
                (false, _) => format!("do not write to it: lodger disk check --repair {name}"),
            }
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (512, "0.5 KiB"),
            (64 << 10, "64 KiB"),
            (1536 << 20, "1.5 GiB"),
            (10 << 30, "10 GiB"),
            (5 << 50, "5120 TiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn formats_by_name() {
        for (name, format) in [
            ("a.img", Format::Raw),
            ("a.raw", Format::Raw),
            ("a.qcow2", Format::Qcow2),
            ("a", Format::Qcow2),
        ] {
            assert_eq!(format_of(Path::new(name), None), format, "{name}");
        }
    }
}
