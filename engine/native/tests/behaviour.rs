//! What callers rely on, with expected values written by hand.

// UNSAFETY: executing a stub is unsafe, its cache must be alive; here it always is.
#![allow(unsafe_code)]

use iced_x86::{Decoder, DecoderOptions, Instruction};
use lodger_native::{Class, Guest, Masked, MemUse, Native, NativeState, Outcome, StubCache};

fn decode(bitness: u32, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(bitness, bytes, 0x1000, DecoderOptions::NONE).decode()
}

/// A processor whose state tests set and look at.
struct Cpu {
    cache: StubCache,
    state: NativeState,
    gprs: [u64; 16],
    flags: u32,
}

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;

impl Cpu {
    fn new() -> Self {
        let mut cpu = Self {
            cache: StubCache::new().unwrap(),
            state: NativeState::new(),
            gprs: [0; 16],
            flags: 0x202,
        };
        assert_eq!(cpu.run(&[0xdb, 0xe3]), Outcome::Done); // fninit
        cpu
    }

    fn prepare(&mut self, bytes: &[u8]) -> Native {
        let instruction = decode(64, bytes);
        self.cache
            .prepare(&instruction)
            .unwrap()
            .unwrap_or_else(|| panic!("{instruction} is not native"))
    }

    /// Executes 64-bit code; its memory operand is what is in `staging`.
    fn run(&mut self, bytes: &[u8]) -> Outcome {
        let native = self.prepare(bytes);
        // SAFETY: the cache is alive and was not cleared since `prepare`.
        unsafe { native.exec(&mut self.state, &mut self.gprs, &mut self.flags) }
    }

    fn done(&mut self, bytes: &[u8]) {
        assert_eq!(self.run(bytes), Outcome::Done, "{}", decode(64, bytes));
    }

    fn xmm(&self, number: usize) -> u128 {
        u128::from_le_bytes(self.state.ymm[number][..16].try_into().unwrap())
    }

    fn set_xmm(&mut self, number: usize, value: u128) {
        self.state.ymm[number][..16].copy_from_slice(&value.to_le_bytes());
    }
}

