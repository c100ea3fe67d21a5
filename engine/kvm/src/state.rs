//! [`CpuState`] to and from KVM, one ioctl after the other.
//!
//! The conversions are plain functions; the order of the ioctls matters: control registers and the APIC base before the MSRs and the APIC
//! page, the APIC page before the TSC deadline, the events last.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    Msrs as KvmMsrs, kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use lodger_vcpu::EngineError;
use lodger_x86::bits::{msr, xcr0};
use lodger_x86::{Activity, CpuState, DescriptorTable, Fpu, Msrs, Segment};

use crate::failure::host;
use crate::lapic_page;

/// What relates a vCPU's time to guest time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Time {
    /// Guest time in ns.
    pub now: u64,
    /// The TSC's frequency.
    pub tsc_khz: u32,
}

impl Time {
    /// Guest time in TSC cycles.
    fn cycles(self) -> u64 {
        (u128::from(self.now) * u128::from(self.tsc_khz) / 1_000_000) as u64
    }
}

/// What the host's KVM offers of the state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offers {
    /// Components of XCR0 that KVM can hold.
    pub xcr0: u64,
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    let bit = |n: u16| (s.attributes >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind(),
        present: bit(7),
        dpl: s.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(!s.is_present()),
        padding: 0,
    }
}

fn segment_from_kvm(k: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u16| u16::from(value & 1) << n;
    let present = k.present & u8::from(k.unusable == 0);
    Segment {
        selector: k.selector,
        attributes: u16::from(k.type_ & 15)
            | bit(k.s, 4)
            | u16::from(k.dpl & 3) << 5
            | bit(present, 7)
            | bit(k.avl, 12)
            | bit(k.l, 13)
            | bit(k.db, 14)
            | bit(k.g, 15),
        limit: k.limit,
        base: k.base,
    }
}

fn table_to_kvm(t: DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

fn table_from_kvm(k: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: k.base,
        limit: k.limit,
    }
}

fn regs_to_kvm(s: &CpuState) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = s.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: s.rip,
        rflags: s.rflags,
    }
}

fn gpr_from_kvm(k: &kvm_regs) -> [u64; 16] {
    [
        k.rax, k.rcx, k.rdx, k.rbx, k.rsp, k.rbp, k.rsi, k.rdi, k.r8, k.r9, k.r10, k.r11, k.r12,
        k.r13, k.r14, k.r15,
    ]
}

fn sregs_to_kvm(s: &CpuState) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = s.segments.map(|segment| segment_to_kvm(&segment));
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: segment_to_kvm(&s.tr),
        ldt: segment_to_kvm(&s.ldtr),
        gdt: table_to_kvm(s.gdtr),
        idt: table_to_kvm(s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: u64::from(s.lapic.tpr >> 4),
        efer: s.efer,
        apic_base: s.lapic.base,
        interrupt_bitmap: [0; 4],
    }
}

fn segments_from_kvm(k: &kvm_sregs) -> [Segment; 6] {
    [k.es, k.cs, k.ss, k.ds, k.fs, k.gs].map(|segment| segment_from_kvm(&segment))
}

/// Bytes of the XSAVE area's standard format (SDM vol. 1, 13.4).
const XSTATE_BV: usize = 512;
const AVX_OFFSET: usize = 576;

fn fpu_to_kvm(f: &Fpu, components: u64) -> kvm_xsave {
    let mut bytes = [0_u8; 4096];
    let mut put = |offset: usize, data: &[u8]| {
        bytes[offset..offset + data.len()].copy_from_slice(data);
    };
    put(0, &f.fcw.to_le_bytes());
    put(2, &f.fsw.to_le_bytes());
    put(4, &[f.ftw]);
    put(6, &f.fop.to_le_bytes());
    put(8, &f.fip.to_le_bytes());
    put(16, &f.fdp.to_le_bytes());
    put(24, &f.mxcsr.to_le_bytes());
    for (i, st) in f.st.iter().enumerate() {
        put(32 + i * 16, &st[..10]);
    }
    for (i, ymm) in f.ymm.iter().enumerate() {
        put(160 + i * 16, &ymm[..16]);
        if components & xcr0::AVX != 0 {
            put(AVX_OFFSET + i * 16, &ymm[16..]);
        }
    }
    let present = components & (xcr0::X87 | xcr0::SSE | xcr0::AVX);
    put(XSTATE_BV, &present.to_le_bytes());
    let mut xsave = kvm_xsave::default();
    for (word, chunk) in xsave.region.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*chunk);
    }
    xsave
}

