//! Pieces around other pieces, in 64-bit mode: loops, conditions, calls and balanced uses of the stack.
//!
//! They always come to an end, and to the right one, so that they can run on the host: what is inside of a loop does not write its counter;
//! what is inside of a function neither writes RSP nor near the stack that the call has set up.

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register};

use super::{Context, Piece, Rng, load, piece};
use crate::machine::{DATA, Mode, STACK_OFFSET};

/// What is around the inner pieces.
#[derive(Debug, Clone)]
pub struct Nest {
    shape: Shape,
    pub inner: Vec<Piece>,
}

#[derive(Debug, Clone)]
enum Shape {
    /// Repeats with a counter; the end is one of several forms.
    Loop { register: u8, count: u64, form: u64 },
    /// Skips if a condition holds; with 32-bit displacements, or 8-bit ones where they reach.
    Skip { condition: u8, wide: bool },
    /// A function; on a stack of its own if that is given.
    Call {
        stack: Option<u64>,
        form: u64,
        register: u8,
    },
    /// Pushes before, as many pops behind.
    Stack { pushes: Vec<u8>, pops: Vec<u8> },
}

/// Registers but RSP.
const REGISTERS: [u8; 15] = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// A random nest.
pub fn nest(rng: &mut Rng, context: &Context) -> Option<Piece> {
    if context.depth >= 3 {
        return None;
    }
    let mut inside = context.clone();
    inside.depth += 1;
    let shape = match rng.below(8) {
        0..3 => {
            let register = if rng.one_in(3) {
                1
            } else {
                rng.pick(&REGISTERS)
            };
            if context.kept & 1 << register != 0 {
                return None;
            }
            inside.kept |= 1 << register;
            Shape::Loop {
                register,
                count: 1 + rng.below(5),
                form: rng.below(5),
            }
        }
        3 => Shape::Skip {
            condition: rng.below(16) as u8,
            wide: rng.one_in(2),
        },
        4..6 => {
            let register = rng.pick(&REGISTERS);
            if context.kept & 1 << register != 0 {
                return None;
            }
            let stack = DATA + STACK_OFFSET - rng.pick(&[0, 0, 0, 8, 1, 3]);
            inside.in_call = true;
            inside.kept |= 1 << 4;
            Shape::Call {
                stack: (!context.in_call).then_some(stack),
                form: rng.below(7),
                register,
            }
        }
        _ => {
            let mut pick = || rng.pick(&REGISTERS);
            let pushes: Vec<u8> = (0..3).map(|_| pick()).collect();
            let pops = (0..3).map(|_| pick()).collect();
            Shape::Stack { pushes, pops }
        }
    };
    if let Shape::Stack { pops, .. } = &shape
        && pops
            .iter()
            .any(|register| context.kept & 1 << register != 0)
    {
        return None;
    }
    let count = 1 + rng.below(4);
    let inner = (0..count).map(|_| piece(rng, &inside)).collect();
    Some(assemble(Nest { shape, inner }))
}

/// The code of a nest.
fn assemble(nest: Nest) -> Piece {
    let mut body = Vec::new();
    let mut fixups = Vec::new();
    for (n, piece) in nest.inner.iter().enumerate() {
        let mut bytes = piece.bytes.clone();
        if piece.skips_next {
            let len = nest.inner.get(n + 1).map_or(0, |p| p.bytes.len());
            *bytes.last_mut().expect("a branch") = i8::try_from(len).unwrap_or(0) as u8;
        }
        let start = body.len();
        fixups.extend(piece.rip_relative.iter().map(|(at, to)| (start + at, *to)));
        body.extend(bytes);
    }
    let (before, after) = around(&nest.shape, body.len());
    fixups.iter_mut().for_each(|(at, _)| *at += before.len());
    Piece {
        bytes: [before, body, after].concat(),
        rip_relative: fixups,
        skips_next: false,
        nest: Some(Box::new(nest)),
    }
}