#[test]
fn attributes() {
    use Class::*;
    use MemUse::*;
    // bytes, class, VEX, memory, alignment, waits for x87, uses MXCSR, uses flags
    type Line = (
        &'static [u8],
        Class,
        bool,
        MemUse,
        Option<u8>,
        bool,
        bool,
        bool,
    );
    #[rustfmt::skip]
    let table: &[Line] = &[
        (&[0x0f, 0x28, 0xc1],                   Sse,  false, None,       Option::None, false, false, false), // movaps xmm0,xmm1
        (&[0x0f, 0x28, 0x01],                   Sse,  false, Read(16),   Some(16),     false, false, false), // movaps xmm0,[rcx]
        (&[0x0f, 0x10, 0x01],                   Sse,  false, Read(16),   Option::None, false, false, false), // movups xmm0,[rcx]
        (&[0x0f, 0x11, 0x01],                   Sse,  false, Write(16),  Option::None, false, false, false), // movups [rcx],xmm0
        (&[0xf3, 0x0f, 0x11, 0x01],             Sse,  false, Write(4),   Option::None, false, false, false), // movss [rcx],xmm0
        (&[0x0f, 0x58, 0x01],                   Sse,  false, Read(16),   Some(16),     false, true,  false), // addps xmm0,[rcx]
        (&[0x0f, 0x2f, 0x01],                   Sse,  false, Read(4),    Option::None, false, true,  true),  // comiss xmm0,[rcx]
        (&[0x66, 0x0f, 0x3a, 0x61, 0x01, 0],    Sse,  false, Read(16),   Option::None, false, false, true),  // pcmpestri xmm0,[rcx],0
        (&[0xc5, 0xfc, 0x58, 0x01],             Avx,  true,  Read(32),   Option::None, false, true,  false), // vaddps ymm0,ymm0,[rcx]
        (&[0xc5, 0xfc, 0x29, 0x01],             Avx,  true,  Write(32),  Some(32),     false, false, false), // vmovaps [rcx],ymm0
        (&[0xc4, 0xe2, 0x78, 0xf2, 0x01],       Gpr,  true,  Read(4),    Option::None, false, false, true),  // andn eax,eax,[rcx]
        (&[0x0f, 0x38, 0xf0, 0x01],             Gpr,  false, Read(4),    Option::None, false, false, false), // movbe eax,[rcx]
        (&[0x0f, 0xc3, 0x01],                   Gpr,  false, Write(4),   Option::None, false, false, false), // movnti [rcx],eax
        (&[0x0f, 0x18, 0x01],                   Gpr,  false, None,       Option::None, false, false, false), // prefetchnta [rcx]
        (&[0xd9, 0x01],                         X87,  false, Read(4),    Option::None, true,  false, false), // fld dword [rcx]
        (&[0xdb, 0x39],                         X87,  false, Write(10),  Option::None, true,  false, false), // fstp tbyte [rcx]
        (&[0xdf, 0xe0],                         X87,  false, None,       Option::None, false, false, false), // fnstsw ax
        (&[0x9b],                               X87,  false, None,       Option::None, true,  false, false), // fwait
        (&[0xdb, 0xf1],                         X87,  false, None,       Option::None, true,  false, true),  // fcomi st,st(1)
        (&[0xd9, 0x31],                         X87,  false, Write(28),  Option::None, false, false, false), // fnstenv [rcx]
        (&[0x66, 0xd9, 0x31],                   X87,  false, Write(14),  Option::None, false, false, false), // fnstenv, 16-bit
        (&[0xdd, 0x31],                         X87,  false, Write(108), Option::None, false, false, false), // fnsave [rcx]
        (&[0x66, 0xdd, 0x31],                   X87,  false, Write(94),  Option::None, false, false, false), // fnsave, 16-bit
        (&[0xdd, 0x21],                         X87,  false, Read(108),  Option::None, true,  false, false), // frstor [rcx]
        (&[0x0f, 0x6f, 0x01],                   Mmx,  false, Read(8),    Option::None, true,  false, false), // movq mm0,[rcx]
        (&[0x0f, 0x77],                         Mmx,  false, None,       Option::None, true,  false, false), // emms
        (&[0x0f, 0x2a, 0x01],                   Sse,  false, Read(8),    Option::None, true,  true,  false), // cvtpi2ps xmm0,[rcx]
        (&[0x66, 0x0f, 0x2a, 0x01],             Sse,  false, Read(8),    Option::None, false, false, false), // cvtpi2pd xmm0,[rcx]
        (&[0x66, 0x0f, 0x2c, 0x01],             Sse,  false, Read(16),   Some(16),     true,  true,  false), // cvttpd2pi mm0,[rcx]
    ];
    let mut cpu = Cpu::new();
    for &(bytes, class, vex, mem, align, waits_x87, raises_simd_fp, uses_flags) in table {
        let native = cpu.prepare(bytes);
        assert_eq!(
            (native.class, native.vex, native.mem, native.align),
            (class, vex, mem, align),
            "{}",
            decode(64, bytes)
        );
        assert_eq!(
            (native.waits_x87, native.raises_simd_fp, native.uses_flags),
            (waits_x87, raises_simd_fp, uses_flags),
            "{}",
            decode(64, bytes)
        );
    }
}

#[test]
fn what_the_interpreter_does_itself() {
    #[rustfmt::skip]
    let table: &[&[u8]] = &[
        &[0x01, 0xc8],                               // add eax,ecx
        &[0x0f, 0x44, 0xc1],                         // cmove eax,ecx
        &[0x0f, 0xae, 0x11],                         // ldmxcsr [rcx]
        &[0x0f, 0xae, 0x01],                         // fxsave [rcx]
        &[0x0f, 0xae, 0x21],                         // xsave [rcx]
        &[0x0f, 0xae, 0xf0],                         // mfence
        &[0x0f, 0xc7, 0xf0],                         // rdrand eax
        &[0x0f, 0x31],                               // rdtsc
        &[0xc3],                                     // ret
        &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1],       // vaddps zmm0,zmm0,zmm1
        &[0xc4, 0xe2, 0x7d, 0xdc, 0xc1],             // vaesenc ymm0,ymm0,ymm1
        &[0xff, 0xff],                               // invalid
    ];
    let mut cache = StubCache::new().unwrap();
    for bytes in table {
        let instruction = decode(64, bytes);
        assert!(
            cache.prepare(&instruction).unwrap().is_none(),
            "{instruction}"
        );
        assert!(Masked::decode(&instruction).is_none(), "{instruction}");
    }
}

