//! The seam to an engine that runs most code translated and leaves the rest to the interpreter.
//!
//! Such an engine is a [`Translator`] in the loop of an interpreted vCPU. State, TLB, events, interrupts and everything that it does not
//! translate are the interpreter's.

use std::sync::atomic::{AtomicU32, Ordering};

use lodger_x86::bits::{cr0, cr4, xcr0};

use crate::cpu::{Cpu, Stop};

/// Runs guest code, beside the interpreter, on the same state.
pub trait Translator: Send + Sized {
    /// It never runs anything: the interpreter alone.
    const ABSENT: bool = false;

    /// Runs from the current state, which is at an instruction boundary where nothing else is to be done first: no event, no
    /// breakpoint, no single step. It looks at [`Cpu::changes`] before it uses anything that it has cached.
    fn run(&mut self, cpu: &mut Cpu) -> Next;

    /// Events have been looked at; the next one that guest time brings is due at `deadline` (ns of guest time). A translator that does not
    /// look at the clock must see to it that the vCPU gets a request then.
    fn due(&mut self, cpu: &mut Cpu, deadline: Option<u64>);
}

/// What is to be done after [`Translator::run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Look at requests and events, then go on.
    Attend,
    /// Interpret one instruction, then go on.
    Interpret,
    /// Go on, at the loop's beginning.
    Again,
    /// An interpreted instruction has ended in this way.
    Stopped(Stop),
}

impl Cpu {
    /// The word of request bits; if it is not zero, the vCPU must come back to attend to them.
    pub fn requests(&self) -> &AtomicU32 {
        &self.vm.vcpus[self.index as usize].requests
    }

    /// Whether there are requests.
    pub fn is_requested(&self) -> bool {
        self.requests().load(Ordering::Acquire) != 0
    }

    /// vCPUs of the VM.
    pub fn vcpus(&self) -> usize {
        self.vm.vcpus.len()
    }

    /// Guest time in ns.
    pub fn guest_time(&self) -> u64 {
        self.vm.clock.now()
    }

    /// Whether instructions with XMM registers may be executed (no #UD, no #NM).
    pub fn sse_usable(&self) -> bool {
        self.cr0 & (cr0::EM | cr0::TS) == 0 && self.cr4 & cr4::OSFXSR != 0
    }

    /// The same of VEX-encoded instructions.
    pub fn avx_usable(&self) -> bool {
        const STATE: u64 = xcr0::SSE | xcr0::AVX;
        let enabled = self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & STATE == STATE;
        enabled && self.cr0 & (cr0::TS | cr0::PE) == cr0::PE && !self.v86()
    }
}

/// The interpreter alone.
pub struct Absent;

impl Translator for Absent {
    const ABSENT: bool = true;

    fn run(&mut self, _: &mut Cpu) -> Next {
        Next::Interpret
    }

    fn due(&mut self, _: &mut Cpu, _: Option<u64>) {}
}

/// A switch to an address space.
#[derive(Debug, Clone, Copy)]
pub struct Switch {
    /// Its number.
    pub space: u16,
    /// What was known of it is still true.
    pub keep: bool,
    /// Its page tables are those that were in use before.
    pub same_tables: bool,
}

/// What has happened to cached translations of addresses and code since a translator looked.
#[derive(Debug, Default)]
pub struct Changes {
    /// Somebody looks; otherwise nothing is collected.
    pub wanted: bool,
    /// All mappings may have changed.
    pub all: bool,
    /// Another address space is in use, or the same anew. What is not global belongs to an address space. Goes before `pages`.
    pub space: Option<Switch>,
    /// Linear pages whose mapping may have changed.
    pub pages: Vec<u64>,
    /// Guest-physical pages to which writing has been taken back.
    pub protected: Vec<u64>,
    /// Guest-physical pages whose code was written.
    pub code: Vec<u64>,
    /// The translator's timer has expired.
    pub timer: bool,
}

/// Single changes that are kept.
const MOST: usize = 256;

impl Changes {
    /// Whether there is anything.
    pub fn any(&self) -> bool {
        self.all
            || self.space.is_some()
            || !self.pages.is_empty()
            || !self.protected.is_empty()
            || !self.code.is_empty()
    }

    /// All mappings may have changed.
    pub fn everything(&mut self) {
        self.all = true;
        self.pages.clear();
        self.protected.clear();
    }

    /// An address space is in use now.
    pub fn switch(&mut self, switch: Switch) {
        if self.space.is_some() || !self.pages.is_empty() {
            // The order would matter.
            self.everything();
        }
        self.space = Some(switch);
    }

    /// The mapping of the page at `linear` may have changed.
    pub fn page(&mut self, linear: u64) {
        if self.pages.len() == MOST {
            self.everything();
        }
        if self.wanted && !self.all {
            self.pages.push(linear & !0xfff);
        }
    }

    /// Nobody may write to guest-physical `page` unreported any more.
    pub fn protect(&mut self, page: u64) {
        if self.protected.len() == MOST {
            self.everything();
        }
        if self.wanted && !self.all {
            self.protected.push(page);
        }
    }
}