/// Code before and behind a body of `len` bytes.
fn around(shape: &Shape, len: usize) -> (Vec<u8>, Vec<u8>) {
    let rex = |w: u8, register: u8| 0x40 | w << 3 | register >> 3;
    let back = |to: usize| (-(to as i32)).to_le_bytes();
    match *shape {
        Shape::Loop {
            register,
            count,
            form,
        } => {
            let before = load(Mode::Long(3), register, count);
            let low = register & 7;
            let mut after = match form {
                // DEC; SUB 1; ADD -1; 32-bit DEC: then JNZ.
                0 => vec![rex(1, register), 0xff, 0xc8 | low],
                1 => vec![rex(1, register), 0x83, 0xe8 | low, 1],
                2 => vec![rex(1, register), 0x83, 0xc0 | low, 0xff],
                3 => vec![rex(0, register), 0xff, 0xc8 | low],
                // Without flags.
                _ if register == 1 && len < 100 => {
                    return (before, vec![0xe2, (-2 - len as i32) as u8]);
                }
                _ if register == 1 => {
                    // LEA RCX, [RCX-1]; JRCXZ over JMP.
                    let mut code = vec![0x48, 0x8d, 0x49, 0xff, 0xe3, 5, 0xe9];
                    code.extend(back(len + 11));
                    return (before, code);
                }
                _ => vec![rex(1, register), 0xff, 0xc8 | low],
            };
            if len < 100 && count % 2 == 0 {
                after.extend([0x75, (-(len as i32) - after.len() as i32 - 2) as u8]);
            } else {
                let to = len + after.len() + 6;
                after.extend([0x0f, 0x85]);
                after.extend(back(to));
            }
            (before, after)
        }
        Shape::Skip { condition, wide } => {
            let before = match i8::try_from(len) {
                Ok(len) if !wide => vec![0x70 | condition, len as u8],
                _ => [&[0x0f, 0x80 | condition][..], &(len as i32).to_le_bytes()].concat(),
            };
            (before, Vec::new())
        }
        Shape::Call {
            stack,
            form,
            register,
        } => {
            let mut before = stack.map_or(Vec::new(), |to| load(Mode::Long(3), 4, to));
            let (low, b) = (register & 7, register >> 3);
            // LEA register, [RIP+by]
            let lea = |by: i32| {
                let mut code = vec![0x48 | b << 2, 0x8d, 0x05 | low << 3];
                code.extend(by.to_le_bytes());
                code
            };
            // Over the function.
            let over = |len: usize| [&[0xe9][..], &(len as i32).to_le_bytes()].concat();
            // CALL register has 2 or 3 bytes.
            let call_register = match b {
                0 => vec![0xff, 0xd0 | low],
                _ => vec![0x41, 0xff, 0xd0 | low],
            };
            if form == 6 {
                // Both addresses are pushed, and RET goes to the function.
                let push = [0x40 | b, 0x50 | low];
                before.extend(lea(2 + 7 + 2 + 1 + len as i32 + 1));
                before.extend(push);
                before.extend(lea(2 + 1));
                before.extend(push);
                before.push(0xc3);
                return (before, vec![0xc3]);
            }
            let after = match form {
                // RET 8, with an argument.
                1 => vec![0xc2, 8, 0],
                // POP register; JMP register.
                2 => {
                    let pop = vec![0x40 | b, 0x58 | low];
                    [pop, vec![0x40 | b, 0xff, 0xe0 | low]].concat()
                }
                // ADD RSP, 8; JMP [RSP-8].
                3 => vec![0x48, 0x83, 0xc4, 8, 0xff, 0x64, 0x24, 0xf8],
                _ => vec![0xc3],
            };
            match form {
                4 => {
                    before.extend(lea(call_register.len() as i32 + 5));
                    before.extend(call_register);
                }
                5 => {
                    // Through memory below the stack: CALL [RSP-0x40].
                    before.extend(lea(5 + 4 + 5));
                    before.extend([0x48 | b << 2, 0x89, 0x44 | low << 3, 0x24, 0xc0]);
                    before.extend([0xff, 0x54, 0x24, 0xc0]);
                }
                _ => {
                    if form == 1 {
                        before.extend([0x40 | b, 0x50 | low]);
                    }
                    before.extend([0xe8, 5, 0, 0, 0]);
                }
            }
            before.extend(over(len + after.len()));
            (before, after)
        }
        Shape::Stack {
            ref pushes,
            ref pops,
        } => {
            let mut before = Vec::new();
            for &register in pushes {
                match register {
                    // An immediate now and then.
                    0 => before.extend([0x6a, 0x91]),
                    // The stack itself.
                    1 => before.extend([0xff, 0x74, 0x24, 0xf0]),
                    _ => before.extend([0x40 | register >> 3, 0x50 | register & 7]),
                }
            }
            let pop = |register: &u8| [0x40 | register >> 3, 0x58 | register & 7];
            (before, pops.iter().flat_map(pop).collect())
        }
    }
}

impl Piece {
    /// Simpler pieces that may still show what this one shows.
    pub fn simpler(&self) -> Vec<Piece> {
        let Some(nest) = &self.nest else {
            return Vec::new();
        };
        let with = |inner: Vec<Piece>| {
            assemble(Nest {
                shape: nest.shape.clone(),
                inner,
            })
        };
        let mut found = Vec::new();
        for n in 0..nest.inner.len() {
            let mut fewer = nest.inner.clone();
            fewer.remove(n);
            found.push(with(fewer));
            for simpler in nest.inner[n].simpler() {
                let mut inner = nest.inner.clone();
                inner[n] = simpler;
                found.push(with(inner));
            }
        }
        found
    }

    /// Whether it leaves the registers alone whose bits are set.
    pub fn keeps(&self, registers: u32) -> bool {
        let mut info = InstructionInfoFactory::new();
        let writes = |access: OpAccess| {
            use OpAccess as A;
            matches!(
                access,
                A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite
            )
        };
        let decoder = Decoder::with_ip(64, &self.bytes, 0, DecoderOptions::NONE);
        decoder.into_iter().all(|i| {
            let used = info.info(&i).used_registers();
            used.iter().all(|u| {
                let register = u.register().full_register();
                let general = register.is_gpr64() && register != Register::RIP;
                !(general && writes(u.access()) && registers & 1 << register.number() != 0)
            })
        })
    }
}
