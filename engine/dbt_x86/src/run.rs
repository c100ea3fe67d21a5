//! The translator in the loop of a vCPU.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lodger_host_sys::low::LowBox;
use lodger_interp::{CodeSize, Cpu, Next, RIP, Switch, Translator, canonical, seg};
use lodger_softmmu::{Direction, MmuIndex, TlbEntry};
use lodger_vcpu::EngineError;
use lodger_x86::bits::{RFlags, STATUS_FLAGS, cr4};
use lodger_x86::paging::Access;

use crate::cache::Cache;
use crate::env::{Env, Layout, SiteEntry, exit, jump_slot};
use crate::insn::Simd;
use crate::stats::{Counters, Shared};
use crate::timer::Timer;
use crate::translate::{Mode, Site, Span, Width};
use crate::traps::{self, Executing};

/// The translator of one vCPU.
pub struct Dbt {
    env: LowBox<Env>,
    cache: Cache,
    timer: Option<Timer>,
    /// When the timer expires, ns of guest time.
    due: Option<u64>,
    simd: Simd,
    counted: bool,
    /// In ring 0 and by users, the kind of code that was executed last.
    widths: [Width; 2],
    /// CR4.FSGSBASE.
    bases: bool,
    executing: Executing,
    /// The counters, for others to see.
    published: Arc<Mutex<Counters>>,
    attended: u64,
    /// Instructions with vector registers that ring 0 has executed one by one.
    ring0_vectors: u32,
    /// The TLB's when copies of its entries were made.
    tlb_age: u64,
}

// SAFETY: the pointer in `executing` is to what this owns.
unsafe impl Send for Dbt {}

fn failed(source: io::Error) -> EngineError {
    EngineError::Host {
        what: "cannot prepare the translator".into(),
        source,
    }
}

/// Vector instructions after which ring 0's code gets the registers. Kernels hardly use them, but a system without user code may.
const VECTORS: u32 = 20_000;

/// OF among the status flags.
const OF: u64 = 1 << 11;

/// Puts status flags in the form of [`Env::flags`] into RFLAGS.
fn set_status(cpu: &mut Cpu, flags: u64) {
    let status = flags >> 8 & (STATUS_FLAGS & 0xff) | if flags & 1 != 0 { OF } else { 0 };
    cpu.flags = cpu.flags & !STATUS_FLAGS | status;
}

/// The kind of code that is to be executed, if it is translated.
fn width(cpu: &Cpu) -> Option<Width> {
    const DATA: u8 = 1 << Access::Read as u8 | 1 << Access::Write as u8;
    let flat = |segment: u8, accesses: u8| cpu.flat[segment as usize] & accesses == accesses;
    match cpu.code {
        CodeSize::Bits64 => Some(Width::Bits64),
        CodeSize::Bits32 => {
            let zero = [seg::CS, seg::SS, seg::DS, seg::ES];
            let flat_at_zero = zero.iter().all(|s| cpu.bases[*s as usize] == 0)
                && zero[1..].iter().all(|s| flat(*s, DATA))
                && flat(seg::CS, 1 << Access::Execute as u8)
                && cpu.segments[seg::SS as usize].is_big();
            flat_at_zero.then(|| Width::Bits32 {
                fs: flat(seg::FS, DATA),
                gs: flat(seg::GS, DATA),
            })
        }
        CodeSize::Bits16 => None,
    }
}

impl Dbt {
    pub fn new(cpu: &Cpu, exact_flags: bool, shared: &Shared) -> Result<Dbt, EngineError> {
        // SAFETY: numbers.
        let mut env = unsafe { LowBox::<Env>::zeroed() }.map_err(failed)?;
        let layout = Layout::new(cpu, &env);
        env.sign_mask = 1 << 63;
        env.no_if_mask = !RFlags::IF.bits();
        env.no_ac_mask = !RFlags::AC.bits();
        env.no_df_mask = !RFlags::DF.bits();
        env.bit_masks = [31, 63];
        env.upper_mask = !0 << 47;
        env.sites.fill(SiteEntry::EMPTY);
        let mut cache = Cache::new(layout, cpu.vcpus(), exact_flags).map_err(failed)?;
        cache.init(&mut env);
        let range = cache.range();
        let executing = Executing {
            start: range.start,
            end: range.end,
            trap: 0,
            place: &raw mut env.trap,
        };
        let published = Arc::default();
        let mut list = shared.lock().expect("a vCPU panicked");
        list.push(Arc::clone(&published));
        Ok(Dbt {
            published,
            attended: 0,
            ring0_vectors: 0,
            tlb_age: u64::MAX,
            env,
            cache,
            timer: None,
            due: None,
            simd: Simd::default(),
            counted: false,
            widths: [Width::Bits64; 2],
            bases: false,
            executing,
        })
    }

