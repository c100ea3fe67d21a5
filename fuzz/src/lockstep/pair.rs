//! A leader and a follower: running them over the same step, and comparing them.

use std::collections::BTreeSet;
use std::sync::Arc;

use lodger_clock::{Clock, Nanos};
use lodger_guest_memory::{GuestMemory, PAGE_SIZE};
use lodger_vcpu::{Engine, EngineError, EngineVm, Entry, Exit, Vcpu, VmConfig};
use lodger_x86::{Activity, CpuState};

/// Something that reaches a vCPU from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A device wrote to RAM: address and bytes.
    Dma(u64, Box<[u8]>),
    /// A message-signalled interrupt: address and data.
    Msi(u64, u32),
    /// The level of the 8259's output.
    Intr(bool),
}

/// What goes into both vCPUs for one run.
#[derive(Debug, Clone)]
pub struct Step {
    pub inputs: Vec<Input>,
    /// Guest time, ns.
    pub now: Nanos,
    pub entry: Entry,
    /// Ticks at which it ends at the latest.
    pub limit: u64,
    /// Ticks at which it ended.
    pub end: u64,
}

impl Step {
    /// The same in parts, for a step that began at `start` ticks: an instruction that was answered outside is a part of its own, and so is an
    /// access outside at the end, so that states can be compared around them.
    pub fn parts(&self, start: u64) -> Vec<Step> {
        let mut parts = Vec::new();
        let mut rest = self.clone();
        if self.entry != Entry::Resume {
            if self.end == start {
                return vec![rest];
            }
            let limit = start + 1;
            parts.push(Step {
                limit,
                end: limit,
                ..rest.clone()
            });
            (rest.inputs, rest.entry) = (Vec::new(), Entry::Resume);
        }
        if self.end < self.limit && parts.last().is_none_or(|p| p.end < self.end) {
            parts.push(Step {
                limit: self.end,
                ..rest.clone()
            });
            rest.inputs = Vec::new();
        }
        if parts.last().is_none_or(|p| p.end < self.limit) {
            parts.push(rest);
        }
        parts
    }
}

/// Everything that both have in common at a moment, but the clock.
pub struct Checkpoint {
    pub ticks: u64,
    pub state: CpuState,
    intr: bool,
    /// Pages that are not all zeros.
    pages: Vec<(u64, Box<[u8]>)>,
}

/// An engine at work.
pub struct Side {
    pub memory: GuestMemory,
    pub vcpu: Box<dyn Vcpu>,
    vm: Arc<dyn EngineVm>,
    /// Ticks when the vCPU was made.
    base: u64,
}

impl Side {
    fn new(
        engine: &Arc<dyn Engine>,
        memory: GuestMemory,
        config: &VmConfig,
        base: u64,
    ) -> Result<Side, EngineError> {
        let vm = engine.create_vm(VmConfig {
            memory: memory.clone(),
            ..config.clone()
        })?;
        Ok(Side {
            memory,
            vcpu: vm.create_vcpu(0)?,
            vm,
            base,
        })
    }

    pub fn ticks(&self) -> u64 {
        self.base + self.vcpu.ticks()
    }

    fn give(&self, input: &Input) {
        match input {
            Input::Dma(address, bytes) => self.memory.write(*address, bytes).expect("RAM"),
            Input::Msi(address, data) => self.vm.send_msi(*address, *data),
            Input::Intr(level) => self.vm.set_intr(*level),
        }
    }

    /// Runs to `limit` ticks at most.
    pub fn run(&mut self, entry: Entry, limit: u64) -> Result<Exit, EngineError> {
        let limit = limit.saturating_sub(self.base);
        self.vcpu.set_tick_limit(Some(limit));
        self.vcpu.run(entry)
    }
}

/// The two.
pub struct Pair {
    pub leader: Side,
    pub follower: Side,
    intr: bool,
}

/// The state is at an instruction boundary: it can be stored.
pub fn is_between_instructions(exit: Exit) -> bool {
    matches!(
        exit,
        Exit::TickLimit | Exit::Kicked | Exit::Eoi(_) | Exit::Shutdown
    )
}

impl Pair {
    pub fn new(
        engines: &[Arc<dyn Engine>; 2],
        [first, second]: [GuestMemory; 2],
        config: &VmConfig,
        base: u64,
    ) -> Result<Pair, EngineError> {
        Ok(Pair {
            leader: Side::new(&engines[0], first, config, base)?,
            follower: Side::new(&engines[1], second, config, base)?,
            intr: false,
        })
    }

