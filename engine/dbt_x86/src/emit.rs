//! Machine code for the sequences that surround guest instructions. What is emitted here is a small, fixed set of forms;
//! guest instructions themselves are copied or re-encoded by iced-x86.
//!
//! All data of the translator lies below 2 GiB and is addressed absolutely.

/// Host registers by encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg(pub u8);

pub const RAX: Reg = Reg(0);
pub const RCX: Reg = Reg(1);
pub const RSP: Reg = Reg(4);
pub const RBP: Reg = Reg(5);
/// The first scratch register ("T"): index, data.
pub const T: Reg = Reg(10);
/// The second ("S"): effective address, then host address.
pub const S: Reg = Reg(11);

/// A memory operand.
#[derive(Debug, Clone, Copy)]
pub struct Mem {
    pub base: Option<Reg>,
    /// Never RSP.
    pub index: Option<Reg>,
    /// Log2 of the factor.
    pub scale: u8,
    pub disp: i32,
}

/// `[address]`
pub fn abs(address: u32) -> Mem {
    Mem {
        base: None,
        index: None,
        scale: 0,
        disp: address as i32,
    }
}

/// `[base + disp]`
pub fn at(base: Reg, disp: i32) -> Mem {
    Mem {
        base: Some(base),
        index: None,
        scale: 0,
        disp,
    }
}

/// Condition codes of Jcc.
pub mod cc {
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
}

/// A place in the code from which a jump leads to somewhere not yet known.
#[must_use]
pub struct Jump {
    at: usize,
    size: u8,
}

/// Code under construction, at its final address.
pub struct Code {
    pub bytes: Vec<u8>,
    base: usize,
}

/// Operations of the form `op r64, r/m64`.
#[derive(Clone, Copy)]
pub enum Op {
    Add = 0x03,
    Sub = 0x2b,
    Mov = 0x8b,
    Lea = 0x8d,
    /// `mov r/m64, r64`
    Store = 0x89,
}

impl Code {
    /// Code that will be at `base`, in the buffer `bytes`, which is cleared.
    pub fn new(base: usize, mut bytes: Vec<u8>) -> Code {
        bytes.clear();
        Code { bytes, base }
    }

