//! Lock-step: one guest on two engines at once, until they differ.
//!
//! [`Lockstep`] is an engine whose vCPU is a *leader* (the engine to be proved, a translator say) and a *follower* (the reference). Each
//! has its own RAM. The leader runs until an exit or to the end of a chunk of so many instructions; the follower runs to
//! the same instruction count and must come to the same exit; then both states must be equal, and now and then all of RAM.
//!
//! Nothing may reach one of them and not the other: guest time is a [`ManualClock`] that moves only between two chunks, as a function
//! of the instructions that were executed; interrupts wait for the end of a chunk and go to both; devices that write to RAM by
//! themselves stand still during a chunk ([`Lockstep::new`]), and what they wrote is copied. So what went in since the last
//! [`Checkpoint`] is all that [`search`] needs to find the instruction at which the engines part.
//!
//! Limits: one vCPU; both engines count instructions exactly. Flags given as [`Options::free_flags`] may differ, in registers and where
//! they were saved in memory.

mod listing;
mod pair;
mod search;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lodger_clock::manual::ManualClock;
use lodger_clock::{Clock, Nanos};
use lodger_guest_memory::GuestMemory;
use lodger_lapic::{Deadline, Lapic};
use lodger_vcpu::{Capabilities, Engine, EngineError, EngineVm, Entry, Exit, Kick, Vcpu, VmConfig};
use lodger_x86::{Activity, CpuState};

use pair::{Checkpoint, Input, Pair, Step};

/// How engines are compared.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Instructions between two comparisons.
    pub chunk: u64,
    /// Instructions between two comparisons of RAM; from the latest one on a difference is searched.
    pub checkpoint: u64,
    /// Guest time that an instruction takes, in ns.
    pub ns_per_instruction: u64,
    /// RFLAGS bits in which the leader may differ.
    pub free_flags: u64,
}

/// Both engines as one.
pub struct Lockstep {
    leader: Arc<dyn Engine>,
    follower: Arc<dyn Engine>,
    clock: Arc<ManualClock>,
    hold_devices: HoldDevices,
    options: Options,
}

/// Stops (true) all that writes to RAM but the vCPU, or lets it go on.
pub type HoldDevices = Arc<dyn Fn(bool) + Send + Sync>;

impl Lockstep {
    /// `clock` must be the machine's, and nobody else may advance it.
    pub fn new(
        leader: Arc<dyn Engine>,
        follower: Arc<dyn Engine>,
        clock: Arc<ManualClock>,
        hold_devices: HoldDevices,
        options: Options,
    ) -> Lockstep {
        Lockstep {
            leader,
            follower,
            clock,
            hold_devices,
            options,
        }
    }
}

impl Engine for Lockstep {
    fn name(&self) -> &'static str {
        "lockstep"
    }

    fn probe(&self) -> Result<Capabilities, EngineError> {
        for engine in [&self.leader, &self.follower] {
            if !engine.probe()?.exact_ticks {
                return Err(EngineError::Unusable {
                    engine: engine.name(),
                    why: "it does not count instructions exactly".into(),
                });
            }
        }
        Ok(Capabilities {
            max_vcpus: 1,
            ..self.leader.probe()?
        })
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError> {
        self.probe()?;
        Ok(Arc::new(LockstepVm {
            shared: Arc::default(),
            engines: [Arc::clone(&self.leader), Arc::clone(&self.follower)],
            clock: Arc::clone(&self.clock),
            hold_devices: Arc::clone(&self.hold_devices),
            options: self.options,
            config,
        }))
    }
}

/// What arrives for the vCPU from other threads.
#[derive(Default)]
struct Shared {
    inputs: Mutex<Vec<Input>>,
    kicked: AtomicBool,
    /// The number of the leader's run, odd while it runs.
    runs: AtomicU64,
}

impl Shared {
    fn inputs(&self) -> MutexGuard<'_, Vec<Input>> {
        self.inputs.lock().expect("a device panicked")
    }
}

struct LockstepVm {
    shared: Arc<Shared>,
    engines: [Arc<dyn Engine>; 2],
    clock: Arc<ManualClock>,
    hold_devices: HoldDevices,
    options: Options,
    config: VmConfig,
}

