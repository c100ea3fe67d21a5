//! Instructions that load and store whole register states: FXSAVE, XSAVE and their like, MXCSR; and the state's conversion to
//! and from [`Fpu`].
//!
//! XSAVE areas have the standard format, with the x87, SSE and AVX components (SDM vol. 1, 13.4). All of an area is checked
//! before anything changes.

use iced_x86::Mnemonic;
use lodger_native::NativeState;
use lodger_x86::bits::{cr0, cr4, xcr0};
use lodger_x86::paging::Access;
use lodger_x86::{Exception, Fpu};

use crate::cpu::{Cpu, Exec, gpr};
use crate::op::Op;

/// Bits of MXCSR that exist.
const MXCSR_MASK: u32 = 0xffff;
const FXSAVE_SIZE: usize = 512;
/// Where MXCSR and its mask are, and XMM0.
const MXCSR: usize = 24;
const XMM: usize = 160;
const HEADER: usize = 512;
const AVX_OFFSET: usize = 576;
const AREA: usize = AVX_OFFSET + 256;

/// Executes one of this group; others are #UD.
pub fn execute(c: &mut Cpu, op: &Op) -> Exec {
    use Mnemonic::*;
    match op.rare().instruction.mnemonic() {
        Fxsave => fxsave(c, op, false),
        Fxsave64 => fxsave(c, op, true),
        Fxrstor => fxrstor(c, op, false),
        Fxrstor64 => fxrstor(c, op, true),
        Xsave => xsave(c, op, false),
        Xsave64 => xsave(c, op, true),
        Xrstor => xrstor(c, op, false),
        Xrstor64 => xrstor(c, op, true),
        Ldmxcsr => {
            c.check_control(cr4::OSFXSR)?;
            ldmxcsr(c, op)
        }
        Stmxcsr => {
            c.check_control(cr4::OSFXSR)?;
            c.store(op, c.native.mxcsr)
        }
        Vldmxcsr => {
            c.check_vex()?;
            ldmxcsr(c, op)
        }
        Vstmxcsr => {
            c.check_vex()?;
            c.store(op, c.native.mxcsr)
        }
        _ => c.ud(),
    }
}

fn ldmxcsr(c: &mut Cpu, op: &Op) -> Exec {
    let value: u32 = c.load(op)?;
    if value & !MXCSR_MASK != 0 {
        return c.gp0();
    }
    c.native.mxcsr = value;
    Ok(())
}

impl Cpu {
    /// CR0.EM and the CR4 bit (#UD), CR0.TS (#NM).
    fn check_control(&mut self, enabled: u64) -> Exec {
        if self.cr0 & cr0::EM != 0 || self.cr4 & enabled == 0 {
            return self.ud();
        }
        if self.cr0 & cr0::TS != 0 {
            return self.raise(Exception::NM);
        }
        Ok(())
    }

    fn check_vex(&mut self) -> Exec {
        const STATE: u64 = xcr0::SSE | xcr0::AVX;
        if self.xcr0 & STATE != STATE
            || self.cr4 & cr4::OSXSAVE == 0
            || self.real_mode()
            || self.v86()
        {
            return self.ud();
        }
        if self.cr0 & cr0::TS != 0 {
            return self.raise(Exception::NM);
        }
        Ok(())
    }

    /// CR4.OSXSAVE (#UD), CR0.TS (#NM).
    fn check_xsave(&mut self) -> Exec {
        if self.cr4 & cr4::OSXSAVE == 0 {
            return self.ud();
        }
        if self.cr0 & cr0::TS != 0 {
            return self.raise(Exception::NM);
        }
        Ok(())
    }

    /// Address of the operand, which must be a multiple of `align`.
    fn aligned(&mut self, op: &Op, len: usize, align: u64, access: Access) -> Exec<u64> {
        let linear = self.operand(op, len as u64, access)?;
        if linear % align != 0 {
            self.gp0()
        } else {
            Ok(linear)
        }
    }

    /// EDX:EAX and XCR0.
    fn requested(&self) -> u64 {
        let (high, low) = (self.get::<u32>(gpr::RDX), self.get::<u32>(gpr::RAX));
        (u64::from(high) << 32 | u64::from(low)) & self.xcr0
    }

