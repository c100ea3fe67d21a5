//! The page walk: linear to guest-physical address, for every paging mode but 5-level (SDM vol. 3, chapter 4).
//!
//! Pure: memory is seen through [`PhysicalMemory`]. Accessed and dirty bits are set with compare-and-exchange, as
//! another vCPU may write the same entry.

use crate::bits::{cr0, cr4, efer};

/// Guest-physical memory as the walk needs it. Addresses outside of RAM read as `None`; the walk then sees zero,
/// a not-present entry.
pub trait PhysicalMemory {
    /// Reads 8 bytes at an 8-byte aligned address.
    fn read_u64(&self, address: u64) -> Option<u64>;
    /// Reads 4 bytes at a 4-byte aligned address.
    fn read_u32(&self, address: u64) -> Option<u32>;
    /// Atomically replaces `old` by `new` at an 8-byte aligned address; false if it held something else.
    fn exchange_u64(&self, address: u64, old: u64, new: u64) -> bool;
    /// The same for 4 bytes.
    fn exchange_u32(&self, address: u64, old: u32, new: u32) -> bool;
}

/// Why memory is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write, or a read-modify-write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// The registers that a walk depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The four PDPTEs, which PAE paging loads with CR3.
    pub pdptes: [u64; 4],
    /// Physical address bits that exist.
    pub physical_bits: u32,
}

/// The rights with which memory is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Privilege {
    /// User-mode access: CPL 3 and not an implicit system access.
    pub user: bool,
    /// RFLAGS.AC, which lifts SMAP for explicit supervisor accesses.
    pub ac: bool,
}

/// What a walk found for the 4 KiB page of the linear address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the 4 KiB page.
    pub page: u64,
    /// Bytes of the page-table mapping: 4 KiB, 2 MiB, 4 MiB or 1 GiB; `u64::MAX` without paging.
    pub size: u64,
    /// A write with the same privilege needs no further walk: permitted, and the dirty bit is set.
    pub writable: bool,
    /// The page is a user page.
    pub user: bool,
    /// Instruction fetches from it are permitted to its privilege level (NX; SMEP is up to the walk).
    pub executable: bool,
    /// Survives CR3 loads.
    pub global: bool,
}

/// Page-fault error code bits (SDM vol. 3, 4.7).
#[allow(missing_docs)]
pub mod fault {
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
}

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

