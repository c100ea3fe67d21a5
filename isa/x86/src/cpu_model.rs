//! What CPUID tells: one model chosen once per VM, that every engine it may run on implements.
//!
//! The default model, `v3`, is the x86-64-v3 level as a processor of AMD's family 19h. Why that vendor: its parts are not
//! subject to Meltdown, and with Automatic IBRS a kernel needs no retpolines, so that a software engine, to which speculation
//! attacks do not apply, is not made to execute their mitigations. Leaves are as in the AMD Architecture Programmer's Manual vol. 3,
//! appendix E; bits that AMD does not define are as in the SDM vol. 2, "CPUID". Leaves from 0x40000000 are those of Linux's
//! Documentation/virt/kvm/x86/cpuid.rst, so that guests find the paravirtual clock and use the x2APIC without an IOMMU.

use crate::bits::{cr4, efer, xcr0};

/// Width of guest-physical addresses.
pub const PHYSICAL_ADDRESS_BITS: u32 = 40;

/// One CPUID leaf as the model has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; `None`: ECX does not matter.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX on return.
    pub values: [u32; 4],
}

/// What of a vCPU's state shows in CPUID.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuidContext {
    /// The APIC ID.
    pub apic_id: u32,
    /// CR4 (OSXSAVE).
    pub cr4: u64,
    /// XCR0 (size of the XSAVE area).
    pub xcr0: u64,
    /// The APIC is enabled in the APIC base MSR.
    pub apic_enabled: bool,
}

/// A model: its CPUID leaves and the frequency of its time-stamp counter.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CpuModel {
    /// The name by which a user chooses it.
    pub name: String,
    /// The leaves.
    pub leaves: Vec<CpuidLeaf>,
    /// Time-stamp counter frequency in kHz.
    pub tsc_khz: u32,
}

/// Instruction-set extensions that an engine has only where the host's processor has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct HostFeatures {
    pub sse41: bool,
    pub sse42: bool,
    pub popcnt: bool,
    pub pclmulqdq: bool,
    pub aes: bool,
    pub sha: bool,
    pub avx: bool,
    pub avx2: bool,
    pub fma: bool,
    pub f16c: bool,
    pub bmi1: bool,
    pub bmi2: bool,
    pub lzcnt: bool,
    pub movbe: bool,
    pub adx: bool,
    pub rdrand: bool,
    pub rdseed: bool,
}

impl HostFeatures {
    /// A host that has them all.
    pub const ALL: HostFeatures = HostFeatures {
        sse41: true,
        sse42: true,
        popcnt: true,
        pclmulqdq: true,
        aes: true,
        sha: true,
        avx: true,
        avx2: true,
        fma: true,
        f16c: true,
        bmi1: true,
        bmi2: true,
        lzcnt: true,
        movbe: true,
        adx: true,
        rdrand: true,
        rdseed: true,
    };
}

/// A model name that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU model '{0}'; the models are: {list}", list = CpuModel::NAMES.join(", "))]
pub struct UnknownModel(pub String);

/// Family 19h, model 11h, stepping 1.
const SIGNATURE: u32 = 0x00a1_0f11;
const VENDOR: &[u8; 12] = b"AuthenticAMD";
const BRAND: &str = "Lodger x86-64-v3 virtual CPU";
const HYPERVISOR_VENDOR: &[u8; 12] = b"KVMKVMKVM\0\0\0";

/// Bytes of the legacy region and header of an XSAVE area, and of its AVX component.
const XSAVE_BASE: u32 = 576;
const XSAVE_AVX: u32 = 256;

/// The word with these bits set.
fn bits<const N: usize>(list: [(bool, u32); N]) -> u32 {
    list.iter()
        .filter(|(present, _)| *present)
        .fold(0, |word, (_, bit)| word | 1 << bit)
}

/// 4 bytes of `text`, little-endian.
fn word(text: &[u8], index: usize) -> u32 {
    (0..4).fold(0, |word, i| {
        let byte = text.get(index * 4 + i).copied().unwrap_or(0);
        word | u32::from(byte) << (i * 8)
    })
}

