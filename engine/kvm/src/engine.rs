//! Opening /dev/kvm, and what must be there.

use std::ffi::CString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use kvm_ioctls::{Cap, Kvm};
use lodger_vcpu::{Capabilities, Engine, EngineError, EngineVm, VmConfig};

use crate::failure::{self, NAME, unusable};
use crate::trial;
use crate::vm::{KvmVm, Vm};

/// What the engine cannot do without.
const NEEDED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "guest memory from user space"),
    (Cap::SplitIrqchip, "a split interrupt controller"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID by leaf and subleaf"),
    (Cap::SetTssAddr, "an address for its task state segment"),
    (Cap::MpState, "vCPU activity"),
    (Cap::VcpuEvents, "pending events"),
    (Cap::Debugregs, "debug registers"),
    (Cap::Xsave, "XSAVE state"),
    (Cap::Xcrs, "XCR0"),
];

/// The version of the interface, the only one there is.
const API_VERSION: i32 = 12;

/// APIC IDs have 8 bits, and 255 means all.
const MAX_VCPUS: u32 = 255;

/// The engine. Cheap to make: /dev/kvm is opened when it is needed.
pub struct KvmEngine {
    device: PathBuf,
    /// What the trial guest showed; it runs at most once.
    problem: OnceLock<Option<String>>,
}

impl Default for KvmEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl KvmEngine {
    /// The engine on /dev/kvm.
    pub fn new() -> KvmEngine {
        KvmEngine::on("/dev/kvm")
    }

    /// The engine on a device node elsewhere.
    pub fn on(device: impl Into<PathBuf>) -> KvmEngine {
        KvmEngine {
            device: device.into(),
            problem: OnceLock::new(),
        }
    }

    fn open(&self) -> Result<Kvm, EngineError> {
        let name = self.device.display().to_string();
        let path = CString::new(name.as_str())
            .map_err(|_| unusable("the device's path contains a zero byte"))?;
        let kvm = Kvm::new_with_path(path)
            .map_err(|e| failure::open(&name, &io::Error::from_raw_os_error(e.errno())))?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(unusable(format!(
                "{name} is not KVM, or one of another age (interface version {version}, not {API_VERSION})"
            )));
        }
        let missing: Vec<_> = NEEDED
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(unusable(format!(
                "the host's KVM lacks: {}; a newer kernel may have it",
                missing.join(", ")
            )));
        }
        Ok(kvm)
    }

    /// Runs the trial guest, the first time.
    fn problem(&self, kvm: &Kvm) -> Option<String> {
        self.problem.get_or_init(|| trial::run(kvm).err()).clone()
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> Result<Capabilities, EngineError> {
        let kvm = self.open()?;
        Ok(Capabilities {
            exact_ticks: false,
            dirty_log: false,
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).map_or(MAX_VCPUS, |n| n.min(MAX_VCPUS)),
            stock_guests: self.problem(&kvm).is_none(),
        })
    }

    fn stock_guest_problem(&self) -> Option<String> {
        match self.open() {
            Ok(kvm) => self.problem(&kvm),
            Err(error) => Some(error.to_string()),
        }
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError> {
        if config.vcpus > MAX_VCPUS {
            return Err(unusable(format!(
                "it has at most {MAX_VCPUS} vCPUs, not {}",
                config.vcpus
            )));
        }
        let kvm = self.open()?;
        Ok(Arc::new(KvmVm(Arc::new(Vm::new(&kvm, config)?))))
    }
}
