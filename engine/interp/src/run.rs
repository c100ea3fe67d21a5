//! The loop: blocks, events between them, and the ways out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use lodger_host_sys::low::LowBox;
use lodger_lapic::{Ipi, IpiMode, Lapic};
use lodger_native::{NativeState, StubCache};
use lodger_softmmu::{MmuIndex, Tlb};
use lodger_vcpu::{EngineError, Entry, Exit, Kick, Vcpu};
use lodger_x86::bits::{RFlags, dr6};
use lodger_x86::{Activity, CpuState, Exception, LapicState, Segment, Vector};

use crate::block::{Block, BlockCache};
use crate::breakpoint::Watch;
use crate::cpu::{CodeSize, Cpu, Event, Exec, RIP, Stop};
use crate::io::IoReplay;
use crate::translator::{Changes, Next, Translator};
use crate::vm::{Handle, Mailbox, VmShared, no_memory, request};

/// Instructions between two looks at the clock: some tens of microseconds.
const CLOCK_INTERVAL: u64 = 4096;
/// Exceptions one upon the other before the vCPU shuts down.
const MAX_DELIVERIES: u32 = 16;
/// Blocks that a crash report looks back.
const HISTORY: usize = 8;

/// When a block was entered.
#[derive(Clone, Copy)]
struct Visit {
    linear: u64,
    code: CodeSize,
    /// `ticks` then: from one visit to the next they tell how much of the block was executed.
    ticks: u64,
}

/// The latest blocks, a ring.
#[derive(Default)]
pub struct History {
    visits: [Visit; HISTORY],
    position: usize,
}

impl History {
    #[inline(always)]
    fn add(&mut self, visit: Visit) {
        self.visits[self.position % HISTORY] = visit;
        self.position += 1;
    }
}

impl Default for Visit {
    fn default() -> Visit {
        Visit {
            linear: 0,
            code: CodeSize::Bits16,
            ticks: 0,
        }
    }
}

/// What [`Cpu::take_interrupt`] found.
enum Taken {
    Nothing,
    Event(Event),
    /// The 8259 must be asked for the vector.
    Acknowledge,
}

/// An interpreted vCPU behind the engine seam.
pub struct InterpVcpu<T> {
    cpu: LowBox<Cpu>,
    translator: T,
    /// The I/O that the entry must complete.
    pending: Option<Exit>,
}

impl<T: Translator> InterpVcpu<T> {
    pub(crate) fn new(
        index: u32,
        vm: Arc<VmShared>,
        make: impl Fn(&Cpu) -> Result<T, EngineError>,
    ) -> Result<InterpVcpu<T>, EngineError> {
        let stubs = StubCache::new().map_err(no_memory)?;
        let state = CpuState::reset(index, vm.model.signature());
        let cpu = Cpu {
            regs: [0; 32],
            flags: 2,
            bases: [0; 8],
            flat: [0; 8],
            segments: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: Default::default(),
            idtr: Default::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            pdptes: [0; 4],
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            msrs: Default::default(),
            native: LowBox::new(NativeState::new()).map_err(no_memory)?,
            stubs,
            lapic: Lapic::new(LapicState::reset(index, index == 0)),
            tsc_base: 0,
            activity: Activity::Running,
            nmi_pending: false,
            nmi_blocked: false,
            shadow: false,
            cpl: 0,
            code: CodeSize::Bits16,
            stack_mask: 0xffff,
            mmu: MmuIndex::Kernel,
            watch: Watch::default(),
            tlb: Tlb::new().map_err(no_memory)?,
            changes: Changes {
                wanted: !T::ABSENT,
                ..Changes::default()
            },
            blocks: BlockCache::new(vm.vcpus.len()),
            fault: Exception::UD,
            exit: None,
            io: IoReplay::default(),
            delivering: None,
            debug_trap: 0,
            pauses: 0,
            repeating: false,
            step_trap: false,
            held_debug: None,
            eoi: None,
            check_events: true,
            waiting: 0,
            code_written: false,
            ticks: 0,
            tick_limit: None,
            next_check: 0,
            history: History::default(),
            index,
            vm,
        };
        let cpu = LowBox::new(cpu).map_err(no_memory)?;
        let mut vcpu = InterpVcpu {
            translator: make(&cpu)?,
            cpu,
            pending: None,
        };
        vcpu.cpu.load_state(&state);
        Ok(vcpu)
    }

