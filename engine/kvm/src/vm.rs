//! One VM: memory slots, interrupts from the machine, making vCPUs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, kvm_clock_data, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use lodger_guest_memory::GuestMemory;
use lodger_vcpu::{EngineError, EngineVm, Vcpu, VmConfig};
use lodger_x86::CpuState;
use lodger_x86::bits::xcr0;

use crate::cpuid::Supported;
use crate::doorbell::Doorbell;
use crate::failure::host;
use crate::routes::{IOAPIC_PINS, Routes};
use crate::state::Offers;
use crate::vcpu::KvmVcpu;

/// Three pages for a task state segment and one for a page table, which KVM needs in the guest on some Intel processors; below the
/// firmware, where no board has RAM.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

pub(crate) struct Vm {
    fd: VmFd,
    config: VmConfig,
    supported: Supported,
    scales_tsc: bool,
    bells: Vec<Arc<Doorbell>>,
    routes: Mutex<Routes>,
    exits: AtomicU64,
    messages: AtomicU64,
}

impl Vm {
    pub fn new(kvm: &Kvm, config: VmConfig) -> Result<Vm, EngineError> {
        let fd = create(kvm)?;
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        cap.args[0] = IOAPIC_PINS as u64;
        fd.enable_cap(&cap)
            .map_err(host("KVM does not leave the IOAPIC to the machine"))?;
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(host("KVM does not take the address of its page table"))?;
        fd.set_tss_address(TSS).map_err(host(
            "KVM does not take the address of its task state segment",
        ))?;
        for (slot, range) in (0..).zip(config.memory.ranges()) {
            let page = config.memory.host_page(range.start);
            let page = page.ok_or_else(|| EngineError::Internal("RAM is not mapped".into()))?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: range.start,
                memory_size: range.len,
                userspace_addr: page.host as u64,
            };
            // SAFETY: a range of guest memory is one mapping, which lives as long as `config.memory`, and so longer than
            // `fd`, which is dropped before it (field order); the guest may do there what it likes.
            unsafe { fd.set_user_memory_region(region) }.map_err(host(format!(
                "KVM does not take {:#x} bytes of guest memory at {:#x}",
                range.len, range.start
            )))?;
        }
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(host("KVM does not tell which CPUID it supports"))?;
        let bells = (0..config.vcpus.max(1)).map(|_| Arc::default()).collect();
        Ok(Vm {
            fd,
            supported: Supported::new(&supported),
            scales_tsc: kvm.check_extension(Cap::TscControl),
            bells,
            routes: Mutex::default(),
            exits: AtomicU64::new(0),
            messages: AtomicU64::new(0),
            config,
        })
    }

    pub fn bell(&self, index: u32) -> &Arc<Doorbell> {
        &self.bells[index as usize]
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.config.memory
    }

    /// Guest time in ns.
    pub fn now(&self) -> u64 {
        self.config.clock.now()
    }

    /// Sets what the guest's paravirtual clock shows.
    pub fn set_guest_time(&self, now: u64) -> Result<(), EngineError> {
        let clock = kvm_clock_data {
            clock: now,
            ..Default::default()
        };
        self.fd
            .set_clock(&clock)
            .map_err(host("KVM does not set its clock"))
    }

    pub fn count_exit(&self) {
        self.exits.fetch_add(1, Ordering::Relaxed);
    }

    /// Makes the vCPU, in the reset state.
    pub fn vcpu(self: &Arc<Self>, index: u32) -> Result<KvmVcpu, EngineError> {
        if index as usize >= self.bells.len() {
            return Err(EngineError::Internal(format!(
                "vCPU {index} of {}",
                self.bells.len()
            )));
        }
        let fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(host(format!("KVM does not make vCPU {index}")))?;
        let model = &self.config.model;
        let entries = self.supported.entries(model, index);
        let xcr0_low = entries.iter().find(|e| e.function == 0xd && e.index == 0);
        let has_xsave = entries
            .iter()
            .any(|e| e.function == 1 && e.ecx >> 26 & 1 != 0);
        let components = xcr0_low.map_or(0, |e| u64::from(e.eax));
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|e| EngineError::Internal(format!("CPUID list: {e:?}")))?;
        fd.set_cpuid2(&cpuid).map_err(host(format!(
            "KVM does not take the CPU model {}",
            model.name
        )))?;
        if self.scales_tsc {
            fd.set_tsc_khz(model.tsc_khz).map_err(host(format!(
                "KVM does not run the TSC at {} kHz",
                model.tsc_khz
            )))?;
        }
        let tsc_khz = fd
            .get_tsc_khz()
            .map_err(host("KVM does not tell the TSC's frequency"))?;
        if tsc_khz != model.tsc_khz {
            tracing::debug!(
                "the TSC runs at {tsc_khz} kHz, as this host cannot scale it to {} kHz",
                model.tsc_khz
            );
        }
        let offers = Offers {
            xcr0: if has_xsave {
                components
            } else {
                xcr0::X87 | xcr0::SSE
            },
        };
        let mut vcpu = KvmVcpu::new(fd, index, tsc_khz, offers, Arc::clone(self));
        vcpu.load(&CpuState::reset(index, model.signature()))?;
        Ok(vcpu)
    }

    fn send(&self, address: u64, data: u32) -> Result<(), EngineError> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.prepare(&self.fd, address, data)?;
        drop(routes);
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // The answer says whether a vCPU took it, which is the guest's business.
        self.fd
            .signal_msi(msi)
            .map(|_| ())
            .map_err(host("KVM does not deliver a message-signalled interrupt"))
    }
}

/// KVM_CREATE_VM, which a signal may interrupt.
fn create(kvm: &Kvm) -> Result<VmFd, EngineError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => {
                return result.map_err(host(
                    "KVM does not make a virtual machine (is another hypervisor using the processor?)",
                ));
            }
        }
    }
}

/// The handle that the machine has.
pub(crate) struct KvmVm(pub Arc<Vm>);

impl EngineVm for KvmVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.0.vcpu(index)?))
    }

    fn send_msi(&self, address: u64, data: u32) {
        self.0.messages.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.0.send(address, data) {
            tracing::debug!("message {data:#x} to {address:#x} is dropped: {error}");
        }
    }

    fn set_intr(&self, level: bool) {
        self.0.bell(0).set_intr(level);
    }

    fn stats(&self) -> Vec<(String, u64)> {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("kvm exits".into(), count(&self.0.exits)),
            ("kvm messages".into(), count(&self.0.messages)),
        ]
    }
}
