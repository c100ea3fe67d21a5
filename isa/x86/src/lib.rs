//! The x86 architecture as values: registers, their reset state, exceptions, the page walk, CPUID.
//!
//! Pure: no host calls, no unsafe code, no engine. Every engine, the loaders, snapshots, gdb and the tests speak
//! of a vCPU through [`CpuState`]. The specification is the Intel Software Developer's Manual (SDM) and the AMD
//! Architecture Programmer's Manual (APM); sections are cited where something is easily got wrong.

pub mod bits;
pub mod cpu_model;
pub mod exception;
pub mod lapic_state;
pub mod paging;
pub mod segment;
pub mod state;

pub use cpu_model::{CpuModel, CpuidContext, CpuidLeaf, HostFeatures};
pub use exception::{Exception, Vector};
pub use lapic_state::{ApicMode, LapicState};
pub use segment::{DescriptorTable, Segment, SegmentRegister};
pub use state::{Activity, CpuState, Element, Fpu, Msrs};
