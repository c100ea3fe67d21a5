//! From a difference at the end of a chunk to the instruction that caused it.
//!
//! The steps since the checkpoint are repeated with new engines, comparing also the RAM that they write, which may have differed
//! before the registers did. Then the end of the first step that differs is moved to the earliest instruction behind which something differs,
//! and its beginning to the latest from which it still does. What is left is usually one block of a translator.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;

use lodger_clock::SharedClock;
use lodger_clock::manual::ManualClock;
use lodger_vcpu::{Engine, EngineError, Entry, Exit, VmConfig};

use super::listing;
use super::pair::{Checkpoint, Pair, Step, is_between_instructions, set_clock};

/// Instructions before the one at which engines part that are shown, and tried as beginnings.
const SHOWN: u64 = 64;

pub struct Search<'a> {
    pub engines: &'a [Arc<dyn Engine>; 2],
    pub config: &'a VmConfig,
    pub free_flags: u64,
}

/// A pair that repeats steps.
struct Repeat {
    pair: Pair,
    clock: SharedClock,
    written: BTreeSet<u64>,
    free_flags: u64,
}

impl Repeat {
    /// What differs after a step.
    fn step(&mut self, step: &Step) -> Result<(Exit, Option<String>), EngineError> {
        set_clock(&*self.clock, step.now);
        let (exit, found) = self.pair.step(step, self.free_flags)?;
        self.pair.note_written(&mut self.written);
        let pages = self.written.iter().copied();
        let memory = self.pair.difference_in(pages, self.free_flags);
        let found = [found, memory]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("\n");
        Ok((exit, (!found.is_empty()).then_some(found)))
    }
}

