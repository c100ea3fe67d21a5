//! Exceptions: vectors, error codes, and how a second one during delivery combines (SDM vol. 3, 6.15).

/// The architectural exception vectors.
#[allow(missing_docs)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    MathFault = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdException = 19,
}

/// An exception that is about to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// Which one.
    pub vector: Vector,
    /// The error code, for the vectors that have one.
    pub error: Option<u32>,
    /// What goes to CR2 (page faults): the linear address.
    pub address: u64,
}

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: Vector) -> Exception {
        Exception {
            vector,
            error: None,
            address: 0,
        }
    }

    /// An exception with error code `error`.
    pub const fn with_code(vector: Vector, error: u32) -> Exception {
        Exception {
            vector,
            error: Some(error),
            address: 0,
        }
    }

    /// #UD.
    pub const UD: Exception = Exception::plain(Vector::InvalidOpcode);
    /// #NM.
    pub const NM: Exception = Exception::plain(Vector::DeviceNotAvailable);
    /// #DE.
    pub const DE: Exception = Exception::plain(Vector::DivideError);
    /// #GP(0).
    pub const GP0: Exception = Exception::with_code(Vector::GeneralProtection, 0);
    /// #SS(0).
    pub const SS0: Exception = Exception::with_code(Vector::StackFault, 0);

    /// #GP with a selector (its RPL bits are dropped).
    pub const fn gp(selector: u16) -> Exception {
        Exception::with_code(Vector::GeneralProtection, selector as u32 & 0xfffc)
    }

    /// #NP with a selector.
    pub const fn np(selector: u16) -> Exception {
        Exception::with_code(Vector::SegmentNotPresent, selector as u32 & 0xfffc)
    }

    /// #SS with a selector.
    pub const fn ss(selector: u16) -> Exception {
        Exception::with_code(Vector::StackFault, selector as u32 & 0xfffc)
    }

    /// #TS with a selector.
    pub const fn ts(selector: u16) -> Exception {
        Exception::with_code(Vector::InvalidTss, selector as u32 & 0xfffc)
    }

    /// #PF at linear `address`.
    pub const fn page_fault(address: u64, error: u32) -> Exception {
        Exception {
            vector: Vector::PageFault,
            error: Some(error),
            address,
        }
    }

    /// What a second exception during the delivery of `first` becomes; `None` is a triple fault (shutdown).
    pub fn combine(first: Vector, second: Exception) -> Option<Exception> {
        use Vector::*;
        let contributory = |v| {
            matches!(
                v,
                DivideError | InvalidTss | SegmentNotPresent | StackFault | GeneralProtection
            )
        };
        match first {
            DoubleFault if contributory(second.vector) || second.vector == PageFault => None,
            PageFault if contributory(second.vector) || second.vector == PageFault => {
                Some(Exception::with_code(DoubleFault, 0))
            }
            f if contributory(f) && contributory(second.vector) => {
                Some(Exception::with_code(DoubleFault, 0))
            }
            _ => Some(second),
        }
    }
}
