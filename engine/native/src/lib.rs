//! Native execution: instructions that touch no privileged state run on the host processor.
//!
//! SSE to AVX2, FMA, F16C, BMI, AES, SHA, x87, MMX and their like have hundreds of forms with subtle results. None is
//! written by hand: for each form (opcode, registers, immediate) a small stub is generated that loads the guest's
//! registers, executes the same instruction and stores what it wrote. What remains for the interpreter is what the
//! host cannot know: whether the guest may execute the instruction at all, and its memory.
//!
//! How a caller executes an instruction for which [`StubCache::prepare`] gave a [`Native`]:
//! 1. check CR0.EM/TS, CR4.OSFXSR, XCR0 as [`Native::class`] asks, the mode if [`Native::vex`], and a pending x87
//!    exception if [`Native::waits_x87`];
//! 2. compute the operand's address, check [`Native::align`], read [`MemUse::read`] bytes into
//!    [`NativeState::staging`] (and see that [`MemUse::write`] bytes can be written);
//! 3. call [`Native::exec`];
//! 4. if it is [`Outcome::Done`], write [`MemUse::write`] bytes from `staging` to guest memory.
//!
//! Gathers and masked moves access several elements, each of which may fault or may not be touched: they are
//! written by hand in [`Masked`], against a small trait for guest memory.
//!
//! Not here: control flow, integer instructions, anything nondeterministic (RDRAND, RDTSC) or privileged, the
//! instructions that load or store whole register states (LDMXCSR, FXSAVE, XSAVE and family), fences and cache control,
//! EVEX, VAES, XOP, FMA4, TBM, 3DNow! and SSE4a. An instruction that the host processor lacks is not run either:
//! [`supported`] tells what a guest's CPUID may show.
//!
//! Deviations from a real processor. In the x87 state's last-instruction pointers: FOP reads as zero, FCS and FDS
//! too (as with CPUID.7.0:EBX\[13\] set); FNSTENV and FNSAVE always use the protected-mode layout, in real
//! and virtual-8086 mode as well. The instruction and data pointers are those that the caller gives in
//! [`NativeState::x87_ip`] and [`NativeState::x87_dp`]; host addresses never reach the guest.
//!
//! With an unmasked SIMD underflow or overflow, the precision flag is that of the masked result; VDPPS and VDPPD raise
//! the exceptions of all their steps together; VCVTPS2PH raises no unmasked underflow if the tiny result is exact.
//!
//! The host must offer x86-64-v2, of which the stubs use LAHF in 64-bit mode; this is not checked.
//!
//! Cost of one [`Native::exec`] on a Sapphire Rapids server (`cargo run --release --example cost -p lodger-native`): 3 ns
//! for moves, logic and integer vectors, 5 ns with status flags, 8 ns with MXCSR, about 80 ns for x87 and MMX, whose
//! whole state is loaded and stored. Making a stub takes 1.7 us, finding it again 0.1 us.
//!
//! Manuals: Intel SDM volume 1 chapters 8 (x87), 11.5 (SIMD exceptions), 14 (AVX); volume 2 for each instruction and the
//! exception types of its section 2.4.

// UNSAFETY: machine code is generated into executable memory and called, which the compiler cannot check.
#![allow(unsafe_code)]

mod cache;
mod form;
mod masked;
mod state;
mod stub;

pub use cache::{Full, Native, Outcome, StubCache};
pub use form::{Class, InPlace, MemUse, in_place, supported};
pub use masked::{Guest, Masked};
pub use state::NativeState;