    /// Runs blocks until there is an exit.
    fn execute(&mut self) -> Exit {
        loop {
            let c = &mut *self.cpu;
            let requests = c.vm.vcpus[c.index as usize].requests.load(SeqCst);
            if requests != 0 || c.check_events || c.ticks >= c.next_check {
                if let Some(exit) = c.attend() {
                    return exit;
                }
                if !T::ABSENT {
                    let deadline = c.timer_deadline();
                    self.translator.due(c, deadline);
                }
            }
            let stepping = c.shadow
                || c.flags & (RFlags::TF | RFlags::RF).bits() != 0
                || c.watch.any()
                || c.io.is_active();
            let translated = !T::ABSENT && !stepping;
            if translated {
                match self.translator.run(c) {
                    Next::Interpret if c.ticks < c.next_check => {}
                    Next::Interpret | Next::Attend => {
                        c.check_events = true;
                        continue;
                    }
                    Next::Again => continue,
                    Next::Stopped(stop) => {
                        if let Some(exit) = c.after(stop) {
                            return exit;
                        }
                        continue;
                    }
                }
            }
            let block = match c.block() {
                Ok(block) => block,
                Err(stop) => {
                    if let Some(exit) = c.after(stop) {
                        return exit;
                    }
                    continue;
                }
            };
            // SAFETY: a block lives until the next call of `block`.
            let block = unsafe { &*block };
            c.visit(block);
            let stop = if stepping {
                c.step(block)
            } else {
                let most = if translated { 1 } else { u64::MAX };
                c.run_block(block, most)
            };
            match stop {
                Ok(()) | Err(Stop::EndBlock) => {}
                Err(stop) => {
                    if let Some(exit) = c.after(stop) {
                        return exit;
                    }
                }
            }
        }
    }
}

impl Cpu {
    #[inline(always)]
    fn visit(&mut self, block: &Block) {
        self.history.add(Visit {
            linear: block.linear,
            code: self.code,
            ticks: self.ticks,
        });
    }

    /// Interprets the next instruction for a translator, which may go on if the result is `None`: nothing else is to be done first.
    pub fn interpret(&mut self) -> Option<Next> {
        if self.ticks >= self.next_check {
            return Some(Next::Attend);
        }
        let block = match self.block() {
            Ok(block) => block,
            Err(stop) => return Some(Next::Stopped(stop)),
        };
        // SAFETY: a block lives until the next call of `block`.
        let block = unsafe { &*block };
        self.visit(block);
        match self.run_block(block, 1) {
            Ok(()) | Err(Stop::EndBlock) => {}
            Err(stop) => return Some(Next::Stopped(stop)),
        }
        let stepping = self.shadow
            || self.flags & (RFlags::TF | RFlags::RF).bits() != 0
            || self.watch.any()
            || self.io.is_active();
        let busy = stepping || self.check_events || self.is_requested();
        busy.then_some(Next::Again)
    }

    /// Executes a block, as far as the tick limit allows.
    #[inline(always)]
    fn run_block(&mut self, block: &Block, most: u64) -> Exec {
        let most = (self.next_check - self.ticks)
            .min(block.ops.len() as u64)
            .min(most);
        for (i, op) in block.ops[..most as usize].iter().enumerate() {
            self.regs[RIP as usize] = self.regs[RIP as usize].wrapping_add(u64::from(op.len));
            if let Err(stop) = (op.run)(self, op) {
                self.ticks += i as u64;
                match stop {
                    Stop::EndBlock => self.ticks += 1,
                    _ => self.undo_rip(op.len),
                }
                return Err(stop);
            }
            if self.code_written {
                // The rest of the block may be outdated.
                self.code_written = false;
                self.ticks += i as u64 + 1;
                return Ok(());
            }
        }
        self.ticks += most;
        Ok(())
    }

    fn undo_rip(&mut self, len: u8) {
        self.regs[RIP as usize] = self.regs[RIP as usize].wrapping_sub(u64::from(len));
    }