#[test]
fn unmasked_simd_exception_leaves_the_destination() {
    let mut cpu = Cpu::new();
    let one = u128::from(1.0f32.to_bits());
    cpu.set_xmm(1, one);
    cpu.set_xmm(2, 0);
    cpu.state.mxcsr = 0x1f80 & !0x200; // ZM
    assert_eq!(cpu.run(&[0xf3, 0x0f, 0x5e, 0xca]), Outcome::SimdException); // divss xmm1,xmm2
    assert_eq!(cpu.xmm(1), one);
    assert_eq!(cpu.state.mxcsr, 0x1d84);
    // Masked, it gives infinity.
    cpu.state.mxcsr = 0x1f80;
    cpu.done(&[0xf3, 0x0f, 0x5e, 0xca]);
    assert_eq!(cpu.xmm(1), u128::from(f32::INFINITY.to_bits()));
    assert_eq!(cpu.state.mxcsr, 0x1f84);
}

#[test]
fn unmasked_underflow_is_raised_for_exact_results_too() {
    let mut cpu = Cpu::new();
    let tiny = u128::from(f32::MIN_POSITIVE.to_bits());
    cpu.set_xmm(1, tiny);
    cpu.set_xmm(2, u128::from(0.5f32.to_bits()));
    cpu.state.mxcsr = 0x1f80 & !0x800; // UM
    assert_eq!(cpu.run(&[0xf3, 0x0f, 0x59, 0xca]), Outcome::SimdException); // mulss xmm1,xmm2
    assert_eq!((cpu.xmm(1), cpu.state.mxcsr), (tiny, 0x1790));
    cpu.state.mxcsr = 0x1f80;
    cpu.done(&[0xf3, 0x0f, 0x59, 0xca]);
    assert_eq!((cpu.xmm(1), cpu.state.mxcsr), (0x40_0000, 0x1f80));
}

#[test]
fn reserved_bits_of_a_guest_mxcsr_do_no_harm() {
    let mut cpu = Cpu::new();
    cpu.state.mxcsr = 0xffff_ff80;
    cpu.done(&[0xf3, 0x0f, 0x58, 0xca]); // addss xmm1,xmm2
    assert_eq!(cpu.state.mxcsr, 0xffff_ff80);
}

#[test]
fn a_pending_x87_exception_stops_waiting_instructions_only() {
    let mut cpu = Cpu::new();
    cpu.state.staging[..2].copy_from_slice(&0x37bu16.to_le_bytes());
    cpu.done(&[0xd9, 0x29]); // fldcw: ZM clear
    cpu.done(&[0xd9, 0xe8]); // fld1
    cpu.done(&[0xd9, 0xee]); // fldz
    assert!(!cpu.state.x87_exception_pending());
    cpu.done(&[0xde, 0xf9]); // fdivp st(1),st
    assert!(cpu.state.x87_exception_pending());
    assert_eq!(cpu.state.fsw() & 0x84, 0x84); // ES, ZE
    let before = cpu.state.x87();
    for waiting in [
        &[0xd9, 0xe8][..],
        &[0x9b],
        &[0x0f, 0x77],
        &[0x0f, 0x6f, 0xc1],
    ] {
        assert_eq!(
            cpu.run(waiting),
            Outcome::X87Exception,
            "{}",
            decode(64, waiting)
        );
        assert_eq!(cpu.state.x87(), before);
    }
    cpu.gprs[RAX] = 0x1234_5678_9abc_def0;
    cpu.done(&[0xdf, 0xe0]); // fnstsw ax
    assert_eq!(cpu.gprs[RAX] >> 16, 0x1234_5678_9abc);
    assert_eq!(cpu.gprs[RAX] as u16, cpu.state.fsw());
    cpu.done(&[0xdb, 0xe2]); // fnclex
    cpu.done(&[0x9b]); // fwait
}