fn fpu_from_kvm(xsave: &kvm_xsave) -> Fpu {
    let mut bytes = [0_u8; 4096];
    for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(xsave.region) {
        *chunk = word.to_le_bytes();
    }
    fn take<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
        std::array::from_fn(|i| bytes[offset + i])
    }
    let bytes = &bytes[..];
    let present = u64::from_le_bytes(take(bytes, XSTATE_BV));
    let mut f = Fpu {
        fcw: u16::from_le_bytes(take(bytes, 0)),
        fsw: u16::from_le_bytes(take(bytes, 2)),
        ftw: bytes[4],
        fop: u16::from_le_bytes(take(bytes, 6)),
        fip: u64::from_le_bytes(take(bytes, 8)),
        fdp: u64::from_le_bytes(take(bytes, 16)),
        st: [[0; 16]; 8],
        mxcsr: u32::from_le_bytes(take(bytes, 24)),
        ymm: [[0; 32]; 16],
    };
    for (i, st) in f.st.iter_mut().enumerate() {
        st[..10].copy_from_slice(&bytes[32 + i * 16..][..10]);
    }
    for (i, ymm) in f.ymm.iter_mut().enumerate() {
        ymm[..16].copy_from_slice(&bytes[160 + i * 16..][..16]);
        if present & xcr0::AVX != 0 {
            ymm[16..].copy_from_slice(&bytes[AVX_OFFSET + i * 16..][..16]);
        }
    }
    f
}

/// The MSRs of [`Msrs`] as (number, value), in a fixed order.
fn msr_list(m: &Msrs) -> Vec<(u32, u64)> {
    let Msrs {
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        tsc_aux,
        pat,
        misc_enable,
        mtrr_def_type,
        mtrr_variable,
        mtrr_fixed,
        kvm_system_time,
        kvm_wall_clock,
    } = m;
    let mut list = vec![
        (msr::STAR, *star),
        (msr::LSTAR, *lstar),
        (msr::CSTAR, *cstar),
        (msr::SFMASK, *sfmask),
        (msr::KERNEL_GS_BASE, *kernel_gs_base),
        (msr::SYSENTER_CS, *sysenter_cs),
        (msr::SYSENTER_ESP, *sysenter_esp),
        (msr::SYSENTER_EIP, *sysenter_eip),
        (msr::TSC_AUX, *tsc_aux),
        (msr::PAT, *pat),
        (msr::MISC_ENABLE, *misc_enable),
        (msr::MTRR_DEF_TYPE, *mtrr_def_type),
        (msr::KVM_SYSTEM_TIME_NEW, *kvm_system_time),
        (msr::KVM_WALL_CLOCK_NEW, *kvm_wall_clock),
    ];
    list.extend((msr::MTRR_PHYS_BASE0..).zip(mtrr_variable.iter().copied()));
    list.extend(MTRR_FIXED.into_iter().zip(mtrr_fixed.iter().copied()));
    list
}

const MTRR_FIXED: [u32; 11] = [
    msr::MTRR_FIX_64K,
    msr::MTRR_FIX_16K_80000,
    msr::MTRR_FIX_16K_A0000,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
];

/// The reverse of [`msr_list`], from values in the same order.
fn msrs_from_values(values: &[u64]) -> Msrs {
    let mut next = values.iter().copied();
    let mut value = || next.next().unwrap_or(0);
    Msrs {
        star: value(),
        lstar: value(),
        cstar: value(),
        sfmask: value(),
        kernel_gs_base: value(),
        sysenter_cs: value(),
        sysenter_esp: value(),
        sysenter_eip: value(),
        tsc_aux: value(),
        pat: value(),
        misc_enable: value(),
        mtrr_def_type: value(),
        kvm_system_time: value(),
        kvm_wall_clock: value(),
        mtrr_variable: std::array::from_fn(|_| value()),
        mtrr_fixed: std::array::from_fn(|_| value()),
    }
}

/// Reads one MSR; `None` if this KVM does not have it.
fn read_msr(fd: &VcpuFd, index: u32) -> Result<Option<u64>, EngineError> {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let mut msrs = one_msr(entry)?;
    let read = fd
        .get_msrs(&mut msrs)
        .map_err(host(format!("KVM does not read MSR {index:#x}")))?;
    Ok((read == 1).then(|| msrs.as_slice()[0].data))
}

/// Writes one MSR; false if this KVM does not have it, or not with this value.
fn write_msr(fd: &VcpuFd, index: u32, data: u64) -> Result<bool, EngineError> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    fd.set_msrs(&one_msr(entry)?)
        .map(|written| written == 1)
        .map_err(host(format!("KVM does not write MSR {index:#x}")))
}

fn one_msr(entry: kvm_msr_entry) -> Result<KvmMsrs, EngineError> {
    KvmMsrs::from_entries(&[entry]).map_err(|e| EngineError::Internal(format!("MSR list: {e:?}")))
}