    fn apply_changes(&mut self, cpu: &mut Cpu) {
        let changes = std::mem::take(&mut cpu.changes);
        cpu.changes.wanted = true;
        cpu.changes.timer = changes.timer;
        for page in changes.code {
            self.cache.code_written(&mut self.env, page);
        }
        if changes.all {
            self.cache.all_mappings_changed(&mut self.env);
        }
        if let Some(switch) = changes.space {
            // A processor may walk page tables at any time, but where instructions are counted it does the same each time.
            let same_tables = switch.same_tables && !self.counted && !changes.all;
            let switch = Switch {
                same_tables,
                ..switch
            };
            self.cache.switch_space(cpu, &mut self.env, switch);
        }
        for linear in changes.pages {
            self.cache.mapping_changed(&mut self.env, linear);
        }
    }

    /// Executes code from `target` on; why it was left.
    fn enter(&mut self, cpu: &mut Cpu, target: u64) -> u32 {
        let status = cpu.flags & STATUS_FLAGS;
        self.env.flags = u64::from(status & OF != 0) | (status & 0xff) << 8;
        self.env.target = target;
        self.env.wants_vectors = self.cache.has_vectors(cpu.mmu).into();
        let enter = self.cache.routines.enter;
        // SAFETY: the routine follows this convention and keeps what must be kept; the code that it runs accesses only memory of
        // the vCPU's and, after a lookup, guest RAM.
        unsafe {
            let enter: extern "sysv64" fn() = std::mem::transmute(enter);
            std::hint::black_box(&raw mut *self.env);
            std::hint::black_box(&raw mut *cpu);
            enter();
            std::hint::black_box(&raw mut *self.env);
            std::hint::black_box(&raw mut *cpu);
        }
        set_status(cpu, self.env.flags);
        // Code may have changed the privilege.
        match cpu.segments[seg::SS as usize].dpl() == cpu.cpl {
            true => cpu.update_privilege(),
            false => cpu.update_mode(),
        }
        self.env.exit as u32
    }

    /// Ring 0 has executed an instruction with vector registers, which its code does not hold.
    fn note_vectors(&mut self) {
        self.ring0_vectors += 1;
        if self.ring0_vectors == VECTORS {
            self.cache.use_vectors_in_ring0(&mut self.env);
        }
    }

    /// Runs code, counting ticks if there is a limit.
    fn run_counted(&mut self, cpu: &mut Cpu) -> Next {
        let most = match cpu.tick_limit {
            None => 0,
            Some(limit) => (limit - cpu.ticks).min(i64::MAX as u64),
        };
        self.env.ticks_left = most;
        let next = self.run_code(cpu);
        cpu.ticks += most - self.env.ticks_left;
        next
    }

    /// So many of the instructions that were counted have not been executed.
    fn refund(&mut self, count: u8) {
        self.env.ticks_left = self.env.ticks_left.wrapping_add(count.into());
    }

    /// Whether a lookup will succeed now; what it needs beside the TLB is put there.
    fn find_range(&mut self, cpu: &Cpu, start: u64, range: Span) -> bool {
        let direction = match range.write || range.stack {
            true => Direction::Write,
            false => Direction::Read,
        };
        let entry = cpu.tlb.entry(cpu.mmu, direction, start);
        let found = entry.host(start, range.len.into()).is_some();
        if found && range.stack {
            self.env.stacks[cpu.mmu as usize] = *entry;
        }
        found
    }

    /// Forgets copies of TLB entries if any may be wrong.
    fn drop_old_entries(&mut self, cpu: &Cpu) {
        if self.tlb_age != cpu.tlb.age() {
            self.tlb_age = cpu.tlb.age();
            self.env.stacks = [TlbEntry::NONE; 3];
            self.env.empty_sites();
        }
    }

