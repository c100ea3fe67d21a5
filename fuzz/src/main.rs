//! Runs the fuzz targets: `lodger-fuzz [TARGET] [--seconds N] [--runs N] [--seed N]`. Without a target, all of them.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use lodger_fuzz::TARGETS;
use lodger_fuzz::runner::{Bound, run};

const USAGE: &str = "usage: lodger-fuzz [TARGET] [--seconds N] [--runs N] [--seed N]";

struct Options {
    target: Option<String>,
    seed: u64,
    bound: Bound,
}

fn options() -> Result<Options, String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let mut options = Options {
        target: None,
        seed: now.map_or(0, |d| d.as_micros() as u64),
        bound: Bound {
            runs: u64::MAX,
            time: Duration::from_secs(10),
        },
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let value = arguments.next().and_then(|v| v.parse::<u64>().ok());
            value.ok_or_else(|| format!("{argument} wants a number\n{USAGE}"))
        };
        match argument.as_str() {
            "--seconds" => options.bound.time = Duration::from_secs(number()?),
            "--runs" => options.bound.runs = number()?,
            "--seed" => options.seed = number()?,
            name if TARGETS.iter().any(|t| t.name == name) => options.target = Some(argument),
            _ => {
                let names: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
                return Err(format!("{USAGE}\ntargets: {}", names.join(" ")));
            }
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    for target in TARGETS {
        if (options.target.as_ref()).is_some_and(|name| name != target.name) {
            continue;
        }
        match run(target, options.seed, options.bound) {
            Ok(runs) => println!("{}: {runs} inputs from seed {}", target.name, options.seed),
            Err(failure) => {
                eprintln!("{}: {failure}", target.name);
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
