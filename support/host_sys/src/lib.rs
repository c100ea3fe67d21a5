//! What the rest of the house wants of the host and cannot ask of safe crates.
//!
//! Limits: Linux. So far: termination signals ([`signals`]) and the frequency of the time-stamp counter ([`tsc`]).

// UNSAFETY: installing signal handlers and reading the time-stamp counter have no safe interface.
#![allow(unsafe_code)]

pub mod signals;
pub mod tsc;