#[test]
fn an_x87_store_with_an_unmasked_exception_stores_nothing() {
    let mut cpu = Cpu::new();
    cpu.state.staging[..2].copy_from_slice(&0x37eu16.to_le_bytes());
    cpu.done(&[0xd9, 0x29]); // fldcw: IM clear
    // fstp dword [rcx] from an empty stack
    assert_eq!(cpu.run(&[0xd9, 0x19]), Outcome::NotStored);
    assert!(cpu.state.x87_exception_pending());
}

#[test]
fn any_x87_image_is_taken() {
    let mut cpu = Cpu::new();
    cpu.state.set_x87(&[0xff; 160]);
    cpu.done(&[0xdf, 0xe0]); // fnstsw ax
    assert_eq!(cpu.gprs[RAX] & 0x7f00, 0x7f00);
    cpu.done(&[0xf3, 0x0f, 0x58, 0xca]); // addss xmm1,xmm2
}

#[test]
fn x87_pointers_are_those_of_the_guest() {
    let mut cpu = Cpu::new();
    cpu.state.x87_ip = 0x1111_2222_3333;
    cpu.state.x87_dp = 0x4444_5555_6666;
    cpu.done(&[0xd9, 0x01]); // fld dword [rcx]
    cpu.state.x87_ip = 0x7777;
    cpu.state.x87_dp = 0x8888;
    cpu.done(&[0xd9, 0xe8]); // fld1: has no operand, the data pointer stays
    cpu.state.x87_ip = 0x9999;
    cpu.done(&[0xdf, 0xe0]); // fnstsw: a control instruction, both stay
    let image = cpu.state.x87();
    assert_eq!(image[8..16], 0x7777u64.to_le_bytes());
    assert_eq!(image[16..24], 0x4444_5555_6666u64.to_le_bytes());
    cpu.state.staging.fill(0xee);
    cpu.done(&[0xd9, 0x31]); // fnstenv, 32-bit
    let field = |n: usize| u32::from_le_bytes(cpu.state.staging[4 * n..][..4].try_into().unwrap());
    assert_eq!((field(3), field(4) & 0xffff), (0x7777, 0));
    assert_eq!((field(5), field(6) & 0xffff), (0x5555_6666, 0));
    assert_eq!(cpu.state.staging[28], 0xee);
}

#[test]
fn stack_pointer_and_high_byte_operands() {
    let mut cpu = Cpu::new();
    cpu.gprs[RSP] = 0xf0f0_0000_0000_0001;
    cpu.done(&[0xf3, 0x48, 0x0f, 0xb8, 0xc4]); // popcnt rax,rsp
    assert_eq!((cpu.gprs[RAX], cpu.flags & 0x8d5), (9, 0));
    cpu.done(&[0xf3, 0x48, 0x0f, 0xb8, 0xe0]); // popcnt rsp,rax
    assert_eq!(cpu.gprs[RSP], 2);
    // crc32 eax,ah and crc32 eax,cl agree
    cpu.gprs[RAX] = 0xffff_ffff_1234_5678;
    cpu.done(&[0xf2, 0x0f, 0x38, 0xf0, 0xc4]);
    let through_ah = cpu.gprs[RAX];
    (cpu.gprs[RAX], cpu.gprs[RCX]) = (0x1234_5678, 0x56);
    cpu.done(&[0xf2, 0x0f, 0x38, 0xf0, 0xc1]);
    assert_eq!(through_ah, cpu.gprs[RAX]);
    assert_eq!(cpu.gprs[RAX] >> 32, 0);
}