    /// A pair with RAM and state as they were; its clock is `clock`.
    pub fn restore(
        engines: &[Arc<dyn Engine>; 2],
        config: &VmConfig,
        checkpoint: &Checkpoint,
    ) -> Result<Pair, EngineError> {
        let memory = || GuestMemory::new(config.memory.ranges()).map_err(super::failed);
        let memories = [memory()?, memory()?];
        let mut pair = Pair::new(engines, memories, config, checkpoint.ticks)?;
        for side in [&mut pair.leader, &mut pair.follower] {
            for (address, bytes) in &checkpoint.pages {
                side.memory.write(*address, bytes).expect("RAM");
            }
            side.vcpu.load(&checkpoint.state)?;
            side.give(&Input::Intr(checkpoint.intr));
            dirty_pages(&side.memory);
        }
        pair.intr = checkpoint.intr;
        Ok(pair)
    }

    pub fn checkpoint(&mut self) -> Result<Checkpoint, EngineError> {
        let memory = &self.follower.memory;
        let mut page = vec![0; PAGE_SIZE as usize];
        let mut pages = Vec::new();
        for address in all_pages(memory) {
            memory.read(address, &mut page).expect("RAM");
            if page.iter().any(|byte| *byte != 0) {
                pages.push((address, page.clone().into()));
            }
        }
        Ok(Checkpoint {
            ticks: self.ticks(),
            state: self.follower.vcpu.store()?,
            intr: self.intr,
            pages,
        })
    }

    pub fn ticks(&self) -> u64 {
        self.leader.ticks()
    }

    /// Sets the state of both; the follower's RAM becomes the leader's.
    pub fn load(&mut self, state: &CpuState) -> Result<(), EngineError> {
        let mut page = vec![0; PAGE_SIZE as usize];
        for address in all_pages(&self.leader.memory) {
            self.leader.memory.read(address, &mut page).expect("RAM");
            if page.iter().any(|byte| *byte != 0) {
                self.follower.memory.write(address, &page).expect("RAM");
            }
        }
        self.forget_written();
        self.leader.vcpu.load(state)?;
        self.follower.vcpu.load(state)
    }

    /// What was written to the leader's RAM, by others than the vCPU if it stood still, since [`Pair::forget_written`].
    pub fn written_by_devices(&self) -> Vec<Input> {
        let read = |address| {
            let mut page = vec![0; PAGE_SIZE as usize];
            self.leader.memory.read(address, &mut page).expect("RAM");
            Input::Dma(address, page.into())
        };
        dirty_pages(&self.leader.memory)
            .into_iter()
            .map(read)
            .collect()
    }

    /// Begins anew to note what is written to the leader's RAM.
    pub fn forget_written(&self) {
        dirty_pages(&self.leader.memory);
    }

    /// What the follower alone gets.
    pub fn give_follower(&self, inputs: &[Input]) {
        inputs.iter().for_each(|input| self.follower.give(input));
    }

    /// The leader's part of a step. A kick ends it only if the vCPU has halted, or waits for
    /// time to pass: two kicks at the same instruction.
    pub fn lead(&mut self, step: &Step) -> Result<Exit, EngineError> {
        for input in &step.inputs {
            self.leader.give(input);
            self.follower.give(input);
            if let Input::Intr(level) = input {
                self.intr = *level;
            }
        }
        let mut entry = step.entry;
        let mut kicked_at = None;
        loop {
            let exit = self.leader.run(entry, step.limit)?;
            let ticks = self.leader.ticks();
            let stands = kicked_at.replace(ticks) == Some(ticks);
            if exit != Exit::Kicked
                || stands
                || self.leader.vcpu.store()?.activity != Activity::Running
            {
                return Ok(exit);
            }
            // It was just slow. Instructions do not tell where it is: it may have taken an exception since the latest one.
            entry = Entry::Resume;
        }
    }

    /// The follower's part, after which all must be as at the leader; what is not.
    pub fn follow(
        &mut self,
        step: &Step,
        exit: Exit,
        free_flags: u64,
    ) -> Result<Option<String>, EngineError> {
        let ticks = self.leader.ticks();
        let expected = match exit {
            Exit::Kicked => Exit::TickLimit,
            other => other,
        };
        let mut followed = self.follower.run(step.entry, ticks)?;
        let at_limit = followed == Exit::TickLimit && self.follower.ticks() == ticks;
        if at_limit && expected != Exit::TickLimit {
            // An exit before the next instruction is complete.
            followed = self.follower.run(Entry::Resume, ticks + 1)?;
        }
        if (followed, self.follower.ticks()) != (expected, ticks) {
            return Ok(Some(format!(
                "the leader comes to {exit:x?} after {ticks} instructions, the follower to {followed:x?} after {}",
                self.follower.ticks()
            )));
        }
        if !is_between_instructions(exit) {
            return Ok(None);
        }
        let (a, b) = self.states()?;
        Ok(state_difference(&a, &b, free_flags))
    }

