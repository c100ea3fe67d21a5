//! Interrupt messages: from the interrupt command register (SDM vol. 3, 10.6) and message-signalled (10.11).

use crate::Address;

/// Where an interrupt message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// The APIC with this ID.
    Physical(u32),
    /// The APICs whose logical address matches.
    Logical(u32),
    /// Every vCPU.
    Everyone,
    /// Every vCPU but the sender.
    EveryoneElse,
}

/// What an interrupt message does at its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpiMode {
    /// Requests the vector.
    Fixed,
    /// Requests the vector at one of the destinations.
    LowestPriority,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Starts a vCPU that waits after INIT, at vector * 4096.
    StartUp,
}

/// An interrupt message between APICs, or from a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipi {
    /// Where to.
    pub destination: Destination,
    /// What it does.
    pub mode: IpiMode,
    /// The vector, for the modes that have one.
    pub vector: u8,
    /// Level-triggered: its EOI is reported.
    pub level: bool,
}

impl Ipi {
    /// Decodes a message-signalled interrupt. `None` if it is none, or of a kind that this APIC does not have (SMI, ExtINT).
    pub fn from_msi(address: u64, data: u32) -> Option<Ipi> {
        if address >> 20 != 0xfee {
            return None;
        }
        let id = address as u32 >> 12 & 0xff;
        let redirection_hint = address & 8 != 0;
        let destination = match (id, address & 4 != 0) {
            (0xff, _) => Destination::Everyone,
            (_, true) => Destination::Logical(id),
            (_, false) => Destination::Physical(id),
        };
        let mode = match data >> 8 & 7 {
            0 if redirection_hint => IpiMode::LowestPriority,
            0 => IpiMode::Fixed,
            1 => IpiMode::LowestPriority,
            4 => IpiMode::Nmi,
            5 => IpiMode::Init,
            _ => return None,
        };
        Some(Ipi {
            destination,
            mode,
            vector: data as u8,
            level: data & 0x8000 != 0,
        })
    }

    /// Decodes an interrupt command for other vCPUs; `x2apic`: by the format of the 64-bit MSR. `None`: a kind of message that does
    /// not exist, or INIT level de-assert, which does nothing on APICs of this generation.
    pub(crate) fn from_icr(icr: u64, x2apic: bool) -> Option<Ipi> {
        let low = icr as u32;
        let id = (icr >> if x2apic { 32 } else { 56 }) as u32;
        let broadcast = if x2apic { u32::MAX } else { 0xff };
        let destination = match low >> 18 & 3 {
            2 => Destination::Everyone,
            3 => Destination::EveryoneElse,
            _ if id == broadcast => Destination::Everyone,
            _ if low & 0x800 != 0 => Destination::Logical(id),
            _ => Destination::Physical(id),
        };
        let asserted = low & 0x4000 != 0 || low & 0x8000 == 0;
        let mode = match low >> 8 & 7 {
            0 => IpiMode::Fixed,
            1 => IpiMode::LowestPriority,
            4 => IpiMode::Nmi,
            5 if asserted => IpiMode::Init,
            6 => IpiMode::StartUp,
            _ => return None,
        };
        Some(Ipi {
            destination,
            mode,
            vector: low as u8,
            level: false,
        })
    }

    /// Whether the mode makes use of a vector that must not be below 16.
    pub(crate) fn requests_vector(&self) -> bool {
        matches!(self.mode, IpiMode::Fixed | IpiMode::LowestPriority)
    }

    /// The indices of those of `vcpus` that get the message; `sender` is the index of the vCPU that sent it, if one did. A
    /// lowest-priority message gets to one vCPU, chosen by its vector.
    pub fn targets<'a>(
        &self,
        vcpus: &'a [Address],
        sender: Option<usize>,
    ) -> impl Iterator<Item = usize> + use<'a> {
        let ipi = *self;
        let reached = move |&i: &usize| {
            vcpus[i].matches(ipi.destination)
                && !(ipi.destination == Destination::EveryoneElse && sender == Some(i))
                && (vcpus[i].is_enabled() || !ipi.requests_vector())
        };
        let all = (0..vcpus.len()).filter(reached);
        let (skip, take) = match ipi.mode {
            IpiMode::LowestPriority => (usize::from(ipi.vector) % all.clone().count().max(1), 1),
            _ => (0, usize::MAX),
        };
        all.skip(skip).take(take)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodger_x86::LapicState;

    #[test]
    fn message_signalled_interrupts_decode() {
        use Destination::*;
        use IpiMode::*;
        for (address, data, expected) in [
            (0xfee0_3000, 0x41, Some((Physical(3), Fixed, 0x41, false))),
            (0xfee0_3000, 0x8041, Some((Physical(3), Fixed, 0x41, true))),
            (0xfee0_3000, 0xc041, Some((Physical(3), Fixed, 0x41, true))),
            (0xfee0_3004, 0x41, Some((Logical(3), Fixed, 0x41, false))),
            (0xfeef_f000, 0x41, Some((Everyone, Fixed, 0x41, false))),
            (
                0xfee0_3004,
                0x141,
                Some((Logical(3), LowestPriority, 0x41, false)),
            ),
            (
                0xfee0_300c,
                0x41,
                Some((Logical(3), LowestPriority, 0x41, false)),
            ),
            (0xfee0_0000, 0x400, Some((Physical(0), Nmi, 0, false))),
            (0xfee0_0000, 0x500, Some((Physical(0), Init, 0, false))),
            (0xfee0_0000, 0x200, None),
            (0xfee0_0000, 0x700, None),
            (0xfed0_0000, 0x41, None),
            (0x1_fee0_0000, 0x41, None),
        ] {
            let ipi = expected.map(|(destination, mode, vector, level)| Ipi {
                destination,
                mode,
                vector,
                level,
            });
            assert_eq!(Ipi::from_msi(address, data), ipi, "{address:#x} {data:#x}");
        }
    }

    #[test]
    fn targets_are_chosen() {
        use Destination::*;
        use IpiMode::*;
        let vcpus: Vec<Address> = (0..4)
            .map(|id| {
                let mut state = LapicState::reset(id, id == 0);
                state.ldr = 1 << (24 + id);
                state.svr = if id == 3 { 0xff } else { 0x1ff };
                Address::of(&state)
            })
            .collect();
        for (destination, mode, vector, expected) in [
            (Physical(2), Fixed, 0x40, &[2][..]),
            (Physical(3), Fixed, 0x40, &[]),
            (Physical(3), Init, 0, &[3]),
            (Physical(9), Init, 0, &[]),
            (Everyone, Nmi, 0, &[0, 1, 2, 3]),
            (Everyone, Fixed, 0x40, &[0, 1, 2]),
            (EveryoneElse, StartUp, 0x40, &[0, 2, 3]),
            (Logical(0x0e), LowestPriority, 0x40, &[1]),
            (Logical(0x0e), LowestPriority, 0x41, &[2]),
            (Logical(0xf0), LowestPriority, 0x41, &[]),
        ] {
            let ipi = Ipi {
                destination,
                mode,
                vector,
                level: false,
            };
            let targets: Vec<_> = ipi.targets(&vcpus, Some(1)).collect();
            assert_eq!(targets, expected, "{ipi:?}");
        }
    }
}