#[test]
fn byte_swaps_through_memory() {
    let mut cpu = Cpu::new();
    cpu.gprs[RAX] = u64::MAX;
    cpu.state.staging[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    cpu.done(&[0x66, 0x0f, 0x38, 0xf0, 0x01]); // movbe ax,[rcx]
    assert_eq!(cpu.gprs[RAX], 0xffff_ffff_ffff_0102);
    cpu.done(&[0x0f, 0x38, 0xf0, 0x01]); // movbe eax,[rcx]
    assert_eq!(cpu.gprs[RAX], 0x0102_0304);
    cpu.done(&[0x48, 0x0f, 0x38, 0xf0, 0x01]); // movbe rax,[rcx]
    assert_eq!(cpu.gprs[RAX], 0x0102_0304_0506_0708);
    cpu.gprs[RBX] = 0xaabb_ccdd;
    cpu.done(&[0x0f, 0x38, 0xf1, 0x19]); // movbe [rcx],ebx
    assert_eq!(cpu.state.staging[..8], [0xaa, 0xbb, 0xcc, 0xdd, 5, 6, 7, 8]);
}

#[test]
fn implied_registers_of_string_comparison() {
    let mut cpu = Cpu::new();
    cpu.set_xmm(1, u128::from_le_bytes(*b"needle__________"));
    cpu.set_xmm(2, u128::from_le_bytes(*b"hay needle hay  "));
    (cpu.gprs[RAX], cpu.gprs[RDX], cpu.gprs[RCX]) = (6, 16, u64::MAX);
    cpu.done(&[0x66, 0x0f, 0x3a, 0x61, 0xca, 0x0c]); // pcmpestri xmm1,xmm2,12: substring
    assert_eq!(cpu.gprs[..3], [6, 4, 16]);
    assert_eq!(cpu.flags & 0x8d5, 0x81); // CF: found, SF: the first string is short, the second is not
}

#[test]
fn upper_halves() {
    let mut cpu = Cpu::new();
    cpu.state.ymm = [[0x55; 32]; 16];
    cpu.done(&[0x0f, 0x57, 0xc0]); // xorps xmm0,xmm0
    assert_eq!(cpu.state.ymm[0][16..], [0x55; 16]);
    cpu.done(&[0xc5, 0xf0, 0x57, 0xc9]); // vxorps xmm1,xmm1,xmm1
    assert_eq!(cpu.state.ymm[1], [0; 32]);
    // vzeroupper reaches only the registers that the mode has.
    for (bitness, cleared) in [(32, 8), (64, 16)] {
        let native = cpu
            .cache
            .prepare(&decode(bitness, &[0xc5, 0xf8, 0x77]))
            .unwrap()
            .unwrap();
        assert_eq!(native.class, Class::Avx);
        cpu.state.ymm = [[0x55; 32]; 16];
        // SAFETY: the cache is alive.
        let outcome = unsafe { native.exec(&mut cpu.state, &mut cpu.gprs, &mut cpu.flags) };
        assert_eq!(outcome, Outcome::Done);
        for (number, register) in cpu.state.ymm.iter().enumerate() {
            assert_eq!(register[..16], [0x55; 16]);
            assert_eq!(register[16..] == [0; 16], number < cleared);
        }
    }
}

#[test]
fn forms_share_stubs_and_a_full_cache_starts_again() {
    let mut cache = StubCache::with_capacity(4096).unwrap();
    // pshufd register,[address],immediate: neither the address nor the mode makes a difference, the rest does.
    let pshufd = |form: u16, displacement: u8| {
        let [immediate, register] = form.to_le_bytes();
        [
            0x66,
            0x0f,
            0x70,
            0x41 | register << 3,
            displacement,
            immediate,
        ]
    };
    for form in 0..0x800 {
        for displacement in 0..100 {
            let instruction = decode(64, &pshufd(form, displacement));
            if cache.prepare(&instruction).is_err() {
                assert!(
                    displacement == 0 && form > 50,
                    "full at {displacement}, {form}"
                );
                cache.clear();
                assert!(cache.prepare(&instruction).unwrap().is_some());
                return;
            }
            assert!(
                cache
                    .prepare(&decode(32, &pshufd(form, displacement)))
                    .unwrap()
                    .is_some()
            );
        }
    }
    panic!("never full");
}

/// Memory of one page, which faults elsewhere.
struct Page {
    state: NativeState,
    gprs: [u64; 16],
    page: Vec<u8>,
}

#[derive(Debug, PartialEq)]
struct PageFault(u64);

impl Page {
    const ADDRESS: u64 = 0x5000;

    fn new() -> Self {
        let page = (0..4096u32).map(|byte| byte as u8).collect();
        Self {
            state: NativeState::new(),
            gprs: [0; 16],
            page,
        }
    }

    fn offset(address: u64, len: usize) -> Result<usize, PageFault> {
        match address.checked_sub(Self::ADDRESS) {
            Some(offset) if offset + len as u64 <= 4096 => Ok(offset as usize),
            _ => Err(PageFault(address)),
        }
    }
}

impl Guest for Page {
    type Fault = PageFault;
    fn state(&mut self) -> &mut NativeState {
        &mut self.state
    }
    fn gprs(&self) -> &[u64; 16] {
        &self.gprs
    }
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), PageFault> {
        let offset = Self::offset(address, bytes.len())?;
        bytes.copy_from_slice(&self.page[offset..offset + bytes.len()]);
        Ok(())
    }
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), PageFault> {
        let offset = Self::offset(address, bytes.len())?;
        self.page[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

fn dwords(values: [u32; 8]) -> [u8; 32] {
    std::array::from_fn(|n| values[n / 4].to_le_bytes()[n % 4])
}

#[test]
fn a_gather_that_faults_keeps_what_it_has_done() {
    let mut page = Page::new();
    // vpgatherdd ymm1,[rax+ymm2*4],ymm3
    let gather = Masked::decode(&decode(64, &[0xc4, 0xe2, 0x65, 0x90, 0x0c, 0x90])).unwrap();
    assert_eq!(gather.class, Class::Avx);
    page.gprs[RAX] = Page::ADDRESS;
    page.state.ymm[1] = [0xee; 32];
    page.state.ymm[2] = dwords([0, u32::MAX, 1, 0x10_0000, 2, 3, 4, 5]);
    let on = u32::MAX;
    // The second would fault but is masked off; the fourth does.
    page.state.ymm[3] = dwords([on, 0, on, on, on, 0, on, on]);
    let fault = PageFault(Page::ADDRESS + 0x40_0000);
    assert_eq!(gather.exec(&mut page), Err(fault));
    let kept = 0xeeee_eeee;
    assert_eq!(
        page.state.ymm[1],
        dwords([0x0302_0100, kept, 0x0706_0504, kept, kept, kept, kept, kept])
    );
    assert_eq!(page.state.ymm[3], dwords([0, 0, 0, on, on, 0, on, on]));
    // The handler repairs it, the instruction runs again.
    page.state.ymm[2][12..16].fill(0);
    assert_eq!(gather.exec(&mut page), Ok(()));
    assert_eq!(
        page.state.ymm[1],
        dwords([
            0x0302_0100,
            kept,
            0x0706_0504,
            0x0302_0100,
            0x0b0a_0908,
            kept,
            0x1312_1110,
            0x1716_1514
        ])
    );
    assert_eq!(page.state.ymm[3], [0; 32]);
}

#[test]
fn masked_moves_touch_only_selected_elements() {
    let mut page = Page::new();
    // vmaskmovps xmm1,xmm2,[rax] across the end of the page
    let load = Masked::decode(&decode(64, &[0xc4, 0xe2, 0x69, 0x2c, 0x08])).unwrap();
    page.gprs[RAX] = Page::ADDRESS + 4096 - 8;
    page.state.ymm[1] = [0xee; 32];
    page.state.ymm[2] = dwords([0, 1 << 31, 0, 0, 1 << 31, 0, 0, 0]);
    assert_eq!(load.exec(&mut page), Ok(()));
    assert_eq!(
        page.state.ymm[1],
        dwords([0, 0xfffe_fdfc, 0, 0, 0, 0, 0, 0])
    );
    page.state.ymm[2] = dwords([0, 0, 1 << 31, 0, 0, 0, 0, 0]);
    assert_eq!(load.exec(&mut page), Err(PageFault(Page::ADDRESS + 4096)));
    // maskmovdqu xmm1,xmm2 at [edi] with a 32-bit address
    let store = Masked::decode(&decode(64, &[0x67, 0x66, 0x0f, 0xf7, 0xca])).unwrap();
    assert_eq!(store.class, Class::Sse);
    page.gprs[7] = 0xffff_ffff_0000_0000 | Page::ADDRESS;
    page.state.ymm[1] = [0xaa; 32];
    page.state.ymm[2] = [0; 32];
    page.state.ymm[2][1] = 0x80;
    page.state.ymm[2][15] = 0xff;
    assert_eq!(store.exec(&mut page), Ok(()));
    assert_eq!(page.page[..3], [0, 0xaa, 2]);
    assert_eq!(page.page[14..17], [14, 0xaa, 16]);
}