    /// The leader's state and the follower's, between two instructions.
    pub fn states(&mut self) -> Result<(CpuState, CpuState), EngineError> {
        Ok((self.leader.vcpu.store()?, self.follower.vcpu.store()?))
    }

    /// Both parts; the leader's exit and what differs.
    pub fn step(
        &mut self,
        step: &Step,
        free_flags: u64,
    ) -> Result<(Exit, Option<String>), EngineError> {
        let exit = self.lead(step)?;
        Ok((exit, self.follow(step, exit, free_flags)?))
    }

    /// Where RAM differs.
    pub fn memory_difference(&self, free_flags: u64) -> Option<String> {
        self.difference_in(all_pages(&self.leader.memory), free_flags)
    }

    /// Where `pages` differ: at most so many places are named.
    pub fn difference_in(
        &self,
        pages: impl Iterator<Item = u64>,
        free_flags: u64,
    ) -> Option<String> {
        const MOST: usize = 8;
        let size = PAGE_SIZE as usize;
        let (mut a, mut b) = (vec![0; size], vec![0; size]);
        let mut found = Vec::new();
        for address in pages {
            self.leader.memory.read(address, &mut a).expect("RAM");
            self.follower.memory.read(address, &mut b).expect("RAM");
            if a == b {
                continue;
            }
            let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
            let words = a.chunks_exact(8).zip(b.chunks_exact(8)).enumerate();
            for (n, (left, right)) in words {
                let (left, right) = (word(left), word(right));
                if (left ^ right) & !free_flags != 0 {
                    let at = address + 8 * n as u64;
                    found.push(format!(
                        "RAM at {at:#x}: leader {left:#018x}, follower {right:#018x}"
                    ));
                }
            }
            if found.len() >= MOST {
                found.truncate(MOST);
                break;
            }
        }
        (!found.is_empty()).then(|| found.join("\n"))
    }

    /// Adds the pages that either has written since the last call, as far as their engines report that.
    pub fn note_written(&self, pages: &mut BTreeSet<u64>) {
        pages.extend(dirty_pages(&self.leader.memory));
        pages.extend(dirty_pages(&self.follower.memory));
    }
}

/// Guest-physical addresses of all pages of RAM.
fn all_pages(memory: &GuestMemory) -> impl Iterator<Item = u64> {
    let ranges = memory.ranges().to_vec();
    ranges
        .into_iter()
        .flat_map(|range| (range.start..range.start + range.len).step_by(PAGE_SIZE as usize))
}

/// Takes the dirty log.
fn dirty_pages(memory: &GuestMemory) -> Vec<u64> {
    let mut pages = Vec::new();
    for range in memory.ranges() {
        let first = memory.host_page(range.start).expect("a range is RAM");
        for (n, word) in first.tracker.take_dirty().into_iter().enumerate() {
            let bits = (0..64).filter(|bit| word >> bit & 1 != 0);
            pages.extend(bits.map(|bit| range.start + (64 * n as u64 + bit) * PAGE_SIZE));
        }
    }
    pages
}

/// In what the states differ, a line each.
pub fn state_difference(leader: &CpuState, follower: &CpuState, free_flags: u64) -> Option<String> {
    let mut tolerant = leader.clone();
    tolerant.rflags ^= (leader.rflags ^ follower.rflags) & free_flags;
    let elements = tolerant.differences(follower);
    if elements.is_empty() {
        return None;
    }
    let mut lines = vec![format!("the states differ in {elements:?}")];
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    let mut word = |name: &str, a: u64, b: u64| {
        if a != b {
            lines.push(format!("{name}: leader {a:#x}, follower {b:#x}"));
        }
    };
    for (n, name) in NAMES.into_iter().enumerate() {
        word(name, leader.gpr[n], follower.gpr[n]);
    }
    word("rip", leader.rip, follower.rip);
    word("rflags", tolerant.rflags, follower.rflags);
    word("cr0", leader.cr0, follower.cr0);
    word("cr2", leader.cr2, follower.cr2);
    word("cr3", leader.cr3, follower.cr3);
    word("cr4", leader.cr4, follower.cr4);
    for n in 0..16 {
        let (a, b) = (leader.fpu.ymm[n], follower.fpu.ymm[n]);
        if a != b {
            lines.push(format!("ymm{n}: leader {a:02x?}, follower {b:02x?}"));
        }
    }
    // The rest is rare; all of it then.
    let (a, b) = (format!("{tolerant:#x?}"), format!("{follower:#x?}"));
    for (a, b) in a.lines().zip(b.lines()) {
        if a != b && lines.len() < 60 {
            lines.push(format!("leader {}, follower {}", a.trim(), b.trim()));
        }
    }
    Some(lines.join("\n"))
}

/// Sets a stopped clock.
pub fn set_clock(clock: &dyn Clock, now: Nanos) {
    clock.pause();
    clock.set_now(now);
}