impl CpuModel {
    /// The names that [`CpuModel::named`] knows.
    pub const NAMES: [&str; 1] = ["v3"];

    /// The model with this name, for a VM of `vcpus` vCPUs on a host with these features.
    pub fn named(
        name: &str,
        vcpus: u32,
        host: &HostFeatures,
        tsc_khz: u32,
    ) -> Result<CpuModel, UnknownModel> {
        match name {
            "v3" => Ok(CpuModel::v3(vcpus, host, tsc_khz)),
            _ => Err(UnknownModel(name.to_owned())),
        }
    }

    /// The default model: x86-64-v3 as far as the host has it. One package of `vcpus` cores of one thread.
    pub fn v3(vcpus: u32, host: &HostFeatures, tsc_khz: u32) -> CpuModel {
        let cores = vcpus.max(1);
        let leaves = [
            basic_leaves(cores, host),
            hypervisor_leaves(),
            extended_leaves(cores, host),
        ]
        .concat();
        CpuModel {
            name: "v3".into(),
            leaves,
            tsc_khz,
        }
    }

    /// What CPUID with EAX = `leaf` and ECX = `subleaf` returns in EAX, EBX, ECX, EDX.
    pub fn lookup(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        let mut values = self.fixed(leaf, subleaf);
        let id = context.apic_id;
        match leaf {
            1 => {
                values[1] = values[1] & 0x00ff_ffff | id << 24;
                if context.cr4 & cr4::OSXSAVE != 0 {
                    values[2] |= 1 << 27;
                }
                if !context.apic_enabled {
                    values[3] &= !(1 << 9);
                }
            }
            // Levels beyond the last are invalid (type 0), but still tell their number and the x2APIC ID.
            0xb => {
                values[2] = values[2] & 0xff00 | subleaf & 0xff;
                values[3] = id;
            }
            0xd if subleaf == 0 => values[1] = xsave_size(context.xcr0),
            0x8000_0001 if !context.apic_enabled => values[3] &= !(1 << 9),
            0x8000_001e => (values[0], values[1]) = (id, id & 0xff),
            _ => {}
        }
        values
    }

    /// What the model has for a leaf; zeros where it has none, as processors of this vendor do.
    fn fixed(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.leaves
            .iter()
            .find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf))
            .map_or([0; 4], |l| l.values)
    }

    /// CPUID leaf 1 EAX: family, model and stepping; also in EDX after RESET.
    pub fn signature(&self) -> u32 {
        self.fixed(1, 0)[0]
    }

    /// The bits of CR4 that exist.
    pub fn cr4_bits(&self) -> u64 {
        let [_, _, leaf1, _] = self.fixed(1, 0);
        let [_, leaf7_b, leaf7_c, _] = self.fixed(7, 0);
        let optional = [
            (leaf1 >> 26, cr4::OSXSAVE),
            (leaf1 >> 17, cr4::PCIDE),
            (leaf7_b, cr4::FSGSBASE),
            (leaf7_b >> 7, cr4::SMEP),
            (leaf7_b >> 20, cr4::SMAP),
            (leaf7_c >> 2, cr4::UMIP),
        ];
        let always = cr4::TSD
            | cr4::DE
            | cr4::PSE
            | cr4::PAE
            | cr4::MCE
            | cr4::PGE
            | cr4::PCE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT;
        optional
            .iter()
            .filter(|(word, _)| word & 1 != 0)
            .fold(always, |bits, (_, bit)| bits | bit)
    }

    /// The bits of XCR0 that exist; 0 without XSAVE.
    pub fn xcr0_bits(&self) -> u64 {
        let [low, _, _, high] = self.fixed(0xd, 0);
        u64::from(high) << 32 | u64::from(low)
    }

    /// The bits of EFER that exist.
    pub fn efer_bits(&self) -> u64 {
        let [_, _, _, features] = self.fixed(0x8000_0001, 0);
        let [mitigations, ..] = self.fixed(0x8000_0021, 0);
        [
            (features >> 11, efer::SCE),
            (features >> 29, efer::LME | efer::LMA),
            (features >> 20, efer::NXE),
            (mitigations >> 8, efer::AIBRSE),
        ]
        .iter()
        .filter(|(word, _)| word & 1 != 0)
        .fold(0, |bits, (_, bit)| bits | bit)
    }
}

