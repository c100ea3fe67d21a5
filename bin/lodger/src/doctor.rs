//! `lodger doctor`: what works on this host, what does not, and how to get it.
//!
//! Each finding is `ok`, a `note` (something works less well or not at all, and there is a way around) or a `problem`.
//! What can be tried is tried rather than guessed: a machine of one vCPU is made on each engine.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lodger_clock::LiveClock;
use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_image::{BUILD_SPACE, Cache, DEFAULT_IMAGE, ImageState, PackageTools};
use lodger_vcpu::{Engine, VmConfig};
use lodger_x86::CpuModel;
use rustix::fs::{Access, access, statvfs};
use rustix::process::{Resource, getrlimit};

use crate::cli::{DEFAULT_MEMORY, EngineChoice};
use crate::status::{self, Error};
use crate::{host, messages, registry};

/// Columns of the report.
const WIDTH: usize = 100;

/// Threads, open files and mappings that one machine takes beside those of its vCPUs and disks, generously.
const THREADS: u64 = 32;
const FILES: u64 = 64;
const MAPPINGS: u64 = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    Note,
    Problem,
}

use Level::{Note, Ok as Fine, Problem};

/// The report: a paragraph for each finding.
#[derive(Default)]
struct Report {
    text: String,
}

impl Report {
    fn add(&mut self, level: Level, topic: &str, finding: impl Display) {
        let level = match level {
            Fine => "ok",
            Note => "note",
            Problem => "PROBLEM",
        };
        self.text += &paragraph(level, &format!("{topic}: {finding}"));
    }
}

/// `text` in lines of at most [`WIDTH`] columns where words allow it, with `head` before the first.
fn paragraph(head: &str, text: &str) -> String {
    const INDENT: usize = 9;
    let mut all = String::new();
    let mut line = format!("{head:INDENT$}");
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            all += line.trim_end();
            all.push('\n');
            line = " ".repeat(INDENT);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line += word;
        empty = false;
    }
    all + &line + "\n"
}

/// Prints the findings. Fails if no machine could run.
pub fn examine() -> Result<ExitCode, Error> {
    let mut report = Report::default();
    processor(&mut report);
    let engines = engines(&mut report);
    let memory = memory(&mut report);
    limits(&mut report);
    images(&mut report);
    terminal(&mut report);
    messages::answer(report.text)?;
    Ok(match engines && memory {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(status::HOST_FAILURE),
    })
}

fn processor(report: &mut Report) {
    let has = registry::host_features();
    let missing: Vec<&str> = [
        ("AVX", has.avx),
        ("AVX2", has.avx2),
        ("FMA", has.fma),
        ("F16C", has.f16c),
        ("BMI1", has.bmi1),
        ("BMI2", has.bmi2),
        ("LZCNT", has.lzcnt),
        ("MOVBE", has.movbe),
    ]
    .into_iter()
    .filter_map(|(name, there)| (!there).then_some(name))
    .collect();
    let level = match missing.is_empty() {
        true => "guests can use x86-64-v3 (AVX2, BMI, FMA)".into(),
        false => format!(
            "guests do without what it lacks of x86-64-v3: {}",
            missing.join(", ")
        ),
    };
    let place = match host::is_virtual() {
        true => ", in a virtual machine",
        false => "",
    };
    let text = format!("{}{place}; {level}", host::processor());
    report.add(Fine, "processor", text);
}

