//! The `kvm` engine: vCPUs run by the host's processor through Linux's /dev/kvm (Linux, Documentation/virt/kvm/api.rst).
//!
//! The local APICs are KVM's, the other interrupt controllers are the machine's ("split irqchip"): the 8259 by the interrupt
//! window of vCPU 0, the IOAPIC by MSI. State goes in and out as [`CpuState`](lodger_x86::CpuState) only.
//!
//! Limits:
//! * Ticks are not counted; `ticks` is 0. Writes by the guest do not show in the tracker of guest memory.
//! * The TSC runs at the host's frequency where KVM cannot scale it, and does not stop while the clock is paused: whoever pauses
//!   a machine for long stores its vCPUs and loads them again.
//! * 8-bit APIC IDs: at most 255 vCPUs.
//! * CPUID is the model's, less what KVM does not support on this host.
//! * On AMD hosts KVM resets a vCPU that shuts down, so that its last state is lost.
//! * Not every /dev/kvm runs every guest: see [`Engine::stock_guest_problem`](lodger_vcpu::Engine::stock_guest_problem) and
//!   the trial that answers it.

// UNSAFETY: ioctls that take addresses of guest RAM, the unions of the page shared with KVM, and a signal handler.
#![allow(unsafe_code)]

mod cpuid;
mod doorbell;
mod engine;
mod failure;
mod lapic_page;
mod routes;
mod state;
mod trial;
mod vcpu;
mod vm;

pub use engine::KvmEngine;
