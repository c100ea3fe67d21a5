//! What the rest of the house wants of the host and cannot ask of safe crates.
//!
//! Limits: Linux. So far: termination signals ([`signals`]), the frequency of the time-stamp counter ([`tsc`]), memory for generated
//! code ([`executable`]) and for the data that it uses ([`low`]), TAP network interfaces ([`tap`]).

// UNSAFETY: signal handlers, mappings of executable memory, the time-stamp counter and TAP interfaces have no safe interface.
#![allow(unsafe_code)]

pub mod executable;
pub mod low;
pub mod signals;
pub mod tap;
pub mod tsc;