    /// Executes the first instruction of a block with all that may have to be done around one: breakpoints, traps, the end of
    /// an interrupt shadow and of a repeated I/O.
    fn step(&mut self, block: &Block) -> Exec {
        self.step_trap = self.flag(RFlags::TF);
        let held = self.held_debug.take();
        // An IRET that sets RF means the next instruction.
        let resume = self.flag(RFlags::RF);
        if self.dr7 & 0xff != 0 && !self.flag(RFlags::RF) && held.is_none() {
            let hit = self.code_breakpoints(self.code_address());
            if hit != 0 {
                self.dr6 = self.dr6 & !0xf | hit;
                return self.raise(Exception::plain(Vector::Debug));
            }
        }
        let op = &block.ops[0];
        self.shadow = false;
        self.code_written = false;
        self.regs[RIP as usize] = self.regs[RIP as usize].wrapping_add(u64::from(op.len));
        let result = (op.run)(self, op);
        match result {
            Ok(()) | Err(Stop::EndBlock) => {
                self.ticks += 1;
                self.io.clear();
                if resume {
                    self.flags &= !RFlags::RF.bits();
                }
            }
            Err(stop) => {
                self.undo_rip(op.len);
                if stop == Stop::Io {
                    self.held_debug = held;
                }
                if stop != Stop::Again {
                    return Err(stop);
                }
                self.repeat();
            }
        }
        // The shadow of STI is over.
        self.interrupts_may_come();
        self.debug_trap |= held.unwrap_or(0);
        if self.step_trap {
            self.debug_trap |= dr6::BS;
        }
        if let Some(held) = &mut self.held_debug {
            *held |= std::mem::take(&mut self.debug_trap);
        }
        if self.debug_trap != 0 {
            self.dr6 |= std::mem::take(&mut self.debug_trap);
            // A trap: RIP is past the instruction.
            self.delivering = Some(Event::Exception(Exception::plain(Vector::Debug)));
            self.check_events = true;
        }
        Ok(())
    }

    /// A repeated string instruction is to go on. Time may have passed.
    fn repeat(&mut self) {
        self.repeating = true;
        self.check_events = true;
    }

    /// What follows from how an instruction ended. `Some`: leave.
    #[cold]
    fn after(&mut self, stop: Stop) -> Option<Exit> {
        match stop {
            Stop::EndBlock => {}
            Stop::Again => self.repeat(),
            Stop::Fault => {
                self.io.clear();
                self.debug_trap = 0;
                self.delivering = Some(Event::Exception(self.fault));
            }
            Stop::Io => return Some(self.exit.take().expect("set with Stop::Io")),
        }
        if self.delivering.is_some() {
            self.check_events = true;
        }
        None
    }

    /// Everything that is looked at between blocks: requests of other threads, time, limits, events. `Some`: leave.
    ///
    /// An instruction or a delivery that waits for the answer to an I/O goes first, so that every exit but those for
    /// I/O is at an instruction boundary with nothing half done.
    #[cold]
    #[inline(never)]
    fn attend(&mut self) -> Option<Exit> {
        let vm = Arc::clone(&self.vm);
        let mailbox = &vm.vcpus[self.index as usize];
        loop {
            self.check_events = false;
            self.serve_others();
            if let Some(event) = self.delivering {
                if let Some(exit) = self.deliver_fully(event) {
                    return Some(exit);
                }
                continue;
            }
            if self.io.is_active() {
                return None;
            }
            if mailbox.take(request::KICK) {
                self.check_events = true;
                return Some(Exit::Kicked);
            }
            if mailbox.take(request::MAIL) {
                mailbox
                    .take_messages()
                    .into_iter()
                    .for_each(|ipi| self.receive(ipi));
            }
            if mailbox.take(request::CODE) {
                self.changes.code.extend(mailbox.take_code_writes());
            }
            mailbox.take(request::LOOK);
            self.changes.timer |= mailbox.take(request::TIMER);
            if self.tick_limit.is_some_and(|limit| self.ticks >= limit) {
                self.check_events = true;
                return Some(Exit::TickLimit);
            }
            self.lapic_timer();
            let next = self.ticks + CLOCK_INTERVAL;
            self.next_check = self.tick_limit.map_or(next, |limit| next.min(limit));
            if let Some(vector) = self.eoi.take() {
                self.check_events = true;
                return Some(Exit::Eoi(vector));
            }
            match self.activity {
                Activity::Shutdown => return Some(Exit::Shutdown),
                Activity::WaitForSipi => self.sleep(mailbox, None),
                Activity::Halted if !self.wakes() => self.sleep(mailbox, self.timer_deadline()),
                Activity::Halted | Activity::Running => match self.take_interrupt() {
                    Taken::Nothing => {
                        let waits = self.lapic.pending().is_some() || self.extint();
                        self.waiting = waits.into();
                        self.repeating = false;
                        return None;
                    }
                    Taken::Event(event) => self.delivering = Some(event),
                    Taken::Acknowledge => return Some(Exit::InterruptAcknowledge),
                },
            }
        }
    }