impl EngineVm for LockstepVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        assert_eq!(index, 0, "one vCPU");
        let memory = GuestMemory::new(self.config.memory.ranges()).map_err(failed)?;
        let memories = [self.config.memory.clone(), memory];
        let pair = Pair::new(&self.engines, memories, &self.config, 0)?;
        watch_for_sleep(&self.shared, pair.leader.vcpu.kicker());
        Ok(Box::new(LockstepVcpu {
            next: self.options.chunk,
            limit: None,
            shared: Arc::clone(&self.shared),
            engines: self.engines.clone(),
            clock: Arc::clone(&self.clock),
            hold_devices: Arc::clone(&self.hold_devices),
            options: self.options,
            config: self.config.clone(),
            idle: 0,
            log: Vec::new(),
            checkpoint: None,
            due: 0,
            pair,
        }))
    }

    fn send_msi(&self, address: u64, data: u32) {
        self.shared.inputs().push(Input::Msi(address, data));
    }

    fn set_intr(&self, level: bool) {
        self.shared.inputs().push(Input::Intr(level));
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> EngineError {
    EngineError::Host {
        what: "cannot get the follower's memory".into(),
        source: std::io::Error::other(error),
    }
}

/// A halted leader waits inside `run` for an interrupt, which can only come when it has left. So it is kicked when it runs for long.
fn watch_for_sleep(shared: &Arc<Shared>, leader: Arc<dyn Kick>) {
    let shared = Arc::downgrade(shared);
    std::thread::spawn(move || {
        let mut before = 0;
        while let Some(shared) = shared.upgrade() {
            let now = shared.runs.load(Ordering::Acquire);
            if now == before && now % 2 == 1 {
                leader.kick();
            }
            before = now;
            drop(shared);
            std::thread::sleep(Duration::from_millis(2));
        }
    });
}

struct LockstepVcpu {
    pair: Pair,
    shared: Arc<Shared>,
    engines: [Arc<dyn Engine>; 2],
    clock: Arc<ManualClock>,
    hold_devices: HoldDevices,
    options: Options,
    config: VmConfig,
    /// Ticks at which the chunk ends.
    next: u64,
    /// The limit from outside.
    limit: Option<u64>,
    /// Guest time spent waiting, ns.
    idle: Nanos,
    /// What was done since the checkpoint.
    log: Vec<Step>,
    checkpoint: Option<Checkpoint>,
    /// Ticks at which the next checkpoint is due.
    due: u64,
}

/// Guest time in ns that is not waited for.
const SOON: Nanos = 50_000;

/// What a person reads when the engines differ.
fn difference(text: String) -> EngineError {
    EngineError::Internal(text)
}

impl LockstepVcpu {
    /// Guest time is a function of the instructions executed.
    fn advance_clock(&self) {
        let target = self.pair.ticks() * self.options.ns_per_instruction + self.idle;
        self.clock.advance(target.saturating_sub(self.clock.now()));
    }

    fn step(&mut self, entry: Entry) -> Result<Exit, EngineError> {
        (self.hold_devices)(true);
        let mut inputs = self.pair.written_by_devices();
        inputs.append(&mut self.shared.inputs());
        let mut step = Step {
            inputs,
            now: self.clock.now(),
            entry,
            limit: self.limit.map_or(self.next, |limit| limit.min(self.next)),
            end: 0,
        };
        self.shared.runs.fetch_add(1, Ordering::AcqRel);
        let exit = self.pair.lead(&step);
        self.shared.runs.fetch_add(1, Ordering::AcqRel);
        let exit = exit?;
        step.end = self.pair.ticks();
        if exit == Exit::Kicked {
            step.limit = step.end;
        }
        let found = self.pair.follow(&step, exit, self.options.free_flags)?;
        self.pair.forget_written();
        (self.hold_devices)(false);
        self.log.push(step);
        match found {
            None => Ok(exit),
            Some(found) => Err(self.report(found)),
        }
    }

    fn report(&self, found: String) -> EngineError {
        let Some(checkpoint) = &self.checkpoint else {
            return difference(found);
        };
        let search = search::Search {
            engines: &self.engines,
            config: &self.config,
            free_flags: self.options.free_flags,
        };
        difference(search.explain(checkpoint, &self.log, found))
    }

    /// Compares RAM, and notes everything as it is.
    fn check(&mut self) -> Result<(), EngineError> {
        if let Some(found) = self.pair.memory_difference(self.options.free_flags) {
            return Err(self.report(found));
        }
        self.checkpoint = Some(self.pair.checkpoint()?);
        self.log.clear();
        self.due = self.pair.ticks() + self.options.checkpoint;
        Ok(())
    }

    /// Guest time in ns at which the local APIC's timer expires.
    fn timer_deadline(&self, state: &CpuState) -> Option<Nanos> {
        match Lapic::new(state.lapic.clone()).next_deadline()? {
            Deadline::Ns(ns) => Some(ns),
            Deadline::Tsc(tsc) => {
                let cycles = u128::from(tsc.saturating_sub(state.tsc_base));
                let khz = u128::from(self.config.model.tsc_khz.max(1));
                Some((cycles * 1_000_000).div_ceil(khz) as u64)
            }
        }
    }

    /// Skips a short wait for the timer: an engine that watches it by host time must not find it about to expire in guest time that
    /// stands still.
    fn skip_to_timer(&mut self, state: &CpuState) {
        let now = self.clock.now();
        if let Some(deadline) = self.timer_deadline(state)
            && (now..now + SOON).contains(&deadline)
        {
            self.idle += deadline - now;
            self.advance_clock();
        }
    }

    /// Lets time pass until something may wake the halted vCPU. False: nothing will.
    fn wait(&mut self, state: &CpuState) -> bool {
        let own = self.timer_deadline(state);
        let next = [own, self.clock.next_deadline()].into_iter().flatten();
        let Some(next) = next.min() else {
            return false;
        };
        self.idle += next.saturating_sub(self.clock.now());
        self.advance_clock();
        true
    }
}

impl Vcpu for LockstepVcpu {
    fn run(&mut self, mut entry: Entry) -> Result<Exit, EngineError> {
        loop {
            if entry == Entry::Resume && self.pair.ticks() >= self.due {
                self.check()?;
            }
            let exit = self.step(entry)?;
            self.advance_clock();
            match exit {
                Exit::TickLimit => {
                    if self.pair.ticks() >= self.next {
                        self.next += self.options.chunk;
                    }
                    if self.limit.is_some_and(|limit| self.pair.ticks() >= limit) {
                        return Ok(exit);
                    }
                }
                Exit::Kicked => {}
                _ => return Ok(exit),
            }
            if self.shared.kicked.swap(false, Ordering::AcqRel) {
                return Ok(Exit::Kicked);
            }
            let state = self.pair.follower.vcpu.store()?;
            self.skip_to_timer(&state);
            if state.activity == Activity::Halted
                && self.shared.inputs().is_empty()
                && !self.wait(&state)
            {
                let why = "the guest waits for an interrupt that will not come";
                return Err(EngineError::Internal(why.into()));
            }
            entry = Entry::Resume;
        }
    }

    fn load(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.pair.load(state)?;
        self.due = self.pair.ticks();
        self.checkpoint = None;
        Ok(())
    }

    fn store(&mut self) -> Result<CpuState, EngineError> {
        self.pair.follower.vcpu.store()
    }

    fn ticks(&self) -> u64 {
        self.pair.ticks()
    }

    fn set_tick_limit(&mut self, limit: Option<u64>) {
        self.limit = limit;
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(Arc::clone(&self.shared)))
    }
}