    /// Prepares for running from the current state; otherwise what is to be done instead.
    fn ready(&mut self, cpu: &mut Cpu) -> Option<Next> {
        // Ring 1 and 2 have ring 0's rights to memory, but not to instructions.
        if matches!(cpu.cpl, 1 | 2) || !canonical(cpu.rip()) {
            return Some(Next::Interpret);
        }
        let Some(width) = width(cpu) else {
            return Some(Next::Interpret);
        };
        if cpu.tick_limit.is_some_and(|limit| cpu.ticks >= limit) {
            return Some(Next::Attend);
        }
        if cpu.changes.any() {
            self.apply_changes(cpu);
        }
        let simd = Simd {
            sse: cpu.sse_usable(),
            avx: cpu.avx_usable(),
        };
        let counted = cpu.tick_limit.is_some();
        let bases = cpu.cr4 & cr4::FSGSBASE != 0;
        if (counted, bases) != (self.counted, self.bases) {
            // Code of one kind and the other must not meet.
            (self.counted, self.bases) = (counted, bases);
            self.cache.all_mappings_changed(&mut self.env);
        }
        if simd != self.simd {
            self.simd = simd;
            self.cache.clear(&mut self.env);
        }
        let user = usize::from(cpu.mmu == MmuIndex::User);
        if width != self.widths[user] {
            // Neither must these.
            self.widths[user] = width;
            self.env.narrow[user] = (width != Width::Bits64).into();
            self.cache.all_mappings_changed(&mut self.env);
        }
        None
    }

    /// How code is translated now.
    fn mode(&self, cpu: &Cpu) -> Mode {
        Mode {
            width: self.widths[usize::from(cpu.mmu == MmuIndex::User)],
            mmu: cpu.mmu,
            simd: match self.cache.has_vectors(cpu.mmu) {
                true => self.simd,
                false => Simd::default(),
            },
            counted: self.counted,
            smap: cpu.cr4 & cr4::SMAP != 0,
            bases: self.bases,
            alone: false,
        }
    }

