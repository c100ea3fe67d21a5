//! Small bare-metal guests under KVM.
//!
//! They run on every host that has a /dev/kvm, also on one that emulates kernel code; where there is none, what is tested is that
//! the engine says so.

mod harness;
mod probe;
