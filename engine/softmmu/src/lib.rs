//! Software memory management for the engines that run without hardware virtualization: guest RAM as an engine
//! reaches it ([`Ram`]) and the translation look-aside buffer ([`Tlb`]).
//!
//! The page walk itself is `lodger-x86`'s. A write entry exists only for pages that hold no cached code (see the tracker of
//! `lodger-guest-memory`), so an engine may write through it without telling anybody.

// UNSAFETY: reads and writes guest RAM through raw pointers into its mapping.
#![allow(unsafe_code)]

mod hash;
mod ram;
mod tlb;

pub use hash::AddressHasher;
pub use ram::{Ram, RamPage};
pub use tlb::{Direction, ENTRIES, MmuIndex, Tlb, TlbEntry};