/// Whether any engine works.
fn engines(report: &mut Report) -> bool {
    let mut any = false;
    for engine in registry::engines() {
        let topic = format!("engine {}", engine.name());
        let problem = match engine.probe() {
            Err(error) => Some(error.to_string()),
            Ok(_) => trial(&*engine).err(),
        };
        match (problem, engine.stock_guest_problem()) {
            (Some(problem), _) => report.add(Note, &topic, problem),
            (None, Some(problem)) => {
                let text = format!("small bare-metal guests only, {problem}");
                report.add(Note, &topic, text);
            }
            (None, None) => {
                any = true;
                report.add(Fine, &topic, "works, for stock systems");
            }
        }
    }
    match registry::choose(EngineChoice::Auto) {
        Ok(chosen) if any => {
            let text = format!("`lodger run` takes {}", chosen.engine.name());
            report.add(Fine, "choice", text);
        }
        Err(error) => report.add(Problem, "choice", error),
        Ok(_) => report.add(Problem, "choice", "no engine runs stock systems here"),
    }
    any
}

/// Makes a machine's vCPU on the engine, which takes all that the host may refuse.
fn trial(engine: &dyn Engine) -> Result<(), String> {
    const KHZ: u32 = 1_000_000;
    let ram = [RamRange {
        start: 0,
        len: 1 << 20,
    }];
    let model = CpuModel::named(CpuModel::NAMES[0], 1, &registry::host_features(), KHZ);
    let config = VmConfig {
        memory: GuestMemory::new(&ram).map_err(|error| error.to_string())?,
        clock: LiveClock::start(),
        entropy: Arc::new(|_| ()),
        model: Arc::new(model.map_err(|error| error.to_string())?),
        vcpus: 1,
    };
    let vcpu = engine.create_vm(config).and_then(|vm| vm.create_vcpu(0));
    vcpu.map(drop).map_err(|error| error.to_string())
}

/// Whether the default machine's memory can be had.
fn memory(report: &mut Report) -> bool {
    let ram = [RamRange {
        start: 0,
        len: DEFAULT_MEMORY,
    }];
    if let Err(error) = GuestMemory::new(&ram) {
        let text = format!("{error}; see `ulimit -v`, or pass a smaller --memory than the default");
        report.add(Problem, "memory", text);
        return false;
    }
    match host::memory_available() {
        None => report.add(Note, "memory", "the host does not tell how much it has"),
        Some(bytes) => {
            let mib = bytes >> 20;
            let (level, text) = match bytes > DEFAULT_MEMORY + DEFAULT_MEMORY / 4 {
                true => (
                    Fine,
                    "a machine takes what its guest touches, and some 40 MiB",
                ),
                false => (
                    Note,
                    "the default machine may need more; pass --memory 256M, or end something",
                ),
            };
            report.add(level, "memory", format!("{mib} MiB available; {text}"));
        }
    }
    true
}

fn limits(report: &mut Report) {
    let limit = |resource| getrlimit(resource).current;
    let threads = [limit(Resource::Nproc), host::setting("kernel/threads-max")];
    // What, how much of it there may be, how much one machine may want, how to get more.
    let table = [
        (
            "address space (MiB)",
            limit(Resource::As).map(|bytes| bytes >> 20),
            DEFAULT_MEMORY >> 19,
            "raise `ulimit -v`",
        ),
        (
            "threads",
            threads.into_iter().flatten().min(),
            THREADS,
            "raise `ulimit -u`",
        ),
        (
            "open files",
            limit(Resource::Nofile),
            FILES,
            "raise `ulimit -n`",
        ),
        (
            "memory mappings",
            host::setting("vm/max_map_count"),
            MAPPINGS,
            "raise it as root: sysctl vm.max_map_count=65530",
        ),
    ];
    let mut good = Vec::new();
    for (what, limit, wanted, way) in table {
        match limit {
            Some(limit) if limit < wanted => {
                let text = format!("{what} {limit}, a machine may want {wanted}; {way}");
                report.add(Note, "limits", text);
            }
            Some(limit) => good.push(format!("{what} {limit}")),
            None => good.push(format!("{what} unlimited")),
        }
    }
    if !good.is_empty() {
        let text = format!("{}; locked memory is not needed", good.join(", "));
        report.add(Fine, "limits", text);
    }
}

