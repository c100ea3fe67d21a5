//! The escape key: Ctrl-A, as in QEMU's `-nographic` and GNU screen.

/// What `Ctrl-A h` prints at the terminal that a machine was started from.
const HELP: &str = "\
Ctrl-A x        end the machine and leave
Ctrl-A s        type this terminal's size into the guest's shell, as an stty command
Ctrl-A Ctrl-A   send Ctrl-A to the guest
Ctrl-A h        this help";

/// The same, at a terminal that came later.
const HELP_ATTACHED: &str = "\
Ctrl-A d        leave; the machine runs on (Ctrl-A x does the same)
Ctrl-A s        type this terminal's size into the guest's shell, as an stty command
Ctrl-A Ctrl-A   send Ctrl-A to the guest
Ctrl-A h        this help";

const KEY: u8 = 0x01;

/// Takes the escape sequences out of what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    /// The key was pressed last.
    armed: bool,
    /// Leaving does not end the machine, and has a letter more.
    attached: bool,
}

/// What an escape sequence asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Quit,
    Help,
    Size,
}

impl Escape {
    /// The sequences, a line each.
    pub const HELP: &str = HELP;
    /// Those of an [`attached`](Escape::attached) terminal.
    pub const HELP_ATTACHED: &str = HELP_ATTACHED;

    /// For a terminal that a machine does not end with.
    pub fn attached() -> Escape {
        Escape {
            armed: false,
            attached: true,
        }
    }

    /// Appends to `data` what of `typed` is for the guest, and returns what was asked for meanwhile. What follows an escape
    /// key and means nothing is dropped together with it.
    pub(crate) fn filter(&mut self, typed: &[u8], data: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &byte in typed {
            if !std::mem::take(&mut self.armed) {
                match byte {
                    KEY => self.armed = true,
                    _ => data.push(byte),
                }
                continue;
            }
            match byte {
                b'x' | b'X' => commands.push(Command::Quit),
                b'd' | b'D' if self.attached => commands.push(Command::Quit),
                b's' | b'S' => commands.push(Command::Size),
                b'h' | b'H' | b'?' => commands.push(Command::Help),
                KEY => data.push(KEY),
                _ => {}
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_taken_out_even_across_reads() {
        use Command::{Help, Quit, Size};
        /// What is read, what the guest gets, what is asked for.
        type Case = (&'static [&'static [u8]], &'static [u8], &'static [Command]);
        let cases: &[Case] = &[
            (&[b"ls\r"], b"ls\r", &[]),
            (&[b"a\x01xb"], b"ab", &[Quit]),
            (&[b"a\x01", b"x"], b"a", &[Quit]),
            (&[b"\x01h\x01?\x01X"], b"", &[Help, Help, Quit]),
            (&[b"l\x01ss"], b"ls", &[Size]),
            (&[b"\x01\x01x"], b"\x01x", &[]),
            (&[b"\x01qx"], b"x", &[]),
            (&[b"\x03\x1a\x1c\xff\0"], b"\x03\x1a\x1c\xff\0", &[]),
        ];
        for (reads, data, commands) in cases {
            let mut escape = Escape::default();
            let (mut got, mut asked) = (Vec::new(), Vec::new());
            for read in *reads {
                asked.extend(escape.filter(read, &mut got));
            }
            assert_eq!((&got[..], &asked[..]), (*data, *commands), "{reads:?}");
        }
    }

    #[test]
    fn only_attached_terminals_detach() {
        for (mut escape, asked) in [
            (Escape::default(), &[][..]),
            (Escape::attached(), &[Command::Quit]),
        ] {
            let mut got = Vec::new();
            assert_eq!(escape.filter(b"\x01da", &mut got), asked);
            assert_eq!(got, b"a");
        }
    }
}