impl Search<'_> {
    fn repeat(&self, checkpoint: &Checkpoint) -> Result<Repeat, EngineError> {
        let clock = ManualClock::new(self.config.clock.wall() - self.config.clock.now());
        let clock: SharedClock = clock;
        let config = VmConfig {
            clock: Arc::clone(&clock),
            ..self.config.clone()
        };
        Ok(Repeat {
            pair: Pair::restore(self.engines, &config, checkpoint)?,
            clock,
            written: BTreeSet::new(),
            free_flags: self.free_flags,
        })
    }

    /// A text about the difference `found` at the end of `steps`, which began at `checkpoint`.
    pub fn explain(&self, checkpoint: &Checkpoint, steps: &[Step], found: String) -> String {
        let mut text = format!(
            "the engines differ, {} steps and {} instructions after the last comparison of RAM:\n{found}\n",
            steps.len(),
            steps.last().map_or(0, |s| s.limit - checkpoint.ticks),
        );
        if let Err(error) = self.narrow(checkpoint, steps, &mut text) {
            let _ = writeln!(text, "the search failed: {error}");
        }
        text
    }

    fn narrow(
        &self,
        checkpoint: &Checkpoint,
        steps: &[Step],
        text: &mut String,
    ) -> Result<(), EngineError> {
        let mut repeat = self.repeat(checkpoint)?;
        let mut first = None;
        // The latest step before which the states have been compared.
        let mut clean = 0;
        for (n, step) in steps.iter().enumerate() {
            let (exit, found) = repeat.step(step)?;
            if let Some(found) = found {
                first = Some((n, exit, found));
                break;
            }
            if is_between_instructions(exit) {
                clean = n + 1;
            }
        }
        let Some((last, exit, found)) = first else {
            *text += "It does not happen again from there on with new engines: what they have cached from before matters.\n";
            return self.show(checkpoint, steps, text);
        };
        let _ = writeln!(
            text,
            "Repeated: the first difference is at the end of step {last} ({exit:x?}), {} instructions:\n{found}",
            repeat.pair.ticks()
        );
        drop(repeat);

        let mut repeat = self.repeat(checkpoint)?;
        for step in &steps[..clean] {
            repeat.step(step)?;
        }
        let near = repeat.pair.checkpoint()?;
        drop(repeat);
        let mut parts = Vec::new();
        let mut start = near.ticks;
        for step in &steps[clean..=last] {
            parts.extend(step.parts(start));
            start = step.end;
        }
        let mut repeat = self.repeat(&near)?;
        let different = parts.iter().position(|part| {
            let result = repeat.step(part);
            result.is_err() || result.is_ok_and(|(_, found)| found.is_some())
        });
        drop(repeat);
        let Some(different) = different else {
            *text += "It does not happen if the engines begin anew at that step.\n";
            return self.show(&near, &parts, text);
        };
        let (before, step) = (&parts[..different], &parts[different]);
        if step.entry != Entry::Resume {
            *text += "It is the instruction that was answered outside of RAM.\n";
            return self.show(&near, &parts[..=different], text);
        }
        let mut repeat = self.repeat(&near)?;
        for part in before {
            repeat.step(part)?;
        }
        let near = repeat.pair.checkpoint()?;
        drop(repeat);
        let Some(end) = self.earliest_end(&near, step, step.end)? else {
            *text += "It does not happen if the engines begin anew at that step.\n";
            return self.show(&near, &parts[different..=different], text);
        };
        self.latest_begin(&near, step, end, text)
    }

    /// Shows what the follower executes in the last step that begins between two instructions, and behind it.
    fn show(
        &self,
        checkpoint: &Checkpoint,
        steps: &[Step],
        text: &mut String,
    ) -> Result<(), EngineError> {
        let last = steps.iter().rposition(|s| s.entry == Entry::Resume);
        let (Some(last), Some(end)) = (last, steps.last().map(|s| s.end)) else {
            return Ok(());
        };
        let mut repeat = self.repeat(checkpoint)?;
        for step in &steps[..last] {
            repeat.step(step)?;
        }
        set_clock(&*repeat.clock, steps[last].now);
        *text += "The follower executes:\n";
        *text += &listing::trace(&mut repeat.pair, &steps[last], end)?;
        Ok(())
    }

    /// Whether something differs at `end` if both begin at `near`.
    fn differs(
        &self,
        near: &Checkpoint,
        step: &Step,
        end: u64,
    ) -> Result<Option<String>, EngineError> {
        let mut repeat = self.repeat(near)?;
        let step = Step {
            limit: end,
            end,
            ..step.clone()
        };
        Ok(repeat.step(&step)?.1)
    }

    /// The smallest number of ticks up to `end` after which something differs.
    fn earliest_end(
        &self,
        near: &Checkpoint,
        step: &Step,
        end: u64,
    ) -> Result<Option<u64>, EngineError> {
        if self.differs(near, step, end)?.is_none() {
            return Ok(None);
        }
        // Equal at `low`, different at `high`.
        let (mut low, mut high) = (near.ticks, end);
        while high - low > 1 {
            let middle = low.midpoint(high);
            match self.differs(near, step, middle)? {
                Some(_) => high = middle,
                None => low = middle,
            }
        }
        Ok(Some(high))
    }

    /// Tries later and later beginnings, and reports.
    fn latest_begin(
        &self,
        near: &Checkpoint,
        step: &Step,
        end: u64,
        text: &mut String,
    ) -> Result<(), EngineError> {
        let later = |begin: u64| -> Result<(Checkpoint, Step), EngineError> {
            let mut repeat = self.repeat(near)?;
            let to = Step {
                limit: begin,
                ..step.clone()
            };
            repeat.step(&to)?;
            let rest = Step {
                inputs: Vec::new(),
                ..step.clone()
            };
            Ok((repeat.pair.checkpoint()?, rest))
        };
        let earliest = near.ticks.max(end.saturating_sub(SHOWN));
        let mut begin = None;
        for ticks in (earliest.max(near.ticks + 1)..end).rev() {
            let (checkpoint, rest) = later(ticks)?;
            if let Some(found) = self.differs(&checkpoint, &rest, end)? {
                begin = Some((checkpoint, rest, found));
                break;
            }
        }
        let (from, rest, found) = match begin {
            Some(begin) => begin,
            None => {
                let found = self.differs(near, step, end)?.unwrap_or_default();
                let mut repeat = self.repeat(near)?;
                (repeat.pair.checkpoint()?, step.clone(), found)
            }
        };
        let _ = writeln!(
            text,
            "Smallest: both begin equal after {} instructions and differ after {end}:\n{found}\n\
             The follower executes:",
            from.ticks
        );
        let mut repeat = self.repeat(&from)?;
        set_clock(&*repeat.clock, rest.now);
        *text += &listing::registers(&from.state);
        *text += &listing::trace(&mut repeat.pair, &rest, end)?;
        if self.free_flags != 0 {
            self.flags_before(near, step, end, text)?;
        }
        Ok(())
    }

    /// Tells where flags differed that may, if they are not needed any more: perhaps they were.
    fn flags_before(
        &self,
        near: &Checkpoint,
        step: &Step,
        end: u64,
        text: &mut String,
    ) -> Result<(), EngineError> {
        for ticks in near.ticks.max(end.saturating_sub(SHOWN / 2))..end {
            let mut repeat = self.repeat(near)?;
            let step = Step {
                limit: ticks,
                ..step.clone()
            };
            repeat.step(&step)?;
            let (a, b) = repeat.pair.states()?;
            if a.rflags != b.rflags {
                let _ = writeln!(
                    text,
                    "flags before {:x}, after {ticks} instructions: leader {:x}, follower {:x}",
                    b.rip, a.rflags, b.rflags
                );
            }
        }
        Ok(())
    }
}
