//! The last exits of a vCPU, for crash reports. Noting one costs two stores.

use lodger_vcpu::Exit;

const LEN: usize = 32;

/// A ring.
#[derive(Debug, Clone)]
pub(crate) struct History {
    exits: [Option<Exit>; LEN],
    next: usize,
}

impl History {
    pub(crate) fn new() -> History {
        History {
            exits: [None; LEN],
            next: 0,
        }
    }

    pub(crate) fn note(&mut self, exit: Exit) {
        self.exits[self.next] = Some(exit);
        self.next = (self.next + 1) % LEN;
    }

    /// Oldest first.
    pub(crate) fn exits(&self) -> Vec<Exit> {
        let (newer, older) = self.exits.split_at(self.next);
        older.iter().chain(newer).filter_map(|&e| e).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_stay_in_order() {
        for len in [0, 1, 31, 32, 33, 100] {
            let mut history = History::new();
            let exit = |i: usize| Exit::Eoi(i as u8);
            (0..len).for_each(|i| history.note(exit(i)));
            let last: Vec<_> = (len.saturating_sub(LEN)..len).map(exit).collect();
            assert_eq!(history.exits(), last);
        }
    }
}
