//! Which destinations a local APIC answers to (SDM vol. 3, 10.6.2 and 10.12.10).

use lodger_x86::{ApicMode, LapicState};

use crate::Destination;

/// What of a local APIC decides which interrupts reach it, small enough to be published in one atomic word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    id: u32,
    logical: u8,
    mode: ApicMode,
    flat: bool,
    enabled: bool,
}

impl Address {
    pub(crate) fn of(state: &LapicState) -> Address {
        Address {
            id: state.id,
            logical: (state.ldr >> 24) as u8,
            mode: state.mode(),
            flat: state.dfr >> 28 == 0xf,
            enabled: state.svr & 0x100 != 0,
        }
    }

    /// Packs it into a word.
    pub fn to_bits(self) -> u64 {
        u64::from(self.id)
            | u64::from(self.logical) << 32
            | (self.mode as u64) << 40
            | u64::from(self.flat) << 42
            | u64::from(self.enabled) << 43
    }

    /// The reverse of [`Address::to_bits`].
    pub fn from_bits(bits: u64) -> Address {
        Address {
            id: bits as u32,
            logical: (bits >> 32) as u8,
            mode: match bits >> 40 & 3 {
                0 => ApicMode::Disabled,
                1 => ApicMode::XApic,
                _ => ApicMode::X2Apic,
            },
            flat: bits >> 42 & 1 != 0,
            enabled: bits >> 43 & 1 != 0,
        }
    }

    /// The APIC ID.
    pub fn id(self) -> u32 {
        self.id
    }

    /// Whether it is software-enabled; otherwise it takes only INIT, NMI and start-up interrupts.
    pub fn is_enabled(self) -> bool {
        self.enabled
    }

    /// Whether a message to `destination` reaches it. [`Destination::EveryoneElse`] matches here: only the sender knows itself.
    pub fn matches(self, destination: Destination) -> bool {
        use Destination::{Everyone, EveryoneElse, Logical, Physical};
        match (self.mode, destination) {
            (ApicMode::Disabled, _) => false,
            (_, Everyone | EveryoneElse) => true,
            (ApicMode::X2Apic, Physical(id)) => id == self.id,
            (ApicMode::X2Apic, Logical(mda)) => {
                mda >> 16 == self.id >> 4 && mda as u16 & 1 << (self.id & 15) != 0
            }
            (ApicMode::XApic, Physical(id)) => id == self.id & 0xff,
            (ApicMode::XApic, Logical(mda)) if mda > 0xff => false,
            (ApicMode::XApic, Logical(mda)) if self.flat => mda as u8 & self.logical != 0,
            (ApicMode::XApic, Logical(mda)) => {
                let cluster = mda >> 4 == 0xf || mda >> 4 == u32::from(self.logical >> 4);
                cluster && mda as u8 & self.logical & 0xf != 0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_match() {
        use Destination::*;
        const X: u64 = 0x800;
        const X2: u64 = 0xc00;
        let (flat, cluster) = (0xffff_ffff, 0x0fff_ffff);
        for (line, base, id, ldr, dfr, destination, matches) in [
            (line!(), X, 3, 0, flat, Physical(3), true),
            (line!(), X, 3, 0, flat, Physical(2), false),
            (line!(), X, 3, 0, flat, Everyone, true),
            (line!(), X, 3, 0, flat, EveryoneElse, true),
            (line!(), 0, 3, 0, flat, Everyone, false),
            (line!(), 0, 3, 0, flat, Physical(3), false),
            (line!(), X, 3, 0x0800_0000, flat, Logical(0x0c), true),
            (line!(), X, 3, 0x0800_0000, flat, Logical(0xf7), false),
            (line!(), X, 3, 0x0800_0000, flat, Logical(0x1_0008), false),
            (line!(), X, 3, 0x2200_0000, cluster, Logical(0x23), true),
            (line!(), X, 3, 0x2200_0000, cluster, Logical(0x32), false),
            (line!(), X, 3, 0x2200_0000, cluster, Logical(0xf2), true),
            (line!(), X, 3, 0x2200_0000, cluster, Logical(0x2d), false),
            (line!(), X2, 0x25, 0, flat, Physical(0x25), true),
            (line!(), X2, 0x125, 0, flat, Physical(0x25), false),
            (line!(), X2, 0x25, 0, flat, Logical(0x2_0020), true),
            (line!(), X2, 0x25, 0, flat, Logical(0x2_0010), false),
            (line!(), X2, 0x25, 0, flat, Logical(0x1_0020), false),
            (line!(), X2, 0x05, 0, flat, Logical(0x20), true),
        ] {
            let mut state = LapicState::reset(id, false);
            (state.base, state.ldr, state.dfr) = (base, ldr, dfr);
            let address = Address::of(&state);
            assert_eq!(
                address.matches(destination),
                matches,
                "the case at line {line}"
            );
            assert_eq!(Address::from_bits(address.to_bits()), address);
        }
    }
}
