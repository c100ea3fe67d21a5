//! Why a vCPU stopped, and how it goes on.

/// How to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Just run; the exit before (if any) was not an I/O or acknowledge.
    Resume,
    /// Completes [`Exit::PortRead`] and [`Exit::MmioRead`]: the value read, zero-extended.
    Data(u64),
    /// Completes [`Exit::PortWrite`] and [`Exit::MmioWrite`].
    Written,
    /// Completes [`Exit::InterruptAcknowledge`]: the vector, or `None` if the controller withdrew the request.
    Interrupt(Option<u8>),
}

/// Why the vCPU stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// IN of `size` (1, 2, 4) bytes; go on with [`Entry::Data`].
    PortRead {
        /// The port.
        port: u16,
        /// Bytes.
        size: u8,
    },
    /// OUT of `size` (1, 2, 4) bytes; go on with [`Entry::Written`].
    PortWrite {
        /// The port.
        port: u16,
        /// Bytes.
        size: u8,
        /// The value, zero-extended.
        value: u32,
    },
    /// Read of `size` (1 to 8) bytes that are not RAM; go on with [`Entry::Data`].
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u8,
    },
    /// Write of `size` (1 to 8) bytes that are not RAM; go on with [`Entry::Written`].
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u8,
        /// The value, zero-extended.
        value: u64,
    },
    /// The vCPU takes the 8259's interrupt now: acknowledge it there and go on with [`Entry::Interrupt`].
    InterruptAcknowledge,
    /// The local APIC finished a level-triggered interrupt with this vector: tell the IOAPICs.
    Eoi(u8),
    /// Somebody kicked.
    Kicked,
    /// The tick limit is reached.
    TickLimit,
    /// Triple fault: the vCPU has shut down.
    Shutdown,
}
