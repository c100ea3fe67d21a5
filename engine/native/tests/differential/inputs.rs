//! Random instructions and register contents, rich in the values where floating point is interesting.

use crate::direct::Machine;
use iced_x86::{Code, Instruction, OpCodeOperandKind as Kind, OpKind, Register};

/// xorshift64*.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 32) as usize) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn gpr(&mut self) -> u64 {
        match self.below(4) {
            0 => self.next() & 0xff,
            1 => self.pick(&[0, 1, u64::MAX, 1 << 31, 1 << 63, 0xffff_ffff]),
            _ => self.next(),
        }
    }

    fn single(&mut self) -> u32 {
        const VALUES: [u32; 16] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x0000_0001,
            0x8000_0001,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0xff7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            0x4f00_0000,
            0x3c00_0001,
        ];
        match self.below(4) {
            0 => self.next() as u32,
            1 => {
                (self.next() as u32 & 0x807f_ffff)
                    | (0x3f80_0000 + ((self.below(9) as u32) << 23) - (4 << 23))
            }
            _ => self.pick(&VALUES),
        }
    }

    fn double(&mut self) -> u64 {
        const VALUES: [u64; 16] = [
            0,
            1 << 63,
            0x3ff0 << 48,
            0xbff0 << 48,
            1,
            (1 << 63) | 1,
            (1 << 52) - 1,
            1 << 52,
            0x7fef_ffff_ffff_ffff,
            0xffef_ffff_ffff_ffff,
            0x7ff0 << 48,
            0xfff0 << 48,
            0x7ff8 << 48,
            (0x7ff0 << 48) | 1,
            0x41e0 << 48,
            0x3680 << 48,
        ];
        match self.below(4) {
            0 => self.next(),
            1 => (self.next() & 0x800f_ffff_ffff_ffff) | (0x3fd + self.below(9) as u64) << 52,
            _ => self.pick(&VALUES),
        }
    }

    fn extended(&mut self) -> [u8; 10] {
        let exponent = match self.below(6) {
            0 => 0,
            1 => 0x7fff,
            2 => self.next() as u16 & 0x7fff,
            _ => 0x3ff8 + self.below(80) as u16,
        };
        let significand = match self.below(6) {
            0 => 0,
            1 => 1 << 63,
            2 => 3 << 62,
            3 => self.next(),
            _ => self.next() | 1 << 63,
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent | (self.next() as u16 & 0x8000)).to_le_bytes());
        bytes
    }

    /// Fills with values of one kind.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let kind = self.below(4);
        for chunk in bytes.chunks_mut(8) {
            let value = match kind {
                0 => self.next(),
                1 => self.double(),
                _ => u64::from(self.single()) << 32 | u64::from(self.single()),
            };
            chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
        }
    }

    /// A whole machine. MXCSR has all exceptions masked; the x87 control word has any masks.
    pub fn machine(&mut self) -> Machine {
        let mut machine = Machine {
            ymm: [[0; 32]; 16],
            fxsave: [0; 512],
            memory: [0; _],
            gprs: [0; 16],
            flags: 0x202 | (self.next() & 0x8d5),
            mxcsr: 0x1f80 | (self.next() as u32 & 0xe07f),
        };
        for register in &mut machine.ymm {
            self.fill(register);
        }
        self.fill(&mut machine.memory);
        if self.below(3) == 0 {
            let operand = self.extended();
            machine.memory[crate::direct::OPERAND..][..10].copy_from_slice(&operand);
        }
        for register in &mut machine.gprs {
            *register = self.gpr();
        }
        let masks = if self.below(4) == 0 {
            self.next() as u16 & 0x3f
        } else {
            0x3f
        };
        let fcw = 0x40 | masks | (self.next() as u16 & 0xf00);
        let flags = if self.below(2) == 0 {
            0
        } else {
            self.next() as u16 & 0x7f & (fcw | 0x40)
        };
        let fsw = (self.next() as u16 & 0x7f00) | flags;
        machine.fxsave[..2].copy_from_slice(&fcw.to_le_bytes());
        machine.fxsave[2..4].copy_from_slice(&fsw.to_le_bytes());
        machine.fxsave[4] = if self.below(2) == 0 {
            0xff
        } else {
            self.next() as u8
        };
        machine.fxsave[8..12].copy_from_slice(&(self.next() as u32).to_le_bytes());
        machine.fxsave[16..20].copy_from_slice(&(self.next() as u32).to_le_bytes());
        machine.fxsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        for register in machine.fxsave[32..160].chunks_mut(16) {
            register[..10].copy_from_slice(&self.extended());
        }
        machine
    }

    /// An instruction with random registers and immediate; its memory operand, if `memory`, is some address. `None` if
    /// the code has no such form, or an operand that no covered instruction has.
    pub fn instruction(&mut self, code: Code, memory: bool) -> Option<Instruction> {
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        let mut has_memory = false;
        for (operand, &kind) in code.op_code().op_kinds().iter().enumerate() {
            let operand = operand as u32;
            let register = match kind {
                Kind::mem
                | Kind::mem_vsib32x
                | Kind::mem_vsib32y
                | Kind::mem_vsib64x
                | Kind::mem_vsib64y => None,
                Kind::r8_or_mem
                | Kind::r16_or_mem
                | Kind::r32_or_mem
                | Kind::r64_or_mem
                | Kind::mm_or_mem
                | Kind::xmm_or_mem
                | Kind::ymm_or_mem
                    if memory =>
                {
                    None
                }
                Kind::r8_or_mem => Some(Register::AL + self.below(20) as u32),
                Kind::r16_reg | Kind::r16_or_mem => Some(Register::AX + self.below(16) as u32),
                Kind::r32_reg | Kind::r32_or_mem | Kind::r32_vvvv => {
                    Some(Register::EAX + self.below(16) as u32)
                }
                Kind::r64_reg | Kind::r64_or_mem | Kind::r64_vvvv => {
                    Some(Register::RAX + self.below(16) as u32)
                }
                Kind::mm_reg | Kind::mm_rm | Kind::mm_or_mem => {
                    Some(Register::MM0 + self.below(8) as u32)
                }
                Kind::xmm_reg
                | Kind::xmm_rm
                | Kind::xmm_or_mem
                | Kind::xmm_vvvv
                | Kind::xmm_is4 => Some(Register::XMM0 + self.below(16) as u32),
                Kind::ymm_reg
                | Kind::ymm_rm
                | Kind::ymm_or_mem
                | Kind::ymm_vvvv
                | Kind::ymm_is4 => Some(Register::YMM0 + self.below(16) as u32),
                Kind::ax => Some(Register::AX),
                Kind::st0 => Some(Register::ST0),
                Kind::sti_opcode => Some(Register::ST0 + self.below(8) as u32),
                Kind::imm8 => {
                    instruction.set_op_kind(operand, OpKind::Immediate8);
                    instruction.set_immediate8(self.next() as u8);
                    continue;
                }
                _ => return None,
            };
            match register {
                Some(register) => {
                    instruction.set_op_kind(operand, OpKind::Register);
                    instruction.set_op_register(operand, register);
                }
                None => {
                    has_memory = true;
                    instruction.set_op_kind(operand, OpKind::Memory);
                    instruction.set_memory_base(Register::RBX);
                    instruction.set_memory_index(match kind {
                        Kind::mem_vsib32x | Kind::mem_vsib64x => {
                            Register::XMM0 + self.below(16) as u32
                        }
                        Kind::mem_vsib32y | Kind::mem_vsib64y => {
                            Register::YMM0 + self.below(16) as u32
                        }
                        _ => Register::RSI,
                    });
                    instruction.set_memory_index_scale(1 << self.below(4));
                    instruction.set_memory_displ_size(8);
                    instruction.set_memory_displacement64(self.next() & 0xff_ffff);
                }
            }
        }
        (has_memory == memory).then_some(instruction)
    }
}
