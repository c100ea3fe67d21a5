//! `lodger image`, and the progress of a build.

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lodger_image::{Cache, ImageInfo, ImageState, Progress};

use crate::cli::ImageCommand;
use crate::messages;
use crate::status::Error;

/// Carries out the command.
pub fn serve(command: &ImageCommand, quiet: bool) -> Result<ExitCode, Error> {
    let cache = Cache::open(None)?;
    match command {
        ImageCommand::List => list(&cache)?,
        ImageCommand::Build { image } => {
            let mut bar = Bar::new(quiet);
            let built = cache.build(image, &mut bar)?;
            bar.finish();
            if !quiet {
                let dir = built.kernel.parent().unwrap_or(cache.dir());
                messages::say(format_args!("built {image} in {}", dir.display()));
            }
        }
        ImageCommand::Remove { image } => {
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
    Ok(ExitCode::SUCCESS)
}

fn list(cache: &Cache) -> Result<(), Error> {
    let line = |image: ImageInfo| {
        let state = match image.state {
            ImageState::Absent => "not built; `lodger run` does it".into(),
            ImageState::Ready {
                size,
                kernel_release,
            } => format!("Linux {kernel_release}, {} MB", size.div_ceil(1_000_000)),
            ImageState::Damaged(reason) => format!("damaged, will be built anew: {reason}"),
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