/// Bytes of an XSAVE area for these components.
fn xsave_size(components: u64) -> u32 {
    match components & xcr0::AVX {
        0 => XSAVE_BASE,
        _ => XSAVE_BASE + XSAVE_AVX,
    }
}

fn leaf(leaf: u32, values: [u32; 4]) -> CpuidLeaf {
    CpuidLeaf {
        leaf,
        subleaf: None,
        values,
    }
}

fn subleaf(leaf: u32, subleaf: u32, values: [u32; 4]) -> CpuidLeaf {
    CpuidLeaf {
        leaf,
        subleaf: Some(subleaf),
        values,
    }
}

/// Leaf 1 EDX. Bits 0-9, 12-17, 23 and 24 are repeated in leaf 0x80000001 EDX.
fn features_edx(cores: u32) -> u32 {
    bits([
        (true, 0),       // x87
        (true, 2),       // debugging extensions
        (true, 3),       // 4 MiB pages
        (true, 4),       // TSC
        (true, 5),       // MSRs
        (true, 6),       // PAE
        (true, 7),       // machine check exception
        (true, 8),       // CMPXCHG8B
        (true, 9),       // APIC
        (true, 11),      // SYSENTER
        (true, 12),      // MTRRs
        (true, 13),      // global pages
        (true, 14),      // machine check architecture
        (true, 15),      // CMOV
        (true, 16),      // PAT
        (true, 17),      // 36-bit 4 MiB pages
        (true, 19),      // CLFLUSH
        (true, 23),      // MMX
        (true, 24),      // FXSAVE
        (true, 25),      // SSE
        (true, 26),      // SSE2
        (cores > 1, 28), // more than one logical processor in the package
    ])
}

fn basic_leaves(cores: u32, host: &HostFeatures) -> Vec<CpuidLeaf> {
    let avx = host.avx;
    let ecx = bits([
        (true, 0),              // SSE3
        (host.pclmulqdq, 1),    // PCLMULQDQ
        (true, 9),              // SSSE3
        (avx && host.fma, 12),  // FMA
        (true, 13),             // CMPXCHG16B
        (true, 17),             // PCIDs
        (host.sse41, 19),       // SSE4.1
        (host.sse42, 20),       // SSE4.2
        (true, 21),             // x2APIC
        (host.movbe, 22),       // MOVBE
        (host.popcnt, 23),      // POPCNT
        (true, 24),             // TSC deadline
        (host.aes, 25),         // AES
        (true, 26),             // XSAVE
        (avx, 28),              // AVX
        (avx && host.f16c, 29), // F16C
        (host.rdrand, 30),      // RDRAND
        (true, 31),             // a hypervisor is present
    ]);
    let leaf7_ebx = bits([
        (true, 0),             // FSGSBASE
        (host.bmi1, 3),        // BMI1
        (avx && host.avx2, 5), // AVX2
        (true, 7),             // SMEP
        (host.bmi2, 8),        // BMI2
        (true, 9),             // fast REP MOVSB and STOSB
        (true, 13),            // the x87 CS and DS are not kept
        (host.rdseed, 18),     // RDSEED
        (host.adx, 19),        // ADX
        (true, 20),            // SMAP
        (true, 23),            // CLFLUSHOPT
        (host.sha, 29),        // SHA
    ]);
    let leaf7_ecx = bits([
        (true, 2),  // UMIP
        (true, 22), // RDPID
    ]);
    let leaf7_edx = bits([
        (true, 4), // fast short REP MOVSB
    ]);
    let brief = 8 << 8 | cores.min(255) << 16; // CLFLUSH line in 8 bytes, logical processors
    let components = (xcr0::X87 | xcr0::SSE | if avx { xcr0::AVX } else { 0 }) as u32;
    let id_shift = cores.next_power_of_two().ilog2();
    let mut leaves = vec![
        leaf(0, [0xd, word(VENDOR, 0), word(VENDOR, 2), word(VENDOR, 1)]),
        leaf(1, [SIGNATURE, brief, ecx, features_edx(cores)]),
        leaf(6, [1 << 2, 0, 0, 0]), // the APIC timer never stops
        subleaf(7, 0, [0, leaf7_ebx, leaf7_ecx, leaf7_edx]),
        subleaf(0xb, 0, [0, 1, 1 << 8, 0]), // threads of a core
        subleaf(0xb, 1, [id_shift, cores, 2 << 8, 0]), // cores of the package
        subleaf(
            0xd,
            0,
            [components, 0, xsave_size(u64::from(components)), 0],
        ),
    ];
    if avx {
        leaves.push(subleaf(0xd, 2, [XSAVE_AVX, XSAVE_BASE, 0, 0]));
    }
    leaves
}

