//! Interrupt lines and message-signalled interrupts, as a device sees them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The far end of interrupt lines: an interrupt controller, or the board's router in front of several.
pub trait IrqSink: Send + Sync {
    /// Line `line` now has this level. An edge-triggered input acts on a change from low to high.
    fn set(&self, line: u32, level: bool);
    /// Line `line` has this level, without an edge: a machine is being restored.
    fn import(&self, line: u32, level: bool);
}

/// One interrupt line, held by the device that drives it.
///
/// Several holders of the same line must be joined by the sink (level-triggered PCI lines are wired-or); an `IrqLine` remembers
/// its own level and passes on changes only.
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    line: u32,
    level: AtomicBool,
}

impl IrqLine {
    /// Input `line` of `sink`, low.
    pub fn new(sink: Arc<dyn IrqSink>, line: u32) -> IrqLine {
        IrqLine {
            sink,
            line,
            level: AtomicBool::new(false),
        }
    }

    /// Drives the line.
    pub fn set(&self, level: bool) {
        if self.level.swap(level, Ordering::AcqRel) != level {
            self.sink.set(self.line, level);
        }
    }

    /// Drives the line high and low again: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The level that the device drives.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::Acquire)
    }

    /// Sets the level without an edge, when the device is restored.
    pub fn import(&self, level: bool) {
        self.level.store(level, Ordering::Release);
        self.sink.import(self.line, level);
    }
}

/// A message-signalled interrupt: a write of `data` to `address` (PCI Local Bus 3.0, section 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Guest-physical address of the message; 0xfee.. on x86.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

/// Takes messages: the engine's local APICs.
pub trait MsiTarget: Send + Sync {
    /// Delivers the message. A malformed one is the guest's mistake and is dropped.
    fn send(&self, msi: Msi);
}
