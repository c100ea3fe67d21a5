//! Executable memory for generated code: one memfd mapped twice, so that no page is ever writable and executable.
//! The executable mapping is in the lowest 2 GiB, so that an absolute address of code fits in 32 bits.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use crate::low::map_low;

/// A bump allocator over a block of executable memory.
pub struct ExecutableMemory {
    writable: Mapping,
    executable: Mapping,
    used: usize,
}

impl ExecutableMemory {
    /// `len` is a multiple of the page size. Pages take host memory when first written.
    pub fn new(len: usize) -> io::Result<Self> {
        let file = memfd_create("lodger-code", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, len as u64)?;
        Ok(Self {
            writable: Mapping::new(&file, len, ProtFlags::READ | ProtFlags::WRITE, false)?,
            executable: Mapping::new(&file, len, ProtFlags::READ | ProtFlags::EXEC, true)?,
            used: 0,
        })
    }

    /// Where in the executable mapping the next code will be, if it is to be aligned to `align`.
    pub fn next(&self, align: usize) -> usize {
        self.executable.address.as_ptr() as usize + self.used.next_multiple_of(align)
    }

    /// Bytes that are left.
    pub fn room(&self) -> usize {
        self.executable.len - self.used
    }

    /// Bytes that are used.
    pub fn used(&self) -> usize {
        self.used
    }

    /// The executable mapping's addresses.
    pub fn range(&self) -> std::ops::Range<usize> {
        let start = self.executable.address.as_ptr() as usize;
        start..start + self.executable.len
    }

    /// Adds `code` and returns its address in the executable mapping; `None` when there is no room.
    pub fn push(&mut self, code: &[u8], align: usize) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(align);
        let end = start.checked_add(code.len())?;
        if end > self.writable.len {
            return None;
        }
        // SAFETY: start..end lies inside both mappings, and `&mut self` makes this the only writer.
        unsafe {
            let target = self.writable.address.add(start);
            target.copy_from_nonoverlapping(NonNull::from(code).cast(), code.len());
            self.used = end;
            Some(self.executable.address.add(start))
        }
    }

    /// Replaces the 32-bit word at `address` in the executable mapping, which is a part of code that nobody else executes.
    pub fn patch(&mut self, address: usize, value: u32) {
        let offset = address.wrapping_sub(self.executable.address.as_ptr() as usize);
        assert!(
            offset < self.used && self.used - offset >= 4,
            "not our code"
        );
        // SAFETY: checked above; the writable mapping has the same length.
        unsafe {
            self.writable
                .address
                .add(offset)
                .cast::<u32>()
                .write_unaligned(value)
        };
    }

    /// Copies code out, for a person to read.
    pub fn read(&self, address: usize, len: usize) -> &[u8] {
        let offset = address.wrapping_sub(self.executable.address.as_ptr() as usize);
        assert!(
            offset <= self.used && self.used - offset >= len,
            "not our code"
        );
        // SAFETY: checked above; what was pushed is initialised.
        unsafe { std::slice::from_raw_parts(self.writable.address.add(offset).as_ptr(), len) }
    }

    /// Forgets all code from `used` bytes on.
    pub fn truncate(&mut self, used: usize) {
        self.used = self.used.min(used);
    }
}

struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned memory, valid from every thread.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(file: &OwnedFd, len: usize, protection: ProtFlags, low: bool) -> io::Result<Self> {
        let map = |address, flags| {
            // SAFETY: the mapping replaces no existing one.
            unsafe { mmap(address, len, protection, MapFlags::SHARED | flags, file, 0) }
        };
        let address = match low {
            true => map_low(len, map)?,
            false => map(std::ptr::null_mut(), MapFlags::empty())?,
        };
        let address = NonNull::new(address.cast()).expect("mmap does not choose address zero");
        Ok(Self { address, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly what mmap returned; the owner's contract is that no code in it runs any more.
        // An error could only mean that it is not mapped, and then there is nothing to release.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_low_runs_and_can_be_patched() {
        let mut memory = ExecutableMemory::new(4096).unwrap();
        // mov eax, 5; ret
        let code = memory.push(&[0xb8, 5, 0, 0, 0, 0xc3], 16).unwrap().as_ptr();
        assert!((code as usize) < 1 << 31 && memory.range().contains(&(code as usize)));
        // SAFETY: a complete function of this type.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(code) };
        assert_eq!(function(), 5);
        memory.patch(code as usize + 1, 6);
        assert_eq!(function(), 6);
        assert_eq!(memory.read(code as usize, 6)[5], 0xc3);
        assert!(memory.push(&[0; 4096], 1).is_none());
        memory.truncate(0);
        assert!(memory.push(&[0xc3; 4096], 1).is_some());
    }
}