    fn run_code(&mut self, cpu: &mut Cpu) -> Next {
        // As if by an indirect jump.
        let rip = cpu.rip();
        self.env.argument = rip;
        let mut target = self.env.jumps[jump_slot(cpu.mmu, rip)];
        loop {
            self.drop_old_entries(cpu);
            let exit = self.enter(cpu, target);
            let mode = self.mode(cpu);
            self.cache.counters.entries += 1;
            match exit {
                exit::MISS => {
                    self.cache.counters.table_misses += 1;
                    let linear = self.env.argument;
                    if !canonical(linear) {
                        // The jump itself faults.
                        let site = self.cache.sites[self.env.indirect as usize];
                        let Site::Indirect { rip, undo } = site else {
                            unreachable!("noted by an indirect jump")
                        };
                        self.refund((mode.counted).into());
                        if undo > 0 {
                            let bytes = self.env.replaced.to_le_bytes();
                            // It was written a moment ago; if that is no longer possible it does not matter either.
                            let _ = cpu.write_bytes(cpu.regs[4], seg::SS, &bytes);
                        }
                        cpu.regs[4] = cpu.regs[4].wrapping_add(undo as u64);
                        cpu.set_rip(rip);
                        return Next::Interpret;
                    }
                    cpu.set_rip(linear);
                    if cpu.is_requested() {
                        return Next::Attend;
                    }
                    let Some(id) = self.cache.find(cpu, &mut self.env, linear, mode) else {
                        return Next::Interpret;
                    };
                    self.cache.enter_in_table(&mut self.env, id);
                    target = self.cache.body(id);
                }
                exit::TRAP => {
                    let (rip, trap) = self.cache.trapped(self.env.trap);
                    if !trap.saved {
                        set_status(cpu, self.env.trap_flags);
                    }
                    self.refund(trap.rest);
                    self.cache.counters.traps += 1;
                    cpu.set_rip(rip);
                    return Next::Interpret;
                }
                number => match self.cache.sites[number as usize] {
                    Site::Direct {
                        target: linear,
                        alone,
                        ..
                    } => {
                        cpu.set_rip(linear);
                        if cpu.is_requested() {
                            return Next::Attend;
                        }
                        let mode = Mode { alone, ..mode };
                        let flushes = self.cache.counters.cache_flushes;
                        let Some(mut id) = self.cache.find(cpu, &mut self.env, linear, mode) else {
                            return Next::Interpret;
                        };
                        if self.cache.is_hot_loop(&mut self.env, number, id) {
                            let Some(unrolled) = self.cache.find(cpu, &mut self.env, linear, mode)
                            else {
                                return Next::Interpret;
                            };
                            id = unrolled;
                        }
                        if self.cache.counters.cache_flushes == flushes {
                            self.cache.link(number, id);
                        }
                        target = self.cache.body(id);
                    }
                    Site::Interpret {
                        rip,
                        code,
                        vector,
                        rest,
                    } => {
                        self.refund(rest);
                        self.cache.counters.interpreted[code as usize] += 1;
                        if vector && !self.cache.has_vectors(mode.mmu) {
                            self.note_vectors();
                        }
                        cpu.set_rip(rip);
                        if self.counted {
                            return Next::Interpret;
                        }
                        if let Some(next) = cpu.interpret().or_else(|| self.ready(cpu)) {
                            return next;
                        }
                        let rip = cpu.rip();
                        self.env.argument = rip;
                        target = self.env.jumps[jump_slot(cpu.mmu, rip)];
                    }
                    Site::Access {
                        rip,
                        retry,
                        size,
                        write,
                        range,
                        entry,
                        rest,
                        ..
                    } => {
                        let access = if write { Access::Write } else { Access::Read };
                        let start = self.env.argument;
                        let linear = start.wrapping_add(range.skip.into());
                        cpu.set_rip(rip);
                        if entry.is_some() {
                            self.cache.look_at_entries(&mut self.env, retry);
                        }
                        let ready = cpu.prepare(linear, size.into(), access);
                        // What the block knows of pages must still be true.
                        if ready && cpu.tlb.age() == self.tlb_age {
                            self.cache.counters.tlb_misses += 1;
                            if self.find_range(cpu, start, range) {
                                target = retry.into();
                                continue;
                            }
                            let alone = Mode {
                                alone: true,
                                ..mode
                            };
                            let several = range.stack || range.len > size.into();
                            let found =
                                several.then(|| self.cache.find(cpu, &mut self.env, rip, alone));
                            if let Some(Some(id)) = found {
                                self.refund(rest);
                                target = self.cache.body(id);
                                continue;
                            }
                        }
                        self.refund(rest);
                        self.cache.counters.slow_accesses += 1;
                        return Next::Interpret;
                    }
                    Site::Time { rip, resume, aux } => {
                        self.cache.counters.clock_reads += 1;
                        if !cpu.read_time(aux) {
                            cpu.set_rip(rip);
                            return Next::Interpret;
                        }
                        target = resume.into();
                    }
                    Site::Requests { rip } => {
                        self.cache.counters.requests += 1;
                        cpu.set_rip(rip);
                        return Next::Attend;
                    }
                    Site::Repeat { rip, rest } => {
                        self.cache.counters.requests += 1;
                        self.refund(rest);
                        cpu.set_rip(rip);
                        return Next::Attend;
                    }
                    Site::Limit { rip, total } => {
                        self.refund(total);
                        cpu.set_rip(rip);
                        return Next::Interpret;
                    }
                    Site::Indirect { .. } => unreachable!("is never left at"),
                },
            }
        }
    }
}

impl Translator for Dbt {
    fn run(&mut self, cpu: &mut Cpu) -> Next {
        if let Some(next) = self.ready(cpu) {
            return next;
        }
        let executing = Executing {
            trap: self.cache.routines.trap,
            ..self.executing
        };
        match traps::with(executing, || self.run_counted(cpu)) {
            Ok(next) => next,
            Err(error) => {
                tracing::error!("translated code cannot be used: {error}");
                Next::Interpret
            }
        }
    }

    fn due(&mut self, cpu: &mut Cpu, deadline: Option<u64>) {
        self.attended += 1;
        if self.attended.is_multiple_of(64) {
            let mut published = self.published.lock().expect("nobody panics with it");
            published.clone_from(&self.cache.counters);
        }
        let expired = std::mem::take(&mut cpu.changes.timer);
        if deadline == self.due && !expired {
            return;
        }
        self.due = deadline;
        if self.timer.as_ref().is_none_or(|timer| !timer.is_here()) {
            self.timer = match traps::prepare().and_then(|()| Timer::new(cpu.requests())) {
                Ok(timer) => Some(timer),
                Err(error) => {
                    tracing::error!("no timer for a vCPU: {error}");
                    None
                }
            };
        }
        if let Some(timer) = &self.timer {
            // If guest time stands still, instructions must be executed between two expiries.
            let least = if expired { 20_000 } else { 1 };
            let left = |deadline: u64| deadline.saturating_sub(cpu.guest_time()).max(least);
            timer.set(deadline.map(left).map(Duration::from_nanos));
        }
    }
}

const _: () = assert!(RIP == 16 && MmuIndex::User as usize == 2);