    /// Whether something ends HLT.
    fn wakes(&self) -> bool {
        let interrupt = self.lapic.pending().is_some() || self.extint();
        self.nmi_pending && !self.nmi_blocked || interrupt && self.flag(RFlags::IF)
    }

    /// The 8259 interrupts this vCPU.
    fn extint(&self) -> bool {
        self.index == 0 && self.vm.intr.load(SeqCst) && self.lapic.takes_extint()
    }

    /// Takes an NMI or an interrupt if there is one and it may be taken.
    fn take_interrupt(&mut self) -> Taken {
        if self.shadow && self.activity == Activity::Running {
            // One instruction first; `step` makes the loop look again.
            return Taken::Nothing;
        }
        let taken = if self.nmi_pending && !self.nmi_blocked {
            self.nmi_pending = false;
            Taken::Event(Event::Nmi)
        } else if !self.flag(RFlags::IF) {
            Taken::Nothing
        } else if self.extint() {
            self.check_events = true;
            Taken::Acknowledge
        } else {
            match self.lapic.acknowledge() {
                Some(vector) => Taken::Event(Event::External(vector)),
                None => Taken::Nothing,
            }
        };
        if !matches!(taken, Taken::Nothing) {
            self.activity = Activity::Running;
        }
        taken
    }

    /// Delivers an event, and what goes wrong with it, until an instruction can be executed again.
    fn deliver_fully(&mut self, mut event: Event) -> Option<Exit> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            self.delivering = Some(event);
            match self.deliver(event) {
                Ok(()) | Err(Stop::EndBlock | Stop::Again) => break,
                Err(Stop::Io) => {
                    self.check_events = true;
                    return Some(self.exit.take().expect("set with Stop::Io"));
                }
                Err(Stop::Fault) => {
                    self.io.clear();
                    let combined = match event {
                        // Benign ones (#AC on the handler's stack) can follow each other for ever; processors hang.
                        _ if attempts == MAX_DELIVERIES => None,
                        Event::Exception(first) => Exception::combine(first.vector, self.fault),
                        _ => Some(self.fault),
                    };
                    match combined {
                        Some(next) => event = Event::Exception(next),
                        None => {
                            self.delivering = None;
                            self.activity = Activity::Shutdown;
                            return Some(Exit::Shutdown);
                        }
                    }
                }
            }
        }
        self.delivering = None;
        self.repeating = false;
        // A trap after HLT ends it.
        self.activity = Activity::Running;
        self.io.clear();
        self.debug_trap = 0;
        self.check_events = true;
        None
    }

    /// Waits for a request or until guest time reaches `deadline`.
    fn sleep(&mut self, mailbox: &Mailbox, deadline: Option<u64>) {
        let timeout = deadline.map(|d| d.saturating_sub(self.vm.clock.now()).min(1 << 40));
        if timeout != Some(0) {
            self.set_executing(false);
            mailbox.sleep(timeout.map(Duration::from_nanos));
            self.set_executing(true);
        }
    }

    /// An interrupt message arrived.
    fn receive(&mut self, ipi: Ipi) {
        match ipi.mode {
            IpiMode::Fixed | IpiMode::LowestPriority => self.lapic.accept(ipi.vector, ipi.level),
            IpiMode::Nmi => self.nmi_pending = true,
            IpiMode::Init => {
                let state = self.save_state().after_init(self.vm.model.signature());
                self.load_state(&state);
                if self.index == 0 {
                    // The bootstrap processor starts at the reset vector.
                    self.activity = Activity::Running;
                }
            }
            IpiMode::StartUp => {
                if self.activity == Activity::WaitForSipi {
                    let mut state = self.save_state();
                    state.start_up(ipi.vector);
                    self.load_state(&state);
                }
            }
        }
        self.check_events = true;
    }

    /// Takes a whole state.
    pub fn load_state(&mut self, state: &CpuState) {
        self.regs[..16].copy_from_slice(&state.gpr);
        self.set_rip(state.rip);
        self.flags = state.rflags & 0x3f_7fd7 | 2;
        self.segments = state.segments;
        (self.ldtr, self.tr) = (state.ldtr, state.tr);
        (self.gdtr, self.idtr) = (state.gdtr, state.idtr);
        (self.cr0, self.cr2, self.cr3, self.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        (self.efer, self.xcr0) = (state.efer, state.xcr0);
        (self.dr, self.dr6, self.dr7) = (state.dr, state.dr6, state.dr7);
        self.msrs = state.msrs.clone();
        self.load_fpu(&state.fpu);
        self.tsc_base = state.tsc_base;
        self.activity = state.activity;
        (self.nmi_pending, self.nmi_blocked) = (state.nmi_pending, state.nmi_blocked);
        self.shadow = state.interrupt_shadow;
        self.held_debug = state.held_debug.filter(|_| self.shadow);
        self.set_lapic(state.lapic.clone());
        let paging = self.paging();
        if paging.is_pae32()
            && let Some(pdptes) = paging.load_pdptes(&self.vm.ram)
        {
            self.pdptes = pdptes;
        }
        self.flush_all();
        self.update_mode();
        self.delivering = None;
        self.repeating = false;
        self.debug_trap = 0;
        self.io.clear();
        self.check_events = true;
    }

    /// The whole state.
    pub fn save_state(&self) -> CpuState {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs[..16]);
        CpuState {
            gpr,
            rip: self.rip(),
            rflags: self.flags,
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            xcr0: self.xcr0,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            msrs: self.msrs.clone(),
            fpu: self.save_fpu(),
            lapic: self.lapic.state().clone(),
            tsc_base: self.tsc_base,
            activity: self.activity,
            nmi_pending: self.nmi_pending,
            nmi_blocked: self.nmi_blocked,
            interrupt_shadow: self.shadow,
            held_debug: self.held_debug,
        }
    }
}

