//! Small bare-metal guests under KVM.
//!
//! They run on every host that has a usable /dev/kvm, also on one that emulates kernel code; where there is none, [`probe`] tests
//! that the engine says so, and the others have nothing to run on.

mod exits;
mod harness;
mod interrupts;
mod probe;
mod state;