    /// The x87 part of an FXSAVE image; `wide`: with 64-bit pointers.
    fn x87_image(&self, wide: bool) -> [u8; 160] {
        let mut image = self.native.x87();
        if !wide {
            // Offset 32 bits, selector 16 bits (which reads as zero), twice.
            image[12..16].fill(0);
            image[20..24].fill(0);
        }
        image
    }

    fn xmm_count(&self) -> usize {
        if self.long64() { 16 } else { 8 }
    }

    /// The FPU registers as they are saved.
    pub fn save_fpu(&self) -> Fpu {
        let image = self.native.x87();
        let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let long = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().expect("8 bytes"));
        let st = |n: usize| {
            let mut register = [0; 16];
            register[..10].copy_from_slice(&image[32 + 16 * n..][..10]);
            register
        };
        Fpu {
            fcw: word(0),
            fsw: word(2),
            ftw: image[4],
            fop: word(6),
            fip: long(8),
            fdp: long(16),
            st: std::array::from_fn(st),
            mxcsr: self.native.mxcsr,
            ymm: self.native.ymm,
        }
    }

    /// Takes saved FPU registers.
    pub fn load_fpu(&mut self, fpu: &Fpu) {
        let mut image = [0; 160];
        image[0..2].copy_from_slice(&fpu.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&fpu.fsw.to_le_bytes());
        image[4] = fpu.ftw;
        image[6..8].copy_from_slice(&fpu.fop.to_le_bytes());
        image[8..16].copy_from_slice(&fpu.fip.to_le_bytes());
        image[16..24].copy_from_slice(&fpu.fdp.to_le_bytes());
        for (n, register) in fpu.st.iter().enumerate() {
            image[32 + 16 * n..][..10].copy_from_slice(&register[..10]);
        }
        self.native.set_x87(&image);
        self.native.mxcsr = fpu.mxcsr & MXCSR_MASK;
        self.native.ymm = fpu.ymm;
    }
}