    /// Address of the next byte.
    pub fn here(&self) -> usize {
        self.base + self.bytes.len()
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    fn rex(&mut self, w: bool, reg: Reg, m: &Mem) {
        let high = |r: Option<Reg>| r.map_or(0, |r| r.0 >> 3);
        let rex = 0x40 | u8::from(w) << 3 | (reg.0 >> 3) << 2 | high(m.index) << 1 | high(m.base);
        if rex != 0x40 {
            self.bytes.push(rex);
        }
    }

    fn modrm(&mut self, reg: u8, m: &Mem) {
        let reg = (reg & 7) << 3;
        let sib = |m: &Mem| {
            m.scale << 6 | m.index.map_or(4, |r| r.0 & 7) << 3 | m.base.map_or(5, |r| r.0 & 7)
        };
        let Some(base) = m.base else {
            self.raw(&[reg | 4, sib(m)]);
            return self.imm32(m.disp as u32);
        };
        let short = i8::try_from(m.disp);
        let mode = match short {
            Ok(0) if base.0 & 7 != 5 => 0,
            Ok(_) => 0x40,
            Err(_) => 0x80,
        };
        if m.index.is_some() || base.0 & 7 == 4 {
            self.raw(&[mode | reg | 4, sib(m)]);
        } else {
            self.bytes.push(mode | reg | base.0 & 7);
        }
        match (mode, short) {
            (0x40, Ok(disp)) => self.bytes.push(disp as u8),
            (0x80, _) => self.imm32(m.disp as u32),
            _ => {}
        }
    }

    /// `op reg, [m]` or `mov [m], reg`, 64 bits.
    pub fn op(&mut self, op: Op, reg: Reg, m: Mem) {
        self.rex(true, reg, &m);
        self.bytes.push(op as u8);
        self.modrm(reg.0, &m);
    }

    /// The same with 32 bits.
    pub fn op32(&mut self, op: Op, reg: Reg, m: Mem) {
        self.rex(false, reg, &m);
        self.bytes.push(op as u8);
        self.modrm(reg.0, &m);
    }

    /// `mov to, from`
    pub fn mov(&mut self, to: Reg, from: Reg) {
        self.raw(&[
            0x48 | (to.0 >> 3) << 2 | from.0 >> 3,
            0x8b,
            0xc0 | (to.0 & 7) << 3 | from.0 & 7,
        ]);
    }

    /// `mov reg, value` in the shortest form.
    pub fn mov_imm(&mut self, reg: Reg, value: u64) {
        let low = reg.0 & 7;
        if let Ok(value) = u32::try_from(value) {
            if reg.0 >= 8 {
                self.bytes.push(0x41);
            }
            self.bytes.push(0xb8 | low);
            self.imm32(value);
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.raw(&[0x48 | reg.0 >> 3, 0xc7, 0xc0 | low]);
            self.imm32(value as u32);
        } else {
            self.raw(&[0x48 | reg.0 >> 3, 0xb8 | low]);
            self.raw(&value.to_le_bytes());
        }
    }

    /// `mov qword [m], value`, sign-extended.
    pub fn store_imm(&mut self, m: Mem, value: i32) {
        self.rex(true, Reg(0), &m);
        self.bytes.push(0xc7);
        self.modrm(0, &m);
        self.imm32(value as u32);
    }

    /// `mov dword [m], value`
    pub fn store_imm32(&mut self, m: Mem, value: u32) {
        self.rex(false, Reg(0), &m);
        self.bytes.push(0xc7);
        self.modrm(0, &m);
        self.imm32(value);
    }

    /// `cmp reg, value`, sign-extended.
    pub fn cmp_imm(&mut self, reg: Reg, value: i32) {
        self.raw(&[0x48 | reg.0 >> 3, 0x81, 0xf8 | reg.0 & 7]);
        self.imm32(value as u32);
    }

    /// `cmp left, right`
    pub fn cmp(&mut self, left: Reg, right: Reg) {
        self.raw(&[
            0x48 | (left.0 >> 3) << 2 | right.0 >> 3,
            0x3b,
            0xc0 | (left.0 & 7) << 3 | right.0 & 7,
        ]);
    }

    /// `cmp dword [m], 0`
    pub fn cmp_zero32(&mut self, m: Mem) {
        self.rex(false, Reg(0), &m);
        self.bytes.push(0x83);
        self.modrm(7, &m);
        self.bytes.push(0);
    }

    /// `and reg32, value`
    pub fn and32(&mut self, reg: Reg, value: u32) {
        if reg.0 >= 8 {
            self.bytes.push(0x41);
        }
        self.raw(&[0x81, 0xe0 | reg.0 & 7]);
        self.imm32(value);
    }

    /// `rorx to, from, count`
    pub fn rorx(&mut self, to: Reg, from: Reg, count: u8) {
        let vex = (!to.0 & 8) << 4 | 0x40 | (!from.0 & 8) << 2 | 3;
        self.raw(&[
            0xc4,
            vex,
            0xfb,
            0xf0,
            0xc0 | (to.0 & 7) << 3 | from.0 & 7,
            count,
        ]);
    }

    /// `pext to, from, [mask]`
    pub fn pext(&mut self, to: Reg, from: Reg, mask: u32) {
        let vex = (!to.0 & 8) << 4 | 0x60 | 2;
        self.raw(&[0xc4, vex, 0x82 | (!from.0 & 15) << 3, 0xf5]);
        self.modrm(to.0, &abs(mask));
    }

    /// `pdep to, from, [mask]`
    pub fn pdep(&mut self, to: Reg, from: Reg, mask: u32) {
        let vex = (!to.0 & 8) << 4 | 0x60 | 2;
        self.raw(&[0xc4, vex, 0x83 | (!from.0 & 15) << 3, 0xf5]);
        self.modrm(to.0, &abs(mask));
    }

    /// `mov to32, from32`
    pub fn mov32(&mut self, to: Reg, from: Reg) {
        self.raw(&[
            0x40 | (to.0 >> 3) << 2 | from.0 >> 3,
            0x8b,
            0xc0 | (to.0 & 7) << 3 | from.0 & 7,
        ]);
    }

    /// `movzx to32, from16`
    pub fn movzx16(&mut self, to: Reg, from: Reg) {
        self.raw(&[
            0x40 | (to.0 >> 3) << 2 | from.0 >> 3,
            0x0f,
            0xb7,
            0xc0 | (to.0 & 7) << 3 | from.0 & 7,
        ]);
    }

    /// `jmp [m]`
    pub fn jmp_mem(&mut self, m: Mem) {
        self.rex(false, Reg(0), &m);
        self.bytes.push(0xff);
        self.modrm(4, &m);
    }

    /// `jmp target`; the address of its distance.
    pub fn jmp(&mut self, target: usize) -> usize {
        self.bytes.push(0xe9);
        self.distance(target)
    }

    /// `jcc target`; the address of its distance.
    pub fn jcc(&mut self, condition: u8, target: usize) -> usize {
        self.raw(&[0x0f, 0x80 | condition]);
        self.distance(target)
    }

    fn distance(&mut self, target: usize) -> usize {
        let place = self.here();
        self.imm32(distance(place, target));
        place
    }

    /// `jcc` forward.
    pub fn jcc_forward(&mut self, condition: u8) -> Jump {
        self.raw(&[0x0f, 0x80 | condition]);
        self.imm32(0);
        Jump {
            at: self.bytes.len() - 4,
            size: 4,
        }
    }

    /// `lea reg, [rip + ...]` of a place that follows.
    pub fn lea_forward(&mut self, reg: Reg) -> Jump {
        self.raw(&[0x48 | (reg.0 >> 3) << 2, 0x8d, (reg.0 & 7) << 3 | 5]);
        self.imm32(0);
        Jump {
            at: self.bytes.len() - 4,
            size: 4,
        }
    }

    /// `jrcxz` a little forward.
    pub fn jrcxz(&mut self) -> Jump {
        self.raw(&[0xe3, 0]);
        self.short()
    }

    /// `jmp` forward.
    pub fn jmp_forward(&mut self) -> Jump {
        self.raw(&[0xe9]);
        self.imm32(0);
        Jump {
            at: self.bytes.len() - 4,
            size: 4,
        }
    }

    /// The one-byte distance just emitted.
    pub fn short(&mut self) -> Jump {
        Jump {
            at: self.bytes.len() - 1,
            size: 1,
        }
    }

    /// The jump leads here.
    pub fn land(&mut self, jump: Jump) {
        let distance = self.bytes.len() - jump.at - usize::from(jump.size);
        match jump.size {
            1 => self.bytes[jump.at] = i8::try_from(distance).expect("a little forward") as u8,
            _ => self.bytes[jump.at..][..4].copy_from_slice(&(distance as u32).to_le_bytes()),
        }
    }
}

/// What a 32-bit distance at `place` must be to lead to `target`.
pub fn distance(place: usize, target: usize) -> u32 {
    (target as i64 - place as i64 - 4) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn what_is_emitted_decodes_to_what_is_meant() {
        let mut c = Code::new(0x1000, Vec::new());
        let indexed = Mem {
            base: None,
            index: Some(T),
            scale: 3,
            disp: 0x1234,
        };
        c.op(Op::Mov, S, abs(0x1000));
        c.op(Op::Store, Reg(0), at(S, 0));
        c.op(Op::Lea, RSP, at(RSP, -8));
        c.op(Op::Lea, S, at(Reg(13), 0));
        c.op(Op::Add, S, at(T, 0x12345));
        c.op32(
            Op::Lea,
            RCX,
            Mem {
                base: Some(RCX),
                index: Some(RCX),
                scale: 0,
                disp: 0,
            },
        );
        c.op(
            Op::Mov,
            RCX,
            Mem {
                base: None,
                index: Some(RCX),
                scale: 3,
                disp: 0x77,
            },
        );
        c.mov(T, RCX);
        c.mov_imm(S, 0xffff_ffff_8000_0000);
        c.mov_imm(T, 0x8000_0000);
        c.mov_imm(Reg(0), 0x1_2345_6789);
        c.store_imm(at(S, 0), -5);
        c.store_imm32(abs(0x88), 7);
        c.cmp_imm(S, 4088);
        c.cmp(S, T);
        c.cmp_zero32(abs(0x99));
        c.and32(T, 0xfff0);
        c.rorx(T, S, 8);
        c.pext(RCX, S, 0x2000);
        c.pext(S, S, 0x2000);
        c.pext(RCX, RCX, 0x2000);
        c.pdep(T, T, 0x2000);
        c.mov32(T, S);
        c.movzx16(T, S);
        c.jmp_mem(indexed);
        let skip = c.jcc_forward(cc::A);
        let jump = c.jrcxz();
        c.land(skip);
        c.jmp(0x1000);
        c.jcc(cc::NE, 0x1000);
        c.land(jump);
        let text: Vec<String> = Decoder::with_ip(64, &c.bytes, 0x1000, DecoderOptions::NONE)
            .into_iter()
            .map(|i| {
                let mut text = String::new();
                use iced_x86::Formatter;
                iced_x86::IntelFormatter::new().format(&i, &mut text);
                text
            })
            .collect();
        let expected = "mov r11,[1000h]
mov [r11],rax
lea rsp,[rsp-8]
lea r11,[r13]
add r11,[r10+12345h]
lea ecx,[rcx+rcx]
mov rcx,[rcx*8+77h]
mov r10,rcx
mov r11,0FFFFFFFF80000000h
mov r10d,80000000h
mov rax,123456789h
mov qword ptr [r11],0FFFFFFFFFFFFFFFBh
mov dword ptr [88h],7
cmp r11,0FF8h
cmp r11,r10
cmp dword ptr [99h],0
and r10d,0FFF0h
rorx r10,r11,8
pext rcx,r11,[2000h]
pext r11,r11,[2000h]
pext rcx,rcx,[2000h]
pdep r10,r10,[2000h]
mov r10d,r11d
movzx r10d,r11w
jmp qword ptr [r10*8+1234h]";
        let count = expected.lines().count();
        assert_eq!(text[..count].join("\n"), expected);
        assert!(text[count + 2].ends_with("1000h") && text[count + 3].ends_with("1000h"));
    }
}
