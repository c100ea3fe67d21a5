//! The x86 interpreter: the reference engine. Every mode, every instruction, precise at every exit.
//!
//! Code is decoded once per block (a run of instructions within one guest-physical page) and executed from the
//! decoded form. Clarity comes before speed, but the common instructions have specialised handlers.
//!
//! Where things are: [`run`] the loop, events and exits; [`block`] the cache of decoded code; [`decode`] from iced's
//! instruction to an [`op::Op`]; [`memory`] segmentation, TLB and devices; `integer`, `flow`, `string` the common instructions;
//! `rare` the dispatch of the others to `segment`, `transfer` (far jumps, calls, returns), `task`, `syscall`, `control` (registers), `msr`,
//! `system`, `legacy`, `fpu_state`; `native` those that run on the host; [`frame`] stacks that a transfer builds;
//! [`exception`] delivery through the IDT; [`vm`] what the vCPUs share.
//!
//! The specification is Intel's SDM; the AMD APM where the CPU model follows AMD.

// UNSAFETY: guest RAM is accessed through raw pointers, and flags are computed by inline assembly.
#![allow(unsafe_code)]
#![allow(missing_docs)]

mod alu;
mod block;
mod breakpoint;
mod control;
mod cpu;
mod decode;
mod exception;
mod features;
mod flow;
mod fpu_state;
mod frame;
mod integer;
mod io;
mod kvm_clock;
mod lapic;
mod legacy;
mod memory;
mod msr;
mod native;
mod op;
mod rare;
mod run;
mod segment;
mod stack;
mod string;
mod syscall;
mod system;
mod task;
mod transfer;
mod translator;
mod vm;
mod word;

pub use cpu::{CodeSize, Cpu, RIP, Stop, seg};
pub use features::host_features;
pub use memory::canonical;
pub use translator::{Changes, Next, Switch, Translator};
pub use vm::request::TIMER;
pub use vm::{InterpEngine, MAX_VCPUS, create_vm};
