//! Bare-metal guests on whole machines: the same guests, with the same results, on every engine that this host can use.
//!
//! A guest checks by itself what the processor and the board do (see `guests/`), prints a line for each check, and ends the
//! run with a status. The engines on which each guest ran are told on standard error.

mod engines;
mod runner;

use runner::{End, Guest};

#[test]
fn paging() {
    Guest::new("paging").runs();
}

#[test]
fn interrupts() {
    Guest::new("interrupts").runs();
}

#[test]
fn faults() {
    Guest::new("faults").runs();
}
