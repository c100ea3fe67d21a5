//! CPUID for KVM: the model's leaves, less the features that KVM does not support here.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use lodger_x86::{CpuModel, CpuidContext};

/// The words that are sets of features: leaf, subleaf, register.
const FEATURES: [(u32, u32, usize); 14] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (0xd, 0, 0),
    (0xd, 1, 0),
    (0x4000_0001, 0, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
    (0x8000_0007, 0, 3),
    (0x8000_0008, 0, 1),
    (0x8000_0021, 0, 0),
    (0x8000_0021, 0, 2),
];

/// Leaf 1 ECX bits that KVM provides without listing them in KVM_GET_SUPPORTED_CPUID: x2APIC and TSC deadline (both come with its local
/// APIC), and that there is a hypervisor.
const UNLISTED_1_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 31;

/// Bits that describe and promise nothing that KVM would have to do: HTT and CmpLegacy (how cores are counted), and TOPOEXT,
/// whose leaves are the model's. In leaf 1 EDX, and in leaf 0x80000001 ECX.
const DESCRIPTIVE_1_EDX: u32 = 1 << 28;
const DESCRIPTIVE_80000001_ECX: u32 = 1 << 1 | 1 << 22;

/// What KVM supports on this host, as words of features.
pub(crate) struct Supported(Vec<kvm_cpuid_entry2>);

impl Supported {
    /// From the answer to KVM_GET_SUPPORTED_CPUID.
    pub fn new(supported: &CpuId) -> Supported {
        Supported(supported.as_slice().to_vec())
    }

    /// The bits of this word that a guest may see; all ones for a word that is no set of features.
    fn mask(&self, leaf: u32, subleaf: u32, register: usize) -> u32 {
        if !FEATURES.contains(&(leaf, subleaf, register)) {
            return u32::MAX;
        }
        let same = |e: &&kvm_cpuid_entry2| e.function == leaf && e.index == subleaf;
        let entry = self.0.iter().find(same);
        let supported = entry.map_or(0, |e| [e.eax, e.ebx, e.ecx, e.edx][register]);
        supported
            | match (leaf, register) {
                (1, 2) => UNLISTED_1_ECX,
                (1, 3) => DESCRIPTIVE_1_EDX,
                (0x8000_0001, 2) => DESCRIPTIVE_80000001_ECX,
                // The bits that repeat leaf 1 EDX.
                (0x8000_0001, 3) => self.mask(1, 0, 3) & 0x0183_f3ff,
                _ => 0,
            }
    }

    /// The entries for the vCPU with this APIC ID. KVM itself adds what follows CR4, XCR0 and the APIC base.
    pub fn entries(&self, model: &CpuModel, apic_id: u32) -> Vec<kvm_cpuid_entry2> {
        let context = CpuidContext {
            apic_id,
            cr4: 0,
            xcr0: 1,
            apic_enabled: true,
        };
        let entry = |leaf: u32, subleaf: Option<u32>| {
            let index = subleaf.unwrap_or(0);
            let values = model.lookup(leaf, index, &context);
            let masked: [u32; 4] = std::array::from_fn(|r| values[r] & self.mask(leaf, index, r));
            kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
                eax: masked[0],
                ebx: masked[1],
                ecx: masked[2],
                edx: masked[3],
                ..Default::default()
            }
        };
        let leaves = model.leaves.iter();
        leaves.map(|l| entry(l.leaf, l.subleaf)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodger_x86::HostFeatures;

    #[test]
    fn features_are_masked_and_the_rest_is_the_models() {
        let model = CpuModel::v3(2, &HostFeatures::ALL, 1_000_000);
        let host = [
            (1, 0, [0, 0, 1, 1 << 4]),
            (7, 0, [0, 1 << 20, 0, 0]),
            (0x8000_0001, 0, [0, 0, 1, 1 << 11]),
        ];
        let host = host.map(|(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        });
        let supported = Supported::new(&CpuId::from_entries(&host).unwrap());
        let entries = supported.entries(&model, 1);
        let word = |leaf, register: usize| {
            let e = entries.iter().find(|e| e.function == leaf).unwrap();
            [e.eax, e.ebx, e.ecx, e.edx][register]
        };
        for (leaf, register, expected) in [
            (0, 1, 0x6874_7541),
            (1, 1, 0x0102_0800),
            (1, 2, 1 | UNLISTED_1_ECX),
            (1, 3, 1 << 4 | DESCRIPTIVE_1_EDX),
            (7, 1, 1 << 20),
            (0x8000_0001, 2, 1 | DESCRIPTIVE_80000001_ECX),
            (0x8000_0001, 3, 1 << 11 | 1 << 4),
            (0x8000_0007, 3, 0),
        ] {
            assert_eq!(word(leaf, register), expected, "{leaf:#x} [{register}]");
        }
    }
}