struct Kicker(Arc<Shared>);

impl Kick for Kicker {
    fn kick(&self) {
        self.0.kicked.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodger_guest_memory::RamRange;
    use lodger_interp::InterpEngine;
    use lodger_x86::{CpuModel, HostFeatures};

    const CODE: u64 = 0x1000;

    /// The interpreter, but at a multiple of 4 the `INC AX` at [`CODE`] also changes what is chosen here.
    struct Wrong(fn(&mut CpuState, &GuestMemory));

    impl Engine for Wrong {
        fn name(&self) -> &'static str {
            "wrong"
        }
        fn probe(&self) -> Result<Capabilities, EngineError> {
            InterpEngine.probe()
        }
        fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError> {
            let memory = config.memory.clone();
            let vm = InterpEngine.create_vm(config)?;
            Ok(Arc::new(WrongVm(vm, memory, self.0)))
        }
    }

    struct WrongVm(
        Arc<dyn EngineVm>,
        GuestMemory,
        fn(&mut CpuState, &GuestMemory),
    );

    impl EngineVm for WrongVm {
        fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
            Ok(Box::new(WrongVcpu {
                vcpu: self.0.create_vcpu(index)?,
                memory: self.1.clone(),
                harm: self.2,
                limit: None,
            }))
        }
        fn send_msi(&self, address: u64, data: u32) {
            self.0.send_msi(address, data);
        }
        fn set_intr(&self, level: bool) {
            self.0.set_intr(level);
        }
    }

    struct WrongVcpu {
        vcpu: Box<dyn Vcpu>,
        memory: GuestMemory,
        harm: fn(&mut CpuState, &GuestMemory),
        limit: Option<u64>,
    }

    impl Vcpu for WrongVcpu {
        fn run(&mut self, mut entry: Entry) -> Result<Exit, EngineError> {
            let limit = self.limit.unwrap_or(u64::MAX);
            loop {
                self.vcpu
                    .set_tick_limit(Some(limit.min(self.vcpu.ticks() + 1)));
                let exit = self.vcpu.run(entry)?;
                if exit != Exit::TickLimit {
                    return Ok(exit);
                }
                let mut state = self.vcpu.store()?;
                if state.rip == CODE + 1 && state.gpr[0].is_multiple_of(4) {
                    (self.harm)(&mut state, &self.memory);
                    self.vcpu.load(&state)?;
                }
                if self.vcpu.ticks() >= limit {
                    return Ok(exit);
                }
                entry = Entry::Resume;
            }
        }
        fn load(&mut self, state: &CpuState) -> Result<(), EngineError> {
            self.vcpu.load(state)
        }
        fn store(&mut self) -> Result<CpuState, EngineError> {
            self.vcpu.store()
        }
        fn ticks(&self) -> u64 {
            self.vcpu.ticks()
        }
        fn set_tick_limit(&mut self, limit: Option<u64>) {
            self.limit = limit;
        }
        fn kicker(&self) -> Arc<dyn Kick> {
            self.vcpu.kicker()
        }
    }

    /// Runs `INC AX; OUT 80, AL; JMP` from AX = `ax` for `ticks` instructions.
    fn run(leader: Arc<dyn Engine>, ax: u64, ticks: u64) -> Result<Exit, String> {
        let clock = ManualClock::new(1 << 60);
        let options = Options {
            chunk: 10,
            checkpoint: 50,
            ns_per_instruction: 1,
            free_flags: 0,
        };
        let follower = Arc::new(InterpEngine);
        let engine = Lockstep::new(leader, follower, clock.clone(), Arc::new(|_| {}), options);
        let memory = GuestMemory::new(&[RamRange {
            start: 0,
            len: 0x1_0000,
        }])
        .expect("RAM");
        memory
            .write(CODE, &[0x40, 0xe6, 0x80, 0xeb, 0xfb])
            .expect("RAM");
        let model = CpuModel::named("v3", 1, &HostFeatures::default(), 1_000_000).expect("v3");
        let vm = engine
            .create_vm(VmConfig {
                memory,
                clock,
                model: Arc::new(model),
                vcpus: 1,
                entropy: Arc::new(|bytes| bytes.fill(0)),
            })
            .expect("a VM");
        let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
        let mut state = CpuState::reset(0, 0);
        state.segments[1] = state.segments[0];
        (state.rip, state.gpr[0]) = (CODE, ax);
        vcpu.load(&state).expect("a state");
        vcpu.set_tick_limit(Some(ticks));
        let mut entry = Entry::Resume;
        loop {
            match vcpu.run(entry).map_err(|e| e.to_string())? {
                Exit::PortWrite { .. } => entry = Entry::Written,
                exit => return Ok(exit),
            }
        }
    }

    #[test]
    fn equal_engines_run_to_the_end() {
        assert_eq!(run(Arc::new(InterpEngine), 0, 1000), Ok(Exit::TickLimit));
    }

    #[test]
    fn the_instruction_is_found_behind_which_registers_differ() {
        let wrong = Wrong(|state, _| state.gpr[3] ^= 0x10);
        let text = run(Arc::new(wrong), 1, 1000).expect_err("they differ");
        // AX becomes 4 in the third round.
        assert!(text.contains("rbx: leader 0x10, follower 0x0"), "{text}");
        assert!(text.contains("differ after 7"), "{text}");
        assert!(text.contains("inc ax"), "{text}");
    }

    #[test]
    fn memory_that_no_register_shows_is_found() {
        let wrong = Wrong(|_, memory| memory.write(0x2345, &[7]).expect("RAM"));
        let text = run(Arc::new(wrong), 1, 1000).expect_err("they differ");
        assert!(text.contains("RAM at 0x2340"), "{text}");
        assert!(text.contains("differ after 7"), "{text}");
    }
}