fn images(report: &mut Report) {
    const WITHOUT: &str = "or pass --kernel FILE and --initrd FILE to `lodger run`";
    let cache = match Cache::open(None) {
        Ok(cache) => cache,
        Err(error) => return report.add(Problem, "images", format!("{error}; {WITHOUT}")),
    };
    let dir = cache.dir();
    let mut missing = false;
    for image in cache.list() {
        let name = image.name;
        let topic = format!("image {name}");
        let state = match (image.state, cache.verify(&name)) {
            (ImageState::Ready { .. }, Err(error)) => ImageState::Damaged(error.to_string()),
            (state, _) => state,
        };
        match state {
            ImageState::Ready { kernel_release, .. } => {
                let text = match kernel_release {
                    Some(release) => format!("built, with Linux {release}"),
                    None => "pulled".into(),
                };
                report.add(Fine, &topic, text);
            }
            ImageState::Absent => {
                missing |= name == DEFAULT_IMAGE;
                let text =
                    format!("not built yet; `lodger run` or `lodger image build {name}` does it");
                report.add(Note, &topic, text);
            }
            ImageState::Damaged(reason) => {
                missing = true;
                let text = format!("{reason}; repair it: lodger image build (or pull) {name}");
                report.add(Note, &topic, text);
            }
        }
    }
    let matters = if missing { Problem } else { Note };

    // Where it is, or will be made.
    let there = dir
        .ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"));
    let place = dir.display();
    match (
        access(there, Access::WRITE_OK | Access::EXEC_OK),
        statvfs(there),
    ) {
        (Err(error), _) => {
            let text = format!(
                "{place} cannot be written to: {error}; set XDG_CACHE_HOME to a directory that you may write to, {WITHOUT}"
            );
            report.add(matters, "image cache", text);
        }
        (Ok(()), Ok(disk)) if disk.f_bavail.saturating_mul(disk.f_frsize) < BUILD_SPACE => {
            let text = format!(
                "{place} has {} MB free, a build takes {}; free some, or set XDG_CACHE_HOME to a directory elsewhere",
                disk.f_bavail.saturating_mul(disk.f_frsize) / 1_000_000,
                BUILD_SPACE / 1_000_000
            );
            report.add(matters, "image cache", text);
        }
        _ => report.add(
            Fine,
            "image cache",
            format!("{place}, with room for builds"),
        ),
    }

    let tools = PackageTools::examine();
    if !tools.missing.is_empty() {
        let text = format!(
            "{} not found; images are built by the apt and dpkg of Debian and its derivatives; build one there, {WITHOUT}",
            tools.missing.join(", ")
        );
        return report.add(matters, "packages", text);
    }
    match tools.lists {
        None => report.add(
            Note,
            "packages",
            "no package lists here; a build fetches its own, which takes longer (`sudo apt-get update` gets the host's)",
        ),
        Some(changed) => {
            let age = SystemTime::now().duration_since(changed).unwrap_or(Duration::ZERO);
            let days = age.as_secs() / 86_400;
            let text = format!("apt is here, its package lists are {days} days old");
            report.add(Fine, "packages", text);
        }
    }
}

fn terminal(report: &mut Report) {
    if !lodger_char::is_interactive() {
        let text = "standard input and output are not both a terminal: the console's bytes would pass unchanged, \
                    without escape key";
        return report.add(Note, "terminal", text);
    }
    match lodger_char::window_size() {
        Some((columns, rows)) => {
            report.add(Fine, "terminal", format!("{columns} columns, {rows} rows"));
        }
        None => report.add(
            Note,
            "terminal",
            "it does not tell its size; guests assume 80 columns",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_wrapped_between_words() {
        let long = "x".repeat(WIDTH);
        for (text, expected) in [
            ("a  b", "note     a b\n".to_owned()),
            (&long, format!("note     {long}\n")),
            (
                &format!("a {long} b"),
                format!("note     a\n         {long}\n         b\n"),
            ),
        ] {
            assert_eq!(paragraph("note", text), expected);
        }
    }
}