impl Paging {
    /// Whether paging is on.
    pub fn enabled(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// Whether the 32-bit PAE mode is on, in which CR3 loads load the PDPTEs.
    pub fn is_pae32(&self) -> bool {
        self.enabled() && self.cr4 & cr4::PAE != 0 && self.efer & efer::LMA == 0
    }

    fn reserved(&self) -> u64 {
        let nx = if self.efer & efer::NXE == 0 { NX } else { 0 };
        let high = !((1u64 << self.physical_bits) - 1) & 0x000f_ffff_ffff_ffff;
        nx | high
    }

    /// Loads the PDPTEs of 32-bit PAE paging; `None` is #GP(0): a reserved bit is set.
    pub fn load_pdptes(&self, memory: &dyn PhysicalMemory) -> Option<[u64; 4]> {
        let mut pdptes = [0; 4];
        for (i, entry) in pdptes.iter_mut().enumerate() {
            let address = (self.cr3 & 0xffff_ffe0) + 8 * i as u64;
            *entry = memory.read_u64(address).unwrap_or(0);
            let reserved = 0x1e6 | NX | 0x7ff0_0000_0000_0000 | self.reserved();
            if *entry & P != 0 && *entry & reserved != 0 {
                return None;
            }
        }
        Some(pdptes)
    }

    /// Walks for `access` at `linear`, setting accessed and dirty bits. `Err` is the error code of a page fault.
    pub fn walk<M: PhysicalMemory + ?Sized>(
        &self,
        memory: &M,
        linear: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Translation, u32> {
        if !self.enabled() {
            return Ok(Translation {
                page: linear & !0xfff,
                size: u64::MAX,
                writable: true,
                user: true,
                executable: true,
                global: false,
            });
        }
        if self.cr4 & cr4::PAE == 0 {
            return self.walk_32(memory, linear, access, privilege);
        }
        let code = self.error_code(access, privilege);
        'restart: loop {
            let long = self.efer & efer::LMA != 0;
            // `rights` collects RW and US as an and, NX as an or, over the levels.
            let (mut table, mut level, mut rights) = if long {
                (self.cr3 & 0x000f_ffff_ffff_f000, 4, RW | US)
            } else {
                let pdpte = self.pdptes[(linear >> 30) as usize & 3];
                if pdpte & P == 0 {
                    return Err(code);
                }
                (pdpte & 0x000f_ffff_ffff_f000, 2, RW | US)
            };
            loop {
                let shift = 12 + 9 * (level - 1);
                let address = table + (linear >> shift & 0x1ff) * 8;
                let entry = memory.read_u64(address).unwrap_or(0);
                if entry & P == 0 {
                    return Err(code);
                }
                let large = level > 1 && entry & PS != 0;
                let mut reserved = self.reserved();
                if !long {
                    reserved |= 0x7ff0_0000_0000_0000;
                }
                if large {
                    reserved |= if level == 4 {
                        PS
                    } else {
                        ((1 << shift) - 1) & !0x1fff
                    };
                }
                if entry & reserved != 0 {
                    return Err(code | fault::PRESENT | fault::RESERVED);
                }
                rights = rights & entry & (RW | US) | (rights | entry) & NX;
                if level > 1 && !large {
                    if entry & A == 0 && !memory.exchange_u64(address, entry, entry | A) {
                        continue 'restart;
                    }
                    table = entry & 0x000f_ffff_ffff_f000;
                    level -= 1;
                    continue;
                }
                self.check(rights, access, privilege)
                    .map_err(|()| code | fault::PRESENT)?;
                let set = A | if access == Access::Write { D } else { 0 };
                if entry & set != set && !memory.exchange_u64(address, entry, entry | set) {
                    continue 'restart;
                }
                let size = 1 << shift;
                let frame = entry & 0x000f_ffff_ffff_f000 & !(size - 1);
                return Ok(self.translation(frame, size, linear, rights, entry | set, privilege));
            }
        }
    }

    fn walk_32<M: PhysicalMemory + ?Sized>(
        &self,
        memory: &M,
        linear: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Translation, u32> {
        let code = self.error_code(access, privilege);
        loop {
            let directory = (self.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
            let pde = memory.read_u32(directory).unwrap_or(0);
            let wide = u64::from(pde);
            if wide & P == 0 {
                return Err(code);
            }
            let set = A | if access == Access::Write { D } else { 0 };
            let (address, old, rights, frame, size) = if self.cr4 & cr4::PSE != 0 && wide & PS != 0
            {
                if wide & 1 << 21 != 0 {
                    return Err(code | fault::PRESENT | fault::RESERVED);
                }
                // PSE-36: bits 13-20 are address bits 32-39.
                let frame = wide & 0xffc0_0000 | (wide >> 13 & 0xff) << 32;
                (directory, pde, wide & (RW | US), frame, 1u64 << 22)
            } else {
                let address = (wide & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
                let pte = memory.read_u32(address).unwrap_or(0);
                if u64::from(pte) & P == 0 {
                    // The directory entry was used for the walk.
                    if wide & A == 0 {
                        memory.exchange_u32(directory, pde, pde | A as u32);
                    }
                    return Err(code);
                }
                if wide & A == 0 && !memory.exchange_u32(directory, pde, pde | A as u32) {
                    continue;
                }
                let rights = wide & u64::from(pte) & (RW | US);
                let frame = u64::from(pte) & 0xffff_f000;
                (address, pte, rights, frame, 1 << 12)
            };
            self.check(rights, access, privilege)
                .map_err(|()| code | fault::PRESENT)?;
            let new = old | set as u32;
            if new != old && !memory.exchange_u32(address, old, new) {
                continue;
            }
            return Ok(self.translation(frame, size, linear, rights, u64::from(new), privilege));
        }
    }

    fn translation(
        &self,
        frame: u64,
        size: u64,
        linear: u64,
        rights: u64,
        entry: u64,
        privilege: Privilege,
    ) -> Translation {
        let may_write = self.check(rights, Access::Write, privilege).is_ok();
        Translation {
            page: frame + (linear & (size - 1) & !0xfff),
            size,
            writable: may_write && entry & D != 0,
            user: rights & US != 0,
            executable: rights & NX == 0,
            global: entry & G != 0 && self.cr4 & cr4::PGE != 0,
        }
    }

    fn error_code(&self, access: Access, privilege: Privilege) -> u32 {
        let fetch_reported =
            self.cr4 & cr4::SMEP != 0 || (self.cr4 & cr4::PAE != 0 && self.efer & efer::NXE != 0);
        let kind = match access {
            Access::Write => fault::WRITE,
            Access::Execute if fetch_reported => fault::FETCH,
            _ => 0,
        };
        kind | if privilege.user { fault::USER } else { 0 }
    }

    /// Whether `access` is permitted on a page with these rights (SDM vol. 3, 4.6.1).
    fn check(&self, rights: u64, access: Access, privilege: Privilege) -> Result<(), ()> {
        let user_page = rights & US != 0;
        if privilege.user && !user_page {
            return Err(());
        }
        let permitted = match access {
            Access::Execute => {
                rights & NX == 0 && (privilege.user || !user_page || self.cr4 & cr4::SMEP == 0)
            }
            _ if !privilege.user && user_page && self.cr4 & cr4::SMAP != 0 && !privilege.ac => {
                false
            }
            Access::Read => true,
            Access::Write => rights & RW != 0 || (!privilege.user && self.cr0 & cr0::WP == 0),
        };
        permitted.then_some(()).ok_or(())
    }
}