impl<T: Translator> Vcpu for InterpVcpu<T> {
    fn run(&mut self, entry: Entry) -> Result<Exit, EngineError> {
        match (self.pending.take(), entry) {
            (None, Entry::Resume) => {}
            (Some(Exit::InterruptAcknowledge), Entry::Interrupt(vector)) => {
                self.cpu.delivering = vector.map(Event::External);
            }
            (Some(exit), entry @ (Entry::Data(_) | Entry::Written)) => {
                self.cpu.io.complete(exit, entry);
            }
            (pending, entry) => panic!("entry {entry:?} does not complete {pending:?}"),
        }
        self.cpu.check_events = true;
        self.cpu.set_executing(true);
        self.cpu.serve_others();
        let exit = self.execute();
        self.cpu.set_executing(false);
        self.pending = match exit {
            Exit::PortRead { .. }
            | Exit::PortWrite { .. }
            | Exit::MmioRead { .. }
            | Exit::MmioWrite { .. }
            | Exit::InterruptAcknowledge => Some(exit),
            _ => None,
        };
        Ok(exit)
    }

    fn load(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.pending = None;
        self.cpu.load_state(state);
        Ok(())
    }

    fn store(&mut self) -> Result<CpuState, EngineError> {
        assert!(self.pending.is_none(), "an I/O is pending");
        Ok(self.cpu.save_state())
    }

    fn ticks(&self) -> u64 {
        self.cpu.ticks
    }

    fn set_tick_limit(&mut self, limit: Option<u64>) {
        self.cpu.tick_limit = limit;
        self.cpu.next_check = 0;
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Handle {
            vm: Arc::clone(&self.cpu.vm),
            index: self.cpu.index,
        })
    }

    fn recent_instructions(&self) -> Vec<(u64, String)> {
        let mut lines = VecDeque::new();
        let mut formatter = IntelFormatter::new();
        let History {
            visits,
            position: end,
        } = &self.cpu.history;
        for position in end.saturating_sub(HISTORY)..*end {
            let visit = visits[position % HISTORY];
            // After the last visit: with the instruction that was not completed.
            let last = match position + 1 == *end {
                true => self.cpu.ticks + 1,
                false => visits[(position + 1) % HISTORY].ticks,
            };
            let mut bytes = [0; 256];
            let Some(len) = self.cpu.peek_code(visit.linear, &mut bytes) else {
                continue;
            };
            let (bitness, bytes) = ([16, 32, 64][visit.code as usize], &bytes[..len]);
            let decoder = Decoder::with_ip(bitness, bytes, visit.linear, DecoderOptions::NONE);
            for instruction in decoder.into_iter().take((last - visit.ticks) as usize) {
                let mut text = String::new();
                formatter.format(&instruction, &mut text);
                lines.push_back((instruction.ip(), text));
            }
        }
        while lines.len() > 24 {
            lines.pop_front();
        }
        lines.into()
    }
}