fn fxsave(c: &mut Cpu, op: &Op, wide: bool) -> Exec {
    if c.cr0 & (cr0::EM | cr0::TS) != 0 {
        return c.raise(Exception::NM);
    }
    let linear = c.aligned(op, FXSAVE_SIZE, 16, Access::Write)?;
    let mut area = [0; FXSAVE_SIZE];
    area[..160].copy_from_slice(&c.x87_image(wide));
    area[24..28].copy_from_slice(&c.native.mxcsr.to_le_bytes());
    area[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    let end = 160 + 16 * c.xmm_count();
    for (n, register) in area[160..end].chunks_mut(16).enumerate() {
        register.copy_from_slice(&c.native.ymm[n][..16]);
    }
    // What lies behind the last register is the software's.
    let written = if c.cr4 & cr4::OSFXSR != 0 { end } else { 160 };
    c.write_bytes(linear, op.seg, &area[..written])
}

fn mxcsr_of(area: &[u8]) -> u32 {
    u32::from_le_bytes(area[24..28].try_into().expect("4 bytes"))
}

fn x87_of(area: &[u8], wide: bool) -> [u8; 160] {
    let mut image: [u8; 160] = area[..160].try_into().expect("160 bytes");
    if !wide {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    image
}

fn fxrstor(c: &mut Cpu, op: &Op, wide: bool) -> Exec {
    if c.cr0 & (cr0::EM | cr0::TS) != 0 {
        return c.raise(Exception::NM);
    }
    let linear = c.aligned(op, FXSAVE_SIZE, 16, Access::Read)?;
    let mut area = [0; FXSAVE_SIZE];
    c.read_bytes(linear, op.seg, &mut area)?;
    let mxcsr = mxcsr_of(&area);
    let with_sse = c.cr4 & cr4::OSFXSR != 0;
    if with_sse && mxcsr & !MXCSR_MASK != 0 {
        return c.gp0();
    }
    c.native.set_x87(&x87_of(&area, wide));
    if with_sse {
        c.native.mxcsr = mxcsr;
        for n in 0..c.xmm_count() {
            c.native.ymm[n][..16].copy_from_slice(&area[160 + 16 * n..][..16]);
        }
    }
    Ok(())
}

fn xsave(c: &mut Cpu, op: &Op, wide: bool) -> Exec {
    c.check_xsave()?;
    let requested = c.requested();
    let size = if requested & xcr0::AVX != 0 {
        AREA
    } else {
        AVX_OFFSET
    };
    let linear = c.aligned(op, size, 64, Access::Write)?;
    let mut old = [0; 8];
    c.read_bytes(linear.wrapping_add(HEADER as u64), op.seg, &mut old)?;
    c.check_write(linear, size as u64, op.seg)?;
    // Components that are not requested keep their bit; the requested ones are all in use.
    let bits = u64::from_le_bytes(old) & !requested | requested;
    // Parts of the legacy region that are next to each other are written together.
    let end = XMM + 16 * c.xmm_count();
    let mut legacy = [0; FXSAVE_SIZE];
    legacy[..XMM].copy_from_slice(&c.x87_image(wide));
    legacy[MXCSR..MXCSR + 4].copy_from_slice(&c.native.mxcsr.to_le_bytes());
    legacy[MXCSR + 4..MXCSR + 8].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    let mut upper = [0; 16 * 16];
    for n in 0..c.xmm_count() {
        let (low, high) = c.native.ymm[n].split_at(16);
        legacy[XMM + 16 * n..][..16].copy_from_slice(low);
        upper[16 * n..][..16].copy_from_slice(high);
    }
    let x87 = requested & xcr0::X87 != 0;
    let sse = requested & xcr0::SSE != 0;
    let mxcsr = requested & (xcr0::SSE | xcr0::AVX) != 0;
    // From where to where.
    let parts: &[(usize, usize)] = match (x87, mxcsr, sse) {
        (true, _, true) => &[(0, end)],
        (true, true, false) => &[(0, XMM)],
        (true, false, false) => &[(0, MXCSR), (MXCSR + 8, XMM)],
        (false, _, true) => &[(MXCSR, MXCSR + 8), (XMM, end)],
        (false, true, false) => &[(MXCSR, MXCSR + 8)],
        (false, false, false) => &[],
    };
    for &(from, to) in parts {
        let at = linear.wrapping_add(from as u64);
        c.write_bytes(at, op.seg, &legacy[from..to])?;
    }
    if requested & xcr0::AVX != 0 {
        let at = linear.wrapping_add(AVX_OFFSET as u64);
        c.write_bytes(at, op.seg, &upper[..16 * c.xmm_count()])?;
    }
    c.write_bytes(
        linear.wrapping_add(HEADER as u64),
        op.seg,
        &bits.to_le_bytes(),
    )
}

fn xrstor(c: &mut Cpu, op: &Op, wide: bool) -> Exec {
    c.check_xsave()?;
    let requested = c.requested();
    let size = if requested & xcr0::AVX != 0 {
        AREA
    } else {
        AVX_OFFSET
    };
    let linear = c.aligned(op, size, 64, Access::Read)?;
    let mut area = [0; AREA];
    c.read_bytes(linear, op.seg, &mut area[..size])?;
    let header = &area[HEADER..AVX_OFFSET];
    let bits = u64::from_le_bytes(header[..8].try_into().expect("8 bytes"));
    // XCOMP_BV and the reserved bytes behind it must be zero: the compact format is not offered.
    if bits & !c.xcr0 != 0 || header[8..24].iter().any(|b| *b != 0) {
        return c.gp0();
    }
    let mxcsr = mxcsr_of(&area);
    let with_mxcsr = requested & (xcr0::SSE | xcr0::AVX) != 0;
    if with_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return c.gp0();
    }
    let initial = NativeState::new();
    if requested & xcr0::X87 != 0 {
        let image = if bits & xcr0::X87 != 0 {
            x87_of(&area, wide)
        } else {
            // After FINIT.
            let mut image = [0; 160];
            image[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
            image
        };
        c.native.set_x87(&image);
    }
    if with_mxcsr {
        c.native.mxcsr = mxcsr;
    }
    for n in 0..c.xmm_count() {
        let register = &mut c.native.ymm[n];
        if requested & xcr0::SSE != 0 {
            let saved = &area[160 + 16 * n..][..16];
            let used = bits & xcr0::SSE != 0;
            register[..16].copy_from_slice(if used { saved } else { &initial.ymm[0][..16] });
        }
        if requested & xcr0::AVX != 0 {
            let saved = &area[AVX_OFFSET + 16 * n..][..16];
            let used = bits & xcr0::AVX != 0;
            register[16..].copy_from_slice(if used { saved } else { &initial.ymm[0][16..] });
        }
    }
    Ok(())
}
