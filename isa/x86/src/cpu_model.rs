//! What CPUID tells: one model chosen once per VM, that every engine it may run on implements.

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