fn hypervisor_leaves() -> Vec<CpuidLeaf> {
    let features = bits([
        (true, 1),  // port 0x80 needs no delay
        (true, 3),  // clock by MSRs 0x4b564d00 and 0x4b564d01
        (true, 24), // that clock is the same on every vCPU
    ]);
    let vendor = |i| word(HYPERVISOR_VENDOR, i);
    vec![
        leaf(0x4000_0000, [0x4000_0001, vendor(0), vendor(1), vendor(2)]),
        leaf(0x4000_0001, [features, 0, 0, 0]),
    ]
}

fn extended_leaves(cores: u32, host: &HostFeatures) -> Vec<CpuidLeaf> {
    let ecx = bits([
        (true, 0),       // LAHF and SAHF in 64-bit mode
        (cores > 1, 1),  // the logical processors are cores
        (host.lzcnt, 5), // LZCNT
        (true, 8),       // PREFETCH and PREFETCHW
        (true, 22),      // leaves 0x8000001d and 0x8000001e
    ]);
    let edx = bits([
        (true, 11), // SYSCALL
        (true, 20), // NX
        (true, 22), // AMD's MMX extensions, which are part of SSE
        (true, 26), // 1 GiB pages
        (true, 27), // RDTSCP
        (true, 29), // long mode
    ]);
    let repeated = features_edx(cores) & 0x0183_f3ff;
    let capacity = bits([
        (true, 2),  // XSAVE always saves the error pointers
        (true, 26), // no speculative store bypass
        (true, 29), // no branch type confusion
    ]);
    let mitigations = bits([
        (true, 2),  // LFENCE serializes
        (true, 6),  // a null selector clears the base
        (true, 8),  // Automatic IBRS
        (true, 29), // no speculative return stack overflow
    ]);
    let no_transient_scheduler_attacks = bits([(true, 1), (true, 2)]);
    let id_size = cores.next_power_of_two().ilog2();
    let mut leaves = vec![
        leaf(
            0x8000_0000,
            [
                0x8000_0021,
                word(VENDOR, 0),
                word(VENDOR, 2),
                word(VENDOR, 1),
            ],
        ),
        leaf(0x8000_0001, [SIGNATURE, 0, ecx, edx | repeated]),
    ];
    for (number, start) in (0x8000_0002..=0x8000_0004).zip([0, 4, 8]) {
        let values = [0, 1, 2, 3].map(|i| word(BRAND.as_bytes(), start + i));
        leaves.push(leaf(number, values));
    }
    // Caches: level, type (1 data, 2 instructions, 3 both), size in KiB, ways, cores that share it.
    let caches = [
        (1, 1, 32, 8, 1),
        (1, 2, 32, 8, 1),
        (2, 3, 512, 8, 1),
        (3, 3, 32768, 16, cores),
    ];
    leaves.extend([
        // The same caches in the older form: 64 entries in each TLB, fully associative.
        leaf(
            0x8000_0005,
            [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140],
        ),
        leaf(
            0x8000_0006,
            [0x4800_6800, 0x6800_6800, 0x0200_6140, 64 << 18 | 0x9140],
        ),
        leaf(0x8000_0007, [0, 0, 0, 1 << 8]), // invariant TSC
        leaf(
            0x8000_0008,
            [
                PHYSICAL_ADDRESS_BITS | 48 << 8,
                capacity,
                (cores - 1) & 0xff | id_size << 12,
                0,
            ],
        ),
    ]);
    for (i, (level, kind, kib, ways, sharing)) in (0..).zip(caches) {
        let self_initializing = 1 << 8;
        let shared = (sharing - 1) & 0xfff;
        let sets = kib * 1024 / 64 / ways;
        leaves.push(subleaf(
            0x8000_001d,
            i,
            [
                kind | level << 5 | self_initializing | shared << 14,
                63 | (ways - 1) << 22,
                sets - 1,
                0,
            ],
        ));
    }
    leaves.extend([
        leaf(0x8000_001e, [0; 4]), // ID, core; one thread a core, one node
        leaf(
            0x8000_0021,
            [mitigations, 0, no_transient_scheduler_attacks, 0],
        ),
    ]);
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: CpuidContext = CpuidContext {
        apic_id: 5,
        cr4: 0,
        xcr0: 1,
        apic_enabled: true,
    };

    fn v3(vcpus: u32) -> CpuModel {
        CpuModel::v3(vcpus, &HostFeatures::ALL, 2_000_000)
    }

    #[test]
    fn leaves_as_a_guest_sees_them() {
        let model = v3(6);
        for (leaf, subleaf, register, mask, expected) in [
            (0, 0, 0, !0, 0xd),
            (0, 0, 1, !0, 0x6874_7541), // Auth
            (0, 0, 3, !0, 0x6974_6e65), // enti
            (0, 0, 2, !0, 0x444d_4163), // cAMD
            (1, 0, 0, !0, 0x00a1_0f11),
            (1, 0, 1, !0, 0x0506_0800),
            (1, 0, 2, !0, 0xf7fa_3203 & !(1 << 27)),
            (1, 0, 3, !0, 0x178b_fbfd),
            (2, 0, 0, !0, 0),
            (7, 0, 0, !0, 0),
            (7, 0, 1, !0, 0x209c_23a9),
            (7, 0, 2, !0, 0x0040_0004),
            (7, 0, 3, !0, 0x0000_0010),
            (7, 1, 1, !0, 0),
            (0xb, 0, 0, !0, 0),
            (0xb, 0, 2, !0, 0x100),
            (0xb, 1, 0, !0, 3),
            (0xb, 1, 1, !0, 6),
            (0xb, 1, 2, !0, 0x201),
            (0xb, 1, 3, !0, 5),
            (0xb, 7, 2, !0, 7),
            (0xb, 7, 3, !0, 5),
            (0xd, 0, 0, !0, 7),
            (0xd, 0, 1, !0, 576),
            (0xd, 0, 2, !0, 832),
            (0xd, 1, 0, !0, 0),
            (0xd, 2, 0, !0, 256),
            (0xd, 2, 1, !0, 576),
            (0xe, 0, 0, !0, 0),
            (0x2000_0000, 0, 0, !0, 0),
            (0x4000_0000, 0, 0, !0, 0x4000_0001),
            (0x4000_0000, 0, 1, !0, 0x4b4d_564b),
            (0x4000_0000, 0, 3, !0, 0x4d),
            (0x4000_0001, 0, 0, !0, 0x0100_000a),
            (0x8000_0000, 0, 0, !0, 0x8000_0021),
            (0x8000_0001, 0, 2, !0, 0x0040_0123),
            (0x8000_0001, 0, 3, !0, 0x2dd3_fbfd),
            (0x8000_0002, 0, 0, !0, 0x6764_6f4c), // Lodg
            (0x8000_0007, 0, 3, !0, 0x100),
            (0x8000_0008, 0, 0, !0, 0x3028),
            (0x8000_0008, 0, 2, !0, 0x3005),
            (0x8000_001d, 0, 0, !0, 0x121),
            (0x8000_001d, 3, 0, !0, 0x0001_4163),
            (0x8000_001d, 3, 2, !0, 32767),
            (0x8000_001d, 4, 0, !0, 0),
            (0x8000_001e, 0, 0, !0, 5),
            (0x8000_001e, 0, 1, !0, 5),
            (0x8000_0021, 0, 0, !0, 0x2000_0144),
            (0x8000_0022, 0, 0, !0, 0),
            (0xc000_0000, 0, 0, !0, 0),
        ] {
            let value = model.lookup(leaf, subleaf, &CONTEXT)[register] & mask;
            assert_eq!(
                value, expected,
                "leaf {leaf:#x}.{subleaf} [{register}]: {value:#x}"
            );
        }
    }

    #[test]
    fn what_depends_on_the_vcpu() {
        let model = v3(1);
        for (leaf, register, bit, context, expected) in [
            (1, 2, 27, CONTEXT, 0),
            (
                1,
                2,
                27,
                CpuidContext {
                    cr4: cr4::OSXSAVE,
                    ..CONTEXT
                },
                1,
            ),
            (1, 3, 9, CONTEXT, 1),
            (
                1,
                3,
                9,
                CpuidContext {
                    apic_enabled: false,
                    ..CONTEXT
                },
                0,
            ),
            (0x8000_0001, 3, 9, CONTEXT, 1),
            (
                0x8000_0001,
                3,
                9,
                CpuidContext {
                    apic_enabled: false,
                    ..CONTEXT
                },
                0,
            ),
            (0xd, 1, 8, CpuidContext { xcr0: 3, ..CONTEXT }, 0),
            (0xd, 1, 8, CpuidContext { xcr0: 7, ..CONTEXT }, 1),
            (1, 3, 28, CONTEXT, 0),
        ] {
            let value = model.lookup(leaf, 0, &context)[register] >> bit & 1;
            assert_eq!(
                value, expected,
                "leaf {leaf:#x} [{register}] bit {bit}: {context:?}"
            );
        }
    }

    #[test]
    fn a_poor_host_makes_a_poor_model() {
        let rich = v3(1);
        let poor = CpuModel::v3(1, &HostFeatures::default(), 1_000_000);
        for (leaf, register, lost) in [
            (1, 2, 0x72d8_1002_u32),
            (7, 1, 0x200c_0128),
            (0x8000_0001, 2, 0x20),
            (0xd, 0, 4),
        ] {
            let of = |model: &CpuModel| model.lookup(leaf, 0, &CONTEXT)[register];
            assert_eq!(of(&rich) & !of(&poor), lost, "leaf {leaf:#x}");
        }
        let no_avx = HostFeatures {
            avx: false,
            ..HostFeatures::ALL
        };
        let model = CpuModel::v3(1, &no_avx, 1_000_000);
        assert_eq!(model.xcr0_bits(), 3);
        assert_eq!(model.lookup(7, 0, &CONTEXT)[1] >> 5 & 1, 0, "no AVX2");
        assert_eq!(model.lookup(0xd, 2, &CONTEXT), [0; 4]);
    }

    #[test]
    fn existing_control_bits_follow_the_features() {
        let model = v3(1);
        assert_eq!(model.signature(), 0x00a1_0f11);
        assert_eq!(model.xcr0_bits(), 7);
        assert_eq!(model.efer_bits(), 0x20_0d01);
        let all =
            cr4::SMAP | cr4::SMEP | cr4::UMIP | cr4::FSGSBASE | cr4::OSXSAVE | cr4::PCIDE | 0x7fc;
        assert_eq!(model.cr4_bits(), all);
    }

    #[test]
    fn models_are_found_by_name() {
        let find = |name| CpuModel::named(name, 2, &HostFeatures::ALL, 1);
        for name in CpuModel::NAMES {
            assert_eq!(find(name).unwrap().name, name);
        }
        let error = find("pentium").unwrap_err().to_string();
        assert!(error.contains("pentium") && error.contains("v3"), "{error}");
    }
}
