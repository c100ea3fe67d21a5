//! Executable memory for generated code: one memfd mapped twice, so that no page is ever writable and executable.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

/// Entry points are aligned to this, so that a short stub lies in one cache line.
const ENTRY_ALIGNMENT: usize = 16;

/// A bump allocator over a block of executable memory.
pub(crate) struct CodeMemory {
    writable: Mapping,
    executable: Mapping,
    used: usize,
}

impl CodeMemory {
    /// `len` is a multiple of the page size. Pages take host memory when first written.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let file = memfd_create("lodger-native-code", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, len as u64)?;
        Ok(Self {
            writable: Mapping::new(&file, len, ProtFlags::READ | ProtFlags::WRITE)?,
            executable: Mapping::new(&file, len, ProtFlags::READ | ProtFlags::EXEC)?,
            used: 0,
        })
    }

    /// Adds `code` and returns its address in the executable mapping; `None` when there is no room.
    pub(crate) fn push(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(ENTRY_ALIGNMENT);
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

    /// Forgets all code.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }
}

struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned memory, valid from every thread.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(file: &OwnedFd, len: usize, protection: ProtFlags) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )?
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