/// Writes an MSR that the state needs. One that this KVM does not have may be left out if it has its reset value.
fn require_msr(fd: &VcpuFd, index: u32, value: u64, reset: u64) -> Result<(), EngineError> {
    if write_msr(fd, index, value)? || value == reset {
        return Ok(());
    }
    Err(EngineError::State(format!(
        "KVM on this host does not take {value:#x} in MSR {index:#x}"
    )))
}

fn refused(what: &str, why: &str) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    let text = format!("KVM refuses the {what} ({why})");
    move |e| EngineError::State(format!("{text}: {e}"))
}

/// Loads the whole state.
pub(crate) fn load(
    fd: &VcpuFd,
    s: &CpuState,
    time: Time,
    offers: Offers,
) -> Result<(), EngineError> {
    fd.set_sregs(&sregs_to_kvm(s)).map_err(refused(
        "segments and control registers",
        "they contradict each other, or a bit is not in CPUID on this host",
    ))?;
    fd.set_regs(&regs_to_kvm(s))
        .map_err(refused("general registers", "RFLAGS is malformed"))?;

    if s.xcr0 & !offers.xcr0 != 0 {
        return Err(EngineError::State(format!(
            "XCR0 is {:#x}, but this host has only {:#x}",
            s.xcr0, offers.xcr0
        )));
    }
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        reserved: 0,
        value: s.xcr0,
    };
    fd.set_xcrs(&xcrs)
        .map_err(refused("XCR0", "not in CPUID on this host"))?;
    let xsave = fpu_to_kvm(&s.fpu, offers.xcr0);
    // SAFETY: no dynamically enabled component is in use, so KVM reads 4096 bytes, which the structure has.
    unsafe { fd.set_xsave(&xsave) }.map_err(refused("FPU state", "MXCSR is malformed"))?;

    let reset = msr_list(&Msrs::default());
    for ((index, value), (_, reset)) in msr_list(&s.msrs).into_iter().zip(reset) {
        require_msr(fd, index, value, reset)?;
    }
    let tsc = s.tsc_base.wrapping_add(time.cycles());
    require_msr(fd, msr::TSC, tsc, 0)?;

    fd.set_debug_regs(&kvm_debugregs {
        db: s.dr,
        dr6: s.dr6,
        dr7: s.dr7,
        ..Default::default()
    })
    .map_err(refused(
        "debug registers",
        "upper halves of DR6 and DR7 must be zero",
    ))?;

    fd.set_lapic(&lapic_page::from_state(&s.lapic, time.now))
        .map_err(refused("local APIC", "its ID is not the vCPU's number"))?;
    require_msr(fd, msr::TSC_DEADLINE, s.lapic.tsc_deadline, 0)?;

    let mp_state = match s.activity {
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        Activity::Running | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
    };
    fd.set_mp_state(kvm_mp_state { mp_state })
        .map_err(refused("activity", "not with a local APIC in this state"))?;

    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    events.nmi.pending = u8::from(s.nmi_pending);
    events.nmi.masked = u8::from(s.nmi_blocked);
    events.interrupt.shadow = match (s.interrupt_shadow, s.held_debug) {
        (false, _) => 0,
        (true, None) => SHADOW_STI,
        // KVM takes no debug exceptions that it would have to hold back.
        (true, Some(_)) => SHADOW_SS,
    };
    fd.set_vcpu_events(&events)
        .map_err(refused("events", "malformed"))
}

/// KVM_X86_SHADOW_INT_MOV_SS.
const SHADOW_SS: u8 = 1;
/// KVM_X86_SHADOW_INT_STI.
const SHADOW_STI: u8 = 2;

