//! Accesses that must be answered outside of the engine, in the middle of an instruction.
//!
//! The instruction is left with [`Stop::Io`](crate::cpu::Stop::Io) and, once the answer is there, executed again from its start. What was already answered
//! is remembered here in order and not asked again. So an instruction must not change registers before its
//! last memory or port access; memory that it has written may be written again with the same value. Another vCPU can
//! make the repetition do something else than the first execution did: then what it does now counts.

use lodger_vcpu::{Entry, Exit};

/// The answered accesses of the instruction that is being executed again.
#[derive(Debug, Default)]
pub struct IoReplay {
    done: Vec<(Exit, u64)>,
    cursor: usize,
}

impl IoReplay {
    /// The answer to `access`, if it was asked before.
    pub fn answer(&mut self, access: Exit) -> Option<u64> {
        let &(exit, value) = self.done.get(self.cursor)?;
        if !same_place(exit, access) {
            self.done.truncate(self.cursor);
            return None;
        }
        self.cursor += 1;
        Some(value)
    }

    /// Notes what the outside answered to `exit`.
    pub fn complete(&mut self, exit: Exit, entry: Entry) {
        let value = match entry {
            Entry::Data(value) => value,
            _ => 0,
        };
        self.done.push((exit, value));
        self.cursor = 0;
    }

    /// Whether anything is remembered.
    #[inline(always)]
    pub fn is_active(&self) -> bool {
        !self.done.is_empty()
    }

    /// The instruction (or the iteration of a repeated one) is complete.
    pub fn clear(&mut self) {
        self.done.clear();
        self.cursor = 0;
    }
}

/// The same access, whatever is written.
fn same_place(a: Exit, b: Exit) -> bool {
    let without_value = |exit| match exit {
        Exit::PortWrite { port, size, .. } => Exit::PortWrite {
            port,
            size,
            value: 0,
        },
        Exit::MmioWrite { address, size, .. } => Exit::MmioWrite {
            address,
            size,
            value: 0,
        },
        read => read,
    };
    without_value(a) == without_value(b)
}
