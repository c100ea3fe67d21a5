//! Boots a guest again and again, each time with one random bit flipped in one random byte of the kernel, the initial RAM disk or
//! the disk image. What the guest does then is its own affair; the monitor must neither panic nor hang.
//!
//! A try is good if the monitor ends by itself with one of its documented statuses, or, when the time of the try is over, ends
//! promptly on SIGTERM.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const USAGE: &str = "usage: boot-flip --lodger FILE --kernel FILE --initrd FILE [--disk FILE] [--append TEXT]
                 [--tries N] [--seconds N] [--jobs N] [--seed N] [-- OPTION...]

Boots with `lodger run` N times (default 1000), each at most so many seconds (default 5), in N jobs (default 2),
each time with one bit of one of the files flipped. Further options go to `lodger run`.";

/// How long the monitor may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(30);

/// After how many tries a line tells how far it is.
const PROGRESS: u64 = 50;

struct Options {
    lodger: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    disk: Option<PathBuf>,
    append: String,
    tries: u64,
    time: Duration,
    jobs: u64,
    seed: u64,
    rest: Vec<String>,
}

fn options() -> Option<Options> {
    let mut values = BTreeMap::new();
    let mut rest = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--" {
            rest = arguments.collect();
            break;
        }
        values.insert(name, arguments.next()?);
    }
    let mut number = |name: &str, default: u64| match values.remove(name) {
        Some(value) => value.parse().ok(),
        None => Some(default),
    };
    let options = Options {
        tries: number("--tries", 1000)?,
        time: Duration::from_secs(number("--seconds", 5)?),
        jobs: number("--jobs", 2)?,
        seed: number("--seed", 1)?,
        lodger: values.remove("--lodger")?.into(),
        kernel: values.remove("--kernel")?.into(),
        initrd: values.remove("--initrd")?.into(),
        disk: values.remove("--disk").map(PathBuf::from),
        append: values
            .remove("--append")
            .unwrap_or_else(|| "console=ttyS0 panic=-1 quiet cryptomgr.notests".into()),
        rest,
    };
    values.is_empty().then_some(options)
}

/// SplitMix64: try `n` of a seed is always the same.
fn random(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Copies `from` with a bit flipped; what was done.
fn flip(from: &Path, to: &Path, random: u64) -> std::io::Result<String> {
    let mut bytes = fs::read(from)?;
    let (at, bit) = ((random >> 3) as usize % bytes.len(), random & 7);
    bytes[at] ^= 1 << bit;
    fs::write(to, bytes)?;
    Ok(format!("{} byte {at:#x} bit {bit}", from.display()))
}

/// How the try ended, or what was wrong with it.
fn attempt(options: &Options, n: u64, folder: &Path) -> Result<&'static str, String> {
    let host = |e: std::io::Error| format!("try {n}: the host: {e}");
    let files = [
        Some(&options.kernel),
        Some(&options.initrd),
        options.disk.as_ref(),
    ];
    let files: Vec<&PathBuf> = files.into_iter().flatten().collect();
    let roll = random(options.seed, n);
    let chosen = (roll >> 60) as usize % files.len();
    let changed = folder.join("changed");
    let what = flip(files[chosen], &changed, roll & u64::MAX >> 4).map_err(host)?;
    let mut used: Vec<PathBuf> = files.iter().map(|f| f.to_path_buf()).collect();
    used[chosen] = changed;

    let mut command = Command::new(&options.lodger);
    command.args([
        "run",
        "--no-reboot",
        "--append",
        &options.append,
        "--kernel",
    ]);
    command.arg(&used[0]).arg("--initrd").arg(&used[1]);
    if let Some(disk) = used.get(2) {
        // The guest may write to it; the original must stay.
        let copy = folder.join("disk");
        fs::copy(disk, &copy).map_err(host)?;
        command.arg("--disk").arg(copy);
    }
    let mut child = command
        .args(&options.rest)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(host)?;
    let failed = |why: String| format!("try {n} of seed {} ({what}): {why}", options.seed);
    let mut stderr = child.stderr.take().expect("it is piped");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    let ended = match wait(&mut child, options.time) {
        Some(status) => status,
        None => {
            let _ = Command::new("kill").arg(child.id().to_string()).status();
            match wait(&mut child, GRACE) {
                Some(_) => {
                    let text = reader.join().unwrap_or_default();
                    return match text.contains("panicked") {
                        true => Err(failed(format!("panic:\n{text}"))),
                        false => Ok("stopped when its time was over"),
                    };
                }
                None => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(failed("does not end on SIGTERM".into()));
                }
            }
        }
    };
    let text = reader.join().unwrap_or_default();
    match ended {
        _ if text.contains("panicked") => Err(failed(format!("panic:\n{text}"))),
        Some(0) => Ok("guest powered off"),
        Some(1) => Ok("refused with an error"),
        Some(3) => Ok("guest crashed"),
        Some(4) => Ok("guest reset"),
        other => Err(failed(format!("status {other:?}:\n{text}"))),
    }
}

/// Waits at most `time`; the exit status (`Some(None)`: a signal).
fn wait(child: &mut Child, time: Duration) -> Option<Option<i32>> {
    let end = Instant::now() + time;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status.code());
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let next = AtomicU64::new(0);
    let results = Mutex::new((BTreeMap::<&str, u64>::new(), Vec::<String>::new()));
    let base = std::env::temp_dir().join(format!("boot-flip-{}", std::process::id()));
    std::thread::scope(|scope| {
        for job in 0..options.jobs {
            let (options, next, results) = (&options, &next, &results);
            let folder = base.join(job.to_string());
            scope.spawn(move || {
                fs::create_dir_all(&folder).expect("the temporary folder can be written");
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= options.tries {
                        break;
                    }
                    let result = attempt(options, n, &folder);
                    let mut results = results.lock().expect("a job panicked");
                    let done = results.0.values().sum::<u64>() + results.1.len() as u64 + 1;
                    if done.is_multiple_of(PROGRESS) {
                        eprintln!("{done} of {} tries", options.tries);
                    }
                    match result {
                        Ok(how) => *results.0.entry(how).or_default() += 1,
                        Err(why) => {
                            eprintln!("{why}");
                            results.1.push(why);
                        }
                    }
                }
            });
        }
    });
    let _ = fs::remove_dir_all(&base);
    let (good, bad) = results.into_inner().expect("the jobs have ended");
    for (how, times) in &good {
        println!("{times:6} {how}");
    }
    println!("{:6} failed", bad.len());
    ExitCode::from(u8::from(!bad.is_empty()))
}
