//! Stubs by instruction form, and their execution.

use crate::form::{self, Class, Form, Kind, MemUse};
use crate::state::{MXCSR_DEFAULT, NativeState};
use crate::stub::{self, STATUS_FLAGS};
use iced_x86::{CodeSize, Instruction, InstructionInfoFactory};
use lodger_host_sys::executable::ExecutableMemory;
use std::collections::HashMap;
use std::io;
use std::mem;

/// Room for generated code, in bytes: about ten thousand stubs.
const CAPACITY: usize = 1 << 20;
/// Entry points are aligned to this, so that a short stub lies in one cache line.
const ENTRY_ALIGNMENT: usize = 16;

/// There is no room for another stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cache of native stubs is full")]
pub struct Full;

/// How an execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The instruction has completed.
    Done,
    /// The instruction has completed but its memory operand is not written: an x87 store has raised an unmasked exception,
    /// which the next waiting instruction will deliver.
    NotStored,
    /// An unmasked SIMD floating-point exception: #XM, or #UD if CR4.OSXMMEXCPT is clear. Its flags are in the guest's
    /// MXCSR, nothing else has changed; what is in `staging` must not be written to memory.
    SimdException,
    /// An x87 exception was pending and the instruction waits for it: #MF. Nothing has changed.
    X87Exception,
}

type Entry = unsafe extern "sysv64" fn(*mut NativeState, *mut [u64; 16], u64) -> u64;

/// One instruction form, ready to run.
#[derive(Clone, Copy, Debug)]
pub struct Native {
    entry: Entry,
    /// The memory operand.
    pub mem: MemUse,
    /// The operand's linear address must be a multiple of this, else #GP(0).
    pub align: Option<u8>,
    /// Which control registers decide whether the guest may execute it.
    pub class: Class,
    /// VEX-encoded: #UD in real and virtual-8086 mode.
    pub vex: bool,
    /// Uses MXCSR and may end in [`Outcome::SimdException`].
    pub raises_simd_fp: bool,
    /// Raises #MF before anything else if [`NativeState::x87_exception_pending`].
    pub waits_x87: bool,
    /// Reads or writes status flags: if false, the `flags` given to [`Native::exec`] are not used.
    pub uses_flags: bool,
    uses_x87: bool,
    x87_pointers: bool,
    x87_environment: u8,
}

impl Native {
    fn simple(entry: Entry, class: Class) -> Self {
        Self {
            entry,
            mem: MemUse::None,
            align: None,
            class,
            vex: class == Class::Avx,
            raises_simd_fp: false,
            waits_x87: false,
            uses_flags: false,
            uses_x87: false,
            x87_pointers: false,
            x87_environment: 0,
        }
    }

    /// Executes the instruction on `state` and `gprs` (RAX to R15 in encoding order). Of `flags` (RFLAGS) only the six
    /// status flags are used and changed.
    ///
    /// # Safety
    /// The [`StubCache`] that made this exists and has not been cleared since.
    #[inline]
    pub unsafe fn exec(
        &self,
        state: &mut NativeState,
        gprs: &mut [u64; 16],
        flags: &mut u32,
    ) -> Outcome {
        if self.raises_simd_fp || self.uses_x87 {
            // SAFETY: the caller's promise.
            return unsafe { self.exec_floating_point(state, gprs, flags) };
        }
        // SAFETY: the caller promises that the code is there; the references are valid and exclusive.
        unsafe { self.call(state, gprs, flags) };
        Outcome::Done
    }

    /// # Safety
    /// As [`Native::exec`]; for x87 instructions that wait, no exception is pending.
    #[inline]
    unsafe fn call(&self, state: &mut NativeState, gprs: &mut [u64; 16], flags: &mut u32) {
        // SAFETY: the stub follows the calling convention and writes only through its arguments.
        let result = unsafe { (self.entry)(state, gprs, u64::from(*flags)) };
        if self.uses_flags {
            *flags = *flags & !STATUS_FLAGS | result as u32 & STATUS_FLAGS;
        }
    }

    /// # Safety
    /// As [`Native::exec`].
    unsafe fn exec_floating_point(
        &self,
        state: &mut NativeState,
        gprs: &mut [u64; 16],
        flags: &mut u32,
    ) -> Outcome {
        if self.waits_x87 && state.x87_exception_pending() {
            return Outcome::X87Exception;
        }
        if self.raises_simd_fp {
            // SAFETY: the caller's promise.
            return unsafe { self.exec_simd(state, gprs, flags) };
        }
        // SAFETY: the caller's promise, and no exception is pending.
        unsafe { self.call(state, gprs, flags) };
        if self.x87_pointers {
            state.update_x87_pointers(self.mem != MemUse::None);
        }
        if self.x87_environment != 0 {
            // FCS and FDS, the fifth and the seventh field, would be the host's selectors.
            let size = usize::from(self.x87_environment);
            state.staging[4 * size..][..2].fill(0);
            state.staging[6 * size..][..2].fill(0);
        }
        // Only a store whose result is inexact has stored it when an unmasked exception is raised.
        const PRECISION: u16 = 0x20;
        if self.waits_x87 && self.mem.write() != 0 && state.x87_unmasked() & !PRECISION != 0 {
            return Outcome::NotStored;
        }
        Outcome::Done
    }

