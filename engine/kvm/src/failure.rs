//! What goes wrong with KVM, in sentences.

use std::io;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use kvm_bindings::kvm_run;
use lodger_guest_memory::GuestMemory;
use lodger_vcpu::EngineError;

/// The engine's name.
pub(crate) const NAME: &str = "kvm";

/// The engine cannot be used, because.
pub(crate) fn unusable(why: impl Into<String>) -> EngineError {
    EngineError::Unusable {
        engine: NAME,
        why: why.into(),
    }
}

/// An ioctl failed; `what` says what was being done, and why that may fail and what to do if that is known.
pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    move |e| EngineError::Host {
        what: what.into(),
        source: io::Error::from_raw_os_error(e.errno()),
    }
}

/// Why /dev/kvm, or what stands in its place, did not open.
pub(crate) fn open(device: &str, error: &io::Error) -> EngineError {
    let advice = match error.raw_os_error() {
        Some(libc::ENOENT) => {
            "it does not exist. Load the module (`modprobe kvm_intel` or `modprobe kvm_amd`); if that fails, switch \
             virtualization on in the firmware, or, in a virtual machine, nested virtualization in the outer monitor"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "access is denied. Add the user to the group kvm (`sudo usermod -aG kvm $USER`) and log in again; in a \
             container, pass the device in"
        }
        Some(libc::ENODEV | libc::ENXIO) => {
            "the device node is there but no driver is. Load the module (`modprobe kvm_intel` or `modprobe kvm_amd`)"
        }
        _ => "the host refused it",
    };
    unusable(format!("{device}: {advice} ({error})"))
}

/// What KVM_EXIT_INTERNAL_ERROR means. `rip` and `linear` say where the guest was, `bytes` what is there.
pub(crate) fn internal(run: &kvm_run, rip: u64, mode_bits: u32, bytes: &[u8]) -> EngineError {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let what = match suberror {
        1 => "KVM could not emulate an instruction",
        2 => "KVM met an exception at the same time as another",
        3 => "KVM met an exit while it delivered an event",
        4 => "KVM met an exit of the processor that it does not know",
        _ => "KVM reports an internal error",
    };
    let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    EngineError::Internal(format!(
        "{what} (suberror {suberror}) at rip {rip:#x}: {} [{}]",
        disassemble(mode_bits, rip, bytes),
        hex.join(" ")
    ))
}

/// The text of the instruction that `bytes` begin with.
fn disassemble(mode_bits: u32, rip: u64, bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "no memory there".into();
    }
    let mut decoder = Decoder::with_ip(mode_bits, bytes, rip, DecoderOptions::NONE);
    let mut text = String::new();
    IntelFormatter::new().format(&decoder.decode(), &mut text);
    text
}

/// Up to 15 bytes of RAM at guest-physical `address`, not beyond its page.
pub(crate) fn instruction_bytes(memory: &GuestMemory, address: u64) -> Vec<u8> {
    let len = (4096 - address % 4096).min(15) as usize;
    let mut bytes = vec![0; len];
    match memory.read(address, &mut bytes) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}
