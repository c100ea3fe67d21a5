//! Memory in the lowest 2 GiB of the address space, which generated code reaches by absolute 32-bit addresses.

use std::ffi::c_void;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// MAP_32BIT of mmap(2), which rustix has no name for: the second GiB of the address space.
const LOW: MapFlags = MapFlags::from_bits_retain(0x40);
/// The rest of what is low, which must be looked for.
const START: usize = 16 << 20;
const END: usize = 1 << 30;
const STEP: usize = 4 << 20;

/// Calls `map` with an address and flags until it has mapped `len` bytes below 2 GiB.
pub(crate) fn map_low(
    len: usize,
    mut map: impl FnMut(*mut c_void, MapFlags) -> rustix::io::Result<*mut c_void>,
) -> io::Result<*mut c_void> {
    let mut result = map(ptr::null_mut(), LOW);
    let mut address = START;
    while result == Err(Errno::NOMEM) && address + len <= END {
        match map(
            ptr::without_provenance_mut(address),
            MapFlags::FIXED_NOREPLACE,
        ) {
            Ok(memory) => result = Ok(memory),
            Err(Errno::EXIST) => {}
            Err(error) => result = Err(error),
        }
        address += STEP;
    }
    let memory = result?;
    assert!(memory.addr() + len <= 1 << 31, "what mmap promises");
    Ok(memory)
}

/// A value at an address below 2^31 that does not change.
pub struct LowBox<T> {
    value: NonNull<T>,
}

// SAFETY: it owns the value like a Box.
unsafe impl<T: Send> Send for LowBox<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for LowBox<T> {}

impl<T> LowBox<T> {
    /// Moves `value` there. Fails if the host has no such memory.
    pub fn new(value: T) -> io::Result<LowBox<T>> {
        let memory = map::<T>()?;
        // SAFETY: it is mapped, large enough, aligned to a page and used by nobody else.
        unsafe { memory.write(value) };
        Ok(LowBox { value: memory })
    }

    /// A value of zero bytes, made in place; its pages take host memory when first written.
    ///
    /// # Safety
    /// All zero bytes must be a valid `T`.
    pub unsafe fn zeroed() -> io::Result<LowBox<T>> {
        Ok(LowBox { value: map::<T>()? })
    }

    /// Its address.
    pub fn address(&self) -> u32 {
        self.value.as_ptr() as usize as u32
    }
}

fn map<T>() -> io::Result<NonNull<T>> {
    const { assert!(align_of::<T>() <= 4096 && size_of::<T>() > 0) };
    let memory = map_low(size_of::<T>(), |address, flags| {
        let (access, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | flags,
        );
        // SAFETY: the mapping replaces no existing one.
        unsafe { mmap_anonymous(address, size_of::<T>(), access, flags) }
    })?;
    Ok(NonNull::new(memory.cast()).expect("mmap does not choose address zero"))
}

impl<T> Deref for LowBox<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the value is valid as long as the box.
        unsafe { self.value.as_ref() }
    }
}

impl<T> DerefMut for LowBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the value is valid as long as the box, which is borrowed exclusively.
        unsafe { self.value.as_mut() }
    }
}

impl<T> Drop for LowBox<T> {
    fn drop(&mut self) {
        // SAFETY: the value is valid and dropped once; the range is what mmap returned. munmap can only fail if it is not mapped.
        unsafe {
            self.value.drop_in_place();
            let _ = munmap(self.value.as_ptr().cast(), size_of::<T>());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_low_and_are_dropped() {
        let shared = std::sync::Arc::new(5);
        let low = LowBox::new((shared.clone(), [7u8; 5000])).unwrap();
        assert!(low.address() < 1 << 31);
        assert_eq!((*low.0, low.1[4999]), (5, 7));
        drop(low);
        assert_eq!(std::sync::Arc::strong_count(&shared), 1);
        // SAFETY: zero is a valid array of numbers.
        let mut zeroed = unsafe { LowBox::<[u64; 100]>::zeroed() }.unwrap();
        zeroed[99] += 1;
        assert_eq!((zeroed[0], zeroed[99]), (0, 1));
    }
}