/// Reads the whole state. `id` is the vCPU's number; `shutdown` is what KVM does not keep.
pub(crate) fn store(
    fd: &VcpuFd,
    id: u32,
    time: Time,
    shutdown: bool,
) -> Result<CpuState, EngineError> {
    // First, because it makes KVM act on a pending INIT or start-up IPI.
    let mp_state = fd
        .get_mp_state()
        .map_err(host("KVM does not tell the vCPU's activity"))?;
    let regs = fd
        .get_regs()
        .map_err(host("KVM does not tell the general registers"))?;
    let sregs = fd
        .get_sregs()
        .map_err(host("KVM does not tell the segments"))?;
    let xsave = fd
        .get_xsave()
        .map_err(host("KVM does not tell the FPU state"))?;
    let xcrs = fd.get_xcrs().map_err(host("KVM does not tell XCR0"))?;
    let debug = fd
        .get_debug_regs()
        .map_err(host("KVM does not tell the debug registers"))?;
    let events = fd
        .get_vcpu_events()
        .map_err(host("KVM does not tell the pending events"))?;
    let page = fd
        .get_lapic()
        .map_err(host("KVM does not tell the local APIC's registers"))?;

    let mut values = Vec::new();
    for (index, reset) in msr_list(&Msrs::default()) {
        values.push(read_msr(fd, index)?.unwrap_or(reset));
    }
    let tsc = read_msr(fd, msr::TSC)?.unwrap_or(0);
    let tsc_deadline = read_msr(fd, msr::TSC_DEADLINE)?.unwrap_or(0);

    let mut lapic = lapic_page::to_state(&page, id, sregs.apic_base, tsc_deadline, time.now);
    if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
        take_back(&mut lapic.isr, &mut lapic.irr, events.interrupt.nr);
    }
    let nr_xcrs = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
    let xcr0 = nr_xcrs.into_iter().find(|x| x.xcr == 0);
    Ok(CpuState {
        gpr: gpr_from_kvm(&regs),
        rip: regs.rip,
        rflags: regs.rflags,
        segments: segments_from_kvm(&sregs),
        ldtr: segment_from_kvm(&sregs.ldt),
        tr: segment_from_kvm(&sregs.tr),
        gdtr: table_from_kvm(&sregs.gdt),
        idtr: table_from_kvm(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        xcr0: xcr0.map_or(1, |x| x.value),
        dr: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
        msrs: msrs_from_values(&values),
        fpu: fpu_from_kvm(&xsave),
        lapic,
        tsc_base: tsc.wrapping_sub(time.cycles()),
        activity: match mp_state.mp_state {
            _ if shutdown => Activity::Shutdown,
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        },
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
        nmi_blocked: events.nmi.masked != 0 && events.nmi.injected == 0,
        interrupt_shadow: events.interrupt.shadow != 0,
        held_debug: (events.interrupt.shadow & SHADOW_SS != 0).then_some(0),
    })
}

/// An interrupt that KVM took from the local APIC, but that the guest has not seen yet, becomes pending again.
fn take_back(isr: &mut [u32; 8], irr: &mut [u32; 8], vector: u8) {
    let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
    if isr[word] & bit != 0 {
        isr[word] &= !bit;
        irr[word] |= bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_conversion() {
        for (selector, attributes, limit, base) in [
            (0x10, 0xa09b, 0xffff_ffff, 0),
            (0x18, 0xc093, 0xffff_ffff, 0x1000),
            (0, 0, 0, 0),
            (0xf000, 0x9b, 0xffff, 0xffff_0000),
            (0x33, 0xf0fb, 0x1234_5fff, 0x7fff_1234_5678),
        ] {
            let segment = Segment {
                selector,
                attributes,
                limit,
                base,
            };
            assert_eq!(segment_from_kvm(&segment_to_kvm(&segment)), segment);
        }
    }

    #[test]
    fn the_fpu_survives_the_conversion() {
        let mut f = Fpu {
            fcw: 0x27f,
            fsw: 0x3800,
            ftw: 0xc1,
            fop: 0x123,
            fip: 0x1122_3344_5566,
            fdp: 0x7788_99aa_bbcc,
            mxcsr: 0x1fa0,
            ..Fpu::default()
        };
        for (i, st) in f.st.iter_mut().enumerate() {
            st[..10].fill(i as u8 + 1);
        }
        for (i, ymm) in f.ymm.iter_mut().enumerate() {
            ymm[..16].fill(i as u8 + 0x10);
            ymm[16..].fill(i as u8 + 0x80);
        }
        assert_eq!(fpu_from_kvm(&fpu_to_kvm(&f, 7)), f);
        f.ymm.iter_mut().for_each(|ymm| ymm[16..].fill(0));
        assert_eq!(fpu_from_kvm(&fpu_to_kvm(&f, 3)), f);
    }

    #[test]
    fn msrs_survive_the_conversion() {
        let count = msr_list(&Msrs::default()).len() as u64;
        let values: Vec<u64> = (1..=count).collect();
        let list = msr_list(&msrs_from_values(&values));
        let back: Vec<u64> = list.iter().map(|(_, value)| *value).collect();
        assert_eq!(back, values);
    }

    #[test]
    fn an_interrupt_on_its_way_becomes_pending_again() {
        let (mut isr, mut irr) = ([0; 8], [0; 8]);
        isr[2] = 3;
        take_back(&mut isr, &mut irr, 0x41);
        assert_eq!((isr[2], irr[2]), (1, 2));
        take_back(&mut isr, &mut irr, 0x99);
        assert_eq!(irr, [0, 0, 2, 0, 0, 0, 0, 0], "not this APIC's");
    }
}