    /// Runs with every exception masked and decides afterwards what would have happened.
    ///
    /// # Safety
    /// As [`Native::exec`], and no x87 exception is pending if the instruction waits for it.
    unsafe fn exec_simd(
        &self,
        state: &mut NativeState,
        gprs: &mut [u64; 16],
        flags: &mut u32,
    ) -> Outcome {
        let unmasked = !(state.mxcsr >> 7) & mxcsr::FLAGS;
        let mut raised = 0;
        if unmasked & mxcsr::UNDERFLOW != 0 {
            // A masked underflow is only flagged if the result is inexact, an unmasked one always. Flushing to zero
            // flags it always: a first run, storing nothing, finds out.
            state.run_mxcsr = state.mxcsr & mxcsr::MODES | MXCSR_DEFAULT | mxcsr::FLUSH_TO_ZERO;
            state.fatal = u32::MAX;
            let mut unused = *flags;
            // SAFETY: the caller's promise; with all of `fatal` set the stub stores no register.
            unsafe { self.call(state, gprs, &mut unused) };
            raised = state.run_mxcsr & mxcsr::UNDERFLOW;
        }
        state.run_mxcsr = state.mxcsr & mxcsr::MODES | MXCSR_DEFAULT;
        state.fatal = if raised != 0 { u32::MAX } else { unmasked };
        let mut new_flags = *flags;
        // SAFETY: the caller's promise.
        unsafe { self.call(state, gprs, &mut new_flags) };
        raised |= state.run_mxcsr & mxcsr::FLAGS;
        if raised & unmasked == 0 {
            state.mxcsr |= raised;
            *flags = new_flags;
            return Outcome::Done;
        }
        if raised & unmasked & mxcsr::BEFORE_COMPUTATION != 0 {
            raised &= mxcsr::BEFORE_COMPUTATION;
        }
        state.mxcsr |= raised;
        Outcome::SimdException
    }
}

/// Bits of MXCSR (SDM volume 1, 10.2.3).
mod mxcsr {
    pub(super) const FLAGS: u32 = 0x3f;
    /// Invalid, denormal, divide by zero: found in the operands, before anything is computed.
    pub(super) const BEFORE_COMPUTATION: u32 = 0x07;
    pub(super) const UNDERFLOW: u32 = 0x10;
    pub(super) const FLUSH_TO_ZERO: u32 = 0x8000;
    /// Denormals are zeros, rounding control, flush to zero.
    pub(super) const MODES: u32 = 0xe040;
}

/// Generates and keeps stubs; one per vCPU.
pub struct StubCache {
    memory: ExecutableMemory,
    stubs: HashMap<Instruction, Native>,
    info: InstructionInfoFactory,
}

impl StubCache {
    /// An empty cache. Fails if the host refuses executable memory.
    pub fn new() -> io::Result<Self> {
        Self::with_capacity(CAPACITY)
    }

    /// A cache for at most `capacity` bytes of code, a multiple of the page size.
    pub fn with_capacity(capacity: usize) -> io::Result<Self> {
        Ok(Self {
            memory: ExecutableMemory::new(capacity)?,
            stubs: HashMap::new(),
            info: InstructionInfoFactory::new(),
        })
    }

    /// The stub for an instruction, as decoded in any mode. `None` if it is not one that this module runs, or the host
    /// processor lacks it. When [`Full`], the caller drops every [`Native`] it holds and calls [`StubCache::clear`].
    pub fn prepare(&mut self, instruction: &Instruction) -> Result<Option<Native>, Full> {
        let canonical = match form::kind(instruction) {
            None => return Ok(None),
            Some(Kind::Hint) => return Ok(Some(Native::simple(hint, Class::Gpr))),
            Some(Kind::ZeroVectors { all }) => return Ok(Some(zero_vectors(instruction, all))),
            Some(Kind::Stub) => form::canonical(instruction),
        };
        if let Some(native) = self.stubs.get(&canonical) {
            return Ok(Some(*native));
        }
        let Some(form) = Form::new(&canonical, &mut self.info) else {
            return Ok(None);
        };
        let Ok(code) = stub::assemble(&form) else {
            return Ok(None);
        };
        let address = self.memory.push(&code, ENTRY_ALIGNMENT).ok_or(Full)?;
        let native = Native {
            // SAFETY: the address is the entry of code with this signature.
            entry: unsafe { mem::transmute::<*mut u8, Entry>(address.as_ptr()) },
            mem: form.mem,
            align: form.align,
            class: form.class,
            vex: form.vex,
            raises_simd_fp: form.mxcsr,
            waits_x87: form.waits_x87,
            uses_flags: form.flags,
            uses_x87: form.x87,
            x87_pointers: form.x87_pointers,
            x87_environment: form.x87_environment,
        };
        self.stubs.insert(canonical, native);
        Ok(Some(native))
    }

    /// Forgets every stub. No [`Native`] from before may be executed any more.
    pub fn clear(&mut self) {
        self.stubs.clear();
        self.memory.truncate(0);
    }
}

extern "sysv64" fn hint(_: *mut NativeState, _: *mut [u64; 16], _: u64) -> u64 {
    0
}

fn zero_vectors(instruction: &Instruction, all: bool) -> Native {
    // Outside 64-bit mode only the eight registers that exist there.
    let entry: Entry = match (instruction.code_size() == CodeSize::Code64, all) {
        (true, false) => zero::<16, 16>,
        (true, true) => zero::<16, 0>,
        (false, false) => zero::<8, 16>,
        (false, true) => zero::<8, 0>,
    };
    Native::simple(entry, Class::Avx)
}

/// Clears the bytes from `FROM` of the first `COUNT` vector registers.
///
/// # Safety
/// `state` is valid and not aliased.
unsafe extern "sysv64" fn zero<const COUNT: usize, const FROM: usize>(
    state: *mut NativeState,
    _: *mut [u64; 16],
    _: u64,
) -> u64 {
    // SAFETY: the caller's promise.
    let state = unsafe { &mut *state };
    for register in &mut state.ymm[..COUNT] {
        register[FROM..].fill(0);
    }
    0
}
