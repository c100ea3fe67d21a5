//! `lodger image`, the progress of a build, and the machines that a build runs.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lodger_block::{Convert, Format};
use lodger_image::{
    BuildOptions, Cache, Guest, GuestJob, ImageInfo, ImageState, ImportOptions, MOST_SEED,
    Progress, PullOutcome, Seed,
};

use crate::cli::{CloudArgs, EngineChoice, ImageCommand, ImageOptions, ImportArgs};
use crate::messages;
use crate::status::Error;

/// Carries out the command.
pub fn serve(command: &ImageCommand, quiet: bool) -> Result<ExitCode, Error> {
    let cache = Cache::open(None)?;
    match command {
        ImageCommand::List => list(&cache)?,
        ImageCommand::Build { image, options } => {
            let mut bar = Bar::new(quiet);
            let mut machine = Machine(options.engine);
            let options = build_options(options)?;
            let built = cache.build(image, &options, &mut bar, &mut machine)?;
            bar.finish();
            if !quiet {
                let dir = built.kernel.parent().unwrap_or(cache.dir());
                messages::say(format_args!("built {image} in {}", dir.display()));
            }
        }
        ImageCommand::Pull { reference, size } => pull(&cache, reference, *size, quiet)?,
        ImageCommand::Import(args) => import(&cache, args, quiet)?,
        ImageCommand::Inspect { images } => {
            let mut all = Vec::new();
            for image in images {
                all.push(cache.inspect(image)?.ok_or_else(|| Error::Named {
                    name: image.clone(),
                    what: "not built; `lodger run` does it".into(),
                })?);
            }
            messages::answer(format_args!("{:#}\n", serde_json::Value::from(all)))?;
        }
        ImageCommand::Remove { images } => {
            for image in images {
                let removed = cache.remove(image)?;
                if !quiet {
                    let what = if removed {
                        "removed"
                    } else {
                        "not built, nothing to remove"
                    };
                    messages::say(format_args!("image {image}: {what}"));
                }
            }
        }
        ImageCommand::Prune => {
            let freed = cache.prune()?;
            if !quiet {
                let freed = freed.div_ceil(1_000_000);
                messages::say(format_args!("{freed} MB freed"));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn pull(cache: &Cache, reference: &str, size: Option<u64>, quiet: bool) -> Result<(), Error> {
    let mut bar = Bar::new(quiet);
    let pulled = cache.pull(reference, size, &mut bar);
    bar.finish();
    let pulled = pulled?;
    // Its kernel, so that it can be run without the network.
    let machine = EngineChoice::Auto;
    cache.get_or_build(&pulled.reference, &mut bar, &mut Machine(machine))?;
    bar.finish();
    if !quiet {
        let how = if pulled.unchanged {
            "here already"
        } else {
            "pulled"
        };
        let PullOutcome {
            reference, digest, ..
        } = pulled;
        messages::say(format_args!("{reference}: {how} ({digest})"));
    }
    Ok(())
}

fn import(cache: &Cache, args: &ImportArgs, quiet: bool) -> Result<(), Error> {
    let mut bar = Bar::new(quiet);
    let options = ImportOptions {
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        append: args.append.clone(),
        size: args.size,
    };
    let mut problem = None;
    let mut fill = |to: &Path| {
        let job = Convert {
            from: &args.file,
            from_format: args.format,
            to,
            format: Format::Raw,
        };
        lodger_block::convert(&job, &mut |_, _| ControlFlow::Continue(())).map_err(|error| {
            problem = Some(error);
            io::Error::other("it cannot be read")
        })
    };
    let done = cache.import(&args.name, &args.file, &options, &mut bar, &mut fill);
    bar.finish();
    if let Some(problem) = problem {
        return Err(problem.into());
    }
    done?;
    if !quiet {
        messages::say(format_args!(
            "imported {} as {}",
            args.file.display(),
            args.name
        ));
    }
    Ok(())
}

/// What a guest is to be told by cloud-init, if anything.
pub fn seed(cloud: &CloudArgs, hostname: Option<&str>) -> Result<Option<Seed>, Error> {
    let read = |path: &str| {
        let file = |error: io::Error| Error::File {
            path: path.into(),
            what: error.to_string(),
        };
        let mut data = Vec::new();
        let opened = File::open(path).map_err(file)?;
        opened
            .take(MOST_SEED + 1)
            .read_to_end(&mut data)
            .map_err(file)?;
        Ok::<_, Error>(data)
    };
    let mut seed = Seed::default();
    let mut meta_data = None;
    if let Some(files) = &cloud.cloud_init {
        let files: Vec<&str> = files.split(',').collect();
        let (&[user_data] | &[user_data, _] | &[user_data, _, _]) = &files[..] else {
            let text = "--cloud-init: at most three files: USER-DATA,META-DATA,NETWORK-CONFIG";
            return Err(Error::Usage(text.into()));
        };
        seed.user_data = read(user_data)?;
        // One in between may be left out.
        let other = |index: usize| files.get(index).filter(|path| !path.is_empty());
        meta_data = other(1).map(|path| read(path)).transpose()?;
        seed.network_config = other(2).map(|path| read(path)).transpose()?;
    } else if cloud.user.is_some() || !cloud.ssh_keys.is_empty() {
        let keys = public_keys(&cloud.ssh_keys)?;
        seed.user_data = Seed::user_data(cloud.user.as_deref(), &keys);
    } else {
        return Ok(None);
    }
    seed.meta_data = meta_data.unwrap_or_else(|| Seed::meta_data(hostname, &seed.user_data));
    Ok(Some(seed))
}

fn build_options(options: &ImageOptions) -> Result<BuildOptions, Error> {
    Ok(BuildOptions {
        size: options.size,
        packages: options.packages.clone(),
        user: options.user.clone(),
        ssh_keys: public_keys(&options.ssh_keys)?,
    })
}

/// The keys in files of them.
fn public_keys(files: &[PathBuf]) -> Result<Vec<String>, Error> {
    let mut ssh_keys = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::Usage(format!("--ssh-key {}: {error}", path.display())))?;
        let keys = text.lines().map(str::trim);
        let keys: Vec<&str> = keys
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .collect();
        if keys.is_empty() || !keys.iter().all(|line| is_public_key(line)) {
            let path = path.display();
            return Err(Error::Usage(format!(
                "--ssh-key {path}: it holds no public key; the public half is in a file that ends in .pub"
            )));
        }
        ssh_keys.extend(keys.into_iter().map(str::to_owned));
    }
    Ok(ssh_keys)
}

/// A line of `authorized_keys`, see sshd(8): perhaps options, then the type of the key and the key.
fn is_public_key(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let types = ["ssh-", "ecdsa-sha2-", "sk-"];
    words.any(|word| types.iter().any(|prefix| word.starts_with(prefix))) && words.next().is_some()
}

/// Runs the machines of a build: `lodger run`, in processes of their own.
pub struct Machine(pub EngineChoice);

impl Guest for Machine {
    fn run(&mut self, job: &GuestJob, line: &mut dyn FnMut(&str)) -> Result<(), String> {
        let engine = self.0.to_possible_value();
        let engine = engine.as_ref().map_or("auto", |value| value.get_name());
        let failed = |error: io::Error| format!("cannot run a machine: {error}");
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command
            .args(["--quiet", "run", "--no-reboot", "--net", "none"])
            .args(["--engine", engine])
            .args(["--append", &job.append])
            .arg(format!("--memory={}K", job.memory >> 10))
            .arg("--kernel")
            .arg(&job.kernel)
            .arg("--initrd")
            .arg(&job.initrd);
        for disk in &job.disks {
            command.arg("--disk").arg(disk);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stdout = BufReader::new(child.stdout.take().ok_or("no output")?);
        for bytes in stdout.split(b'\n') {
            let bytes = bytes.map_err(failed)?;
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim_end_matches('\r');
            tracing::debug!("the machine of the build: {text}");
            line(text);
        }
        let mut complaint = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_string(&mut complaint).map_err(failed)?;
        }
        let status = child.wait().map_err(failed)?;
        match status.success() {
            true => Ok(()),
            false => Err(match complaint.trim() {
                "" => format!("the machine ended with {status}"),
                complaint => complaint.to_owned(),
            }),
        }
    }
}

fn list(cache: &Cache) -> Result<(), Error> {
    let line = |image: ImageInfo| {
        let state = match image.state {
            ImageState::Absent => "not built; `lodger run` does it".into(),
            ImageState::Ready {
                size,
                kernel_release,
            } => {
                let kernel = kernel_release.map(|release| format!("Linux {release}, "));
                let size = size.div_ceil(1_000_000);
                format!("{}{size} MB", kernel.unwrap_or_default())
            }
            ImageState::Damaged(reason) => format!("damaged: {reason}"),
        };
        format!(
            "{:8}  {}\n{:8}  {state}\n{:8}  {}\n",
            image.name,
            image.description,
            "",
            "",
            image.dir.display()
        )
    };
    let lines: String = cache.list().into_iter().map(line).collect();
    messages::answer(lines)
}

/// A progress bar on standard error, if that is a terminal; otherwise a line for each step.
pub struct Bar {
    bar: ProgressBar,
    quiet: bool,
}

impl Bar {
    /// Nothing is shown before the first step, and nothing at all if `quiet`.
    pub fn new(quiet: bool) -> Bar {
        Bar {
            bar: ProgressBar::hidden(),
            quiet,
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Progress for Bar {
    fn step(&mut self, what: &str, total: Option<u64>) {
        self.bar.finish_and_clear();
        if self.quiet {
            return;
        }
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::new_spinner(),
        };
        let template = match total {
            Some(_) => "{msg}  {wide_bar} {bytes}/{total_bytes}",
            None => "{spinner} {msg}",
        };
        bar.set_draw_target(ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        if bar.is_hidden() {
            messages::say(what);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        self.bar = bar;
    }

    fn advance(&mut self, done: u64) {
        self.bar.set_position(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_keys() {
        for (line, expected) in [
            ("ssh-ed25519 AAAAC3Nza me@host", true),
            ("sk-ssh-ed25519@openssh.com AAAAG", true),
            ("no-pty,command=\"a b\" ecdsa-sha2-nistp256 AAAAE", true),
            ("ssh-ed25519", false),
            ("-----BEGIN OPENSSH PRIVATE KEY-----", false),
            ("debian", false),
        ] {
            assert_eq!(is_public_key(line), expected, "{line}");
        }
    }
}
