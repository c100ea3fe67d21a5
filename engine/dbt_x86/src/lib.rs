//! The binary translator: unmodified x86-64 systems without hardware virtualization.
//!
//! Guest code is rewritten to host code that keeps the guest's registers in the host's, its flags in the host's flags, and
//! computes as the guest does; only memory operands, control flow and sensitive instructions are replaced. Everything that is not
//! translated is the interpreter's, one instruction at a time and on the same state: see [`lodger_interp::Translator`].
//!
//! Where things are: [`insn`] what is made of each instruction; [`translate`] a block; [`emit`] the machine code around
//! guest instructions; [`exits`] how a block is left; [`flags`] where the status flags are; [`check`] the lookup of an address, [`group`] one for several, [`refill`] what happens when it fails; [`env`] the data that code uses; [`routines`] the way in and out; [`cache`] blocks, links between them
//! and their invalidation; [`jumps`] the tables of indirect jumps; [`run`] the translator in the vCPU's loop; [`traps`] host signals; [`timer`] guest timers.
//!
//! Limits: 64-bit code, and 32-bit code with flat segments; x87 and MMX instructions are the interpreter's; the host needs AVX2 and BMI2. Flags that the guest does not need any more may have another value than a
//! processor would give them when an exception or interrupt saves them. Manuals: Intel SDM volumes 2 and 3.

// UNSAFETY: generates machine code, executes it, and handles its traps.
#![allow(unsafe_code)]
#![allow(missing_docs)]

mod cache;
mod check;
mod dump;
mod emit;
mod engine;
mod env;
mod exits;
mod flags;
#[cfg(test)]
mod golden;
mod group;
mod insn;
mod jumps;
mod refill;
mod routines;
mod run;
mod special;
mod stats;
mod system;
mod timer;
mod translate;
mod traps;

pub use engine::DbtEngine;
