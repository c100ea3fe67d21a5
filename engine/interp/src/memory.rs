//! Guest memory as instructions access it: segmentation, the TLB's fast path, the page walk behind it, and what is
//! not plain RAM (device registers, the local APIC's page, pages that hold cached code, page-crossing accesses).
//!
//! Page-crossing and otherwise slow accesses check all of their pages before they change anything.

use lodger_softmmu::{Direction, MmuIndex};
use lodger_vcpu::Exit;
use lodger_x86::paging::{Access, Privilege, Translation};
use lodger_x86::{ApicMode, Exception};

use crate::cpu::{Cpu, Exec, Stop, seg};
use crate::op::Op;
use crate::word::Word;

const PAGE: u64 = 4096;

/// Where a slow access leads, for the part of it that lies within one page.
#[derive(Clone, Copy)]
enum Place {
    /// RAM: host address, and the guest-physical one to report writes of.
    Ram(*mut u8, u64),
    /// Not RAM.
    Device(u64),
}

impl Cpu {
    /// Offset of an instruction's memory operand within its segment.
    #[inline(always)]
    pub fn offset(&self, op: &Op) -> u64 {
        let base = self.regs[(op.base & 31) as usize];
        let index = self.regs[(op.index & 31) as usize];
        let sum = base
            .wrapping_add(index << (op.scale & 3))
            .wrapping_add(op.disp);
        sum << (op.address_shift & 63) >> (op.address_shift & 63)
    }

    /// Linear address of an instruction's memory operand of `len` bytes, checked against the segment.
    #[inline(always)]
    pub fn operand(&mut self, op: &Op, len: u64, access: Access) -> Exec<u64> {
        let offset = self.offset(op);
        self.linear(op.seg, offset, len, access)
    }

    /// Linear address of `segment:offset`, checked for an access of `len` bytes.
    #[inline(always)]
    pub fn linear(&mut self, segment: u8, offset: u64, len: u64, access: Access) -> Exec<u64> {
        let linear = offset.wrapping_add(self.bases[(segment & 7) as usize]);
        if self.long64() {
            return Ok(linear);
        }
        if self.flat[(segment & 7) as usize] & (1 << access as u8) != 0 {
            return Ok(linear & 0xffff_ffff);
        }
        self.segment_check(segment, offset, len, access)?;
        Ok(linear & 0xffff_ffff)
    }

    /// Reads the memory operand of `op`.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, op: &Op) -> Exec<T> {
        let linear = self.operand(op, T::SIZE, Access::Read)?;
        self.read(linear, op.seg)
    }

    /// Writes the memory operand of `op`.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, op: &Op, value: T) -> Exec {
        let linear = self.operand(op, T::SIZE, Access::Write)?;
        self.write(linear, op.seg, value)
    }

    /// Reads at a linear address with the current privilege. `segment` only decides between #GP and #SS.
    #[inline(always)]
    pub fn read<T: Word>(&mut self, linear: u64, segment: u8) -> Exec<T> {
        let entry = self.tlb.entry(self.mmu, Direction::Read, linear);
        if let Some(host) = entry.host(linear, T::SIZE) {
            // SAFETY: a TLB entry covers the whole page of its tag, and the access stays within it.
            return Ok(unsafe { T::load(host) });
        }
        self.read_slow(linear, segment)
    }

    /// Writes at a linear address with the current privilege.
    #[inline(always)]
    pub fn write<T: Word>(&mut self, linear: u64, segment: u8, value: T) -> Exec {
        let entry = self.tlb.entry(self.mmu, Direction::Write, linear);
        if let Some(host) = entry.host(linear, T::SIZE) {
            // SAFETY: a TLB entry covers the whole page of its tag, and the access stays within it.
            unsafe { T::store(host, value) };
            return Ok(());
        }
        self.write_slow(linear, segment, value)
    }

    /// Read-modify-write. `update` gives the new value and a result. With `lock` it is atomic; it may then be called
    /// several times.
    #[inline(always)]
    pub fn modify<T: Word, R>(
        &mut self,
        op: &Op,
        lock: bool,
        update: impl FnMut(T) -> (T, R),
    ) -> Exec<R> {
        let linear = self.operand(op, T::SIZE, Access::Write)?;
        self.modify_at(linear, op.seg, lock, update)
    }

    /// [`Cpu::modify`] at a linear address.
    #[inline(always)]
    pub fn modify_at<T: Word, R>(
        &mut self,
        linear: u64,
        segment: u8,
        lock: bool,
        mut update: impl FnMut(T) -> (T, R),
    ) -> Exec<R> {
        let entry = self.tlb.entry(self.mmu, Direction::Write, linear);
        if let Some(host) = entry.host(linear, T::SIZE) {
            if lock {
                // SAFETY: as in `write`.
                return Ok(unsafe { atomically(host, update) });
            }
            // SAFETY: as in `write`.
            let (new, result) = update(unsafe { T::load(host) });
            // SAFETY: as in `write`.
            unsafe { T::store(host, new) };
            return Ok(result);
        }
        self.modify_slow(linear, segment, lock, update)
    }

    #[cold]
    fn modify_slow<T: Word, R>(
        &mut self,
        linear: u64,
        segment: u8,
        lock: bool,
        mut update: impl FnMut(T) -> (T, R),
    ) -> Exec<R> {
        if linear & (PAGE - 1) <= PAGE - T::SIZE
            && let Place::Ram(host, physical) = self.place(linear, segment, Access::Write)?
        {
            let result = if lock {
                // SAFETY: `place` gave a pointer to RAM, and the access stays within the page.
                unsafe { atomically(host, update) }
            } else {
                // SAFETY: as above.
                let (new, result) = update(unsafe { T::load(host) });
                // SAFETY: as above.
                unsafe { T::store(host, new) };
                result
            };
            self.wrote(physical);
            return Ok(result);
        }
        // A device register, or a page-crossing operand. All pages are checked for writing first.
        self.check_write(linear, T::SIZE, segment)?;
        let vm = self.vm.clone();
        let _world = lock.then(|| self.stop_others(&vm));
        let (new, result) = update(self.read_slow(linear, segment)?);
        self.write_slow(linear, segment, new)?;
        Ok(result)
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: Word>(&mut self, linear: u64, segment: u8) -> Exec<T> {
        let mut bytes = [0; 8];
        self.read_bytes(linear, segment, &mut bytes[..T::SIZE as usize])?;
        Ok(T::cut(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Word>(&mut self, linear: u64, segment: u8, value: T) -> Exec {
        let bytes = value.zext().to_le_bytes();
        self.write_bytes(linear, segment, &bytes[..T::SIZE as usize])
    }

    /// Reads any number of bytes at a linear address with the current privilege.
    pub fn read_bytes(&mut self, linear: u64, segment: u8, data: &mut [u8]) -> Exec {
        if self.watch.any() {
            self.watched(linear, data.len() as u64, Access::Read)
                .or_else(|e| self.raise(e))?;
        }
        self.check_canonical(linear, data.len() as u64, segment)?;
        let mut at = linear;
        let mut rest = data;
        while !rest.is_empty() {
            let n = rest.len().min((PAGE - at % PAGE) as usize);
            let (part, tail) = rest.split_at_mut(n);
            match self.place(at, segment, Access::Read)? {
                // SAFETY: `place` gave a pointer to RAM, and `n` stays within the page.
                Place::Ram(host, _) => unsafe { load_bytes(host, part) },
                Place::Device(address) => {
                    for (i, chunk) in part.chunks_mut(8).enumerate() {
                        let value = self.device_read(address + 8 * i as u64, chunk.len() as u8)?;
                        chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
                    }
                }
            }
            at = self.wrap(at.wrapping_add(n as u64));
            rest = tail;
        }
        Ok(())
    }

    /// Writes any number of bytes at a linear address with the current privilege.
    pub fn write_bytes(&mut self, linear: u64, segment: u8, data: &[u8]) -> Exec {
        if self.watch.any() {
            self.watched(linear, data.len() as u64, Access::Write)
                .or_else(|e| self.raise(e))?;
        }
        self.check_canonical(linear, data.len() as u64, segment)?;
        let crosses = linear % PAGE + data.len() as u64 > PAGE;
        if crosses {
            self.check_write(linear, data.len() as u64, segment)?;
        }
        // What lies in a device goes first: when the instruction is executed again, the RAM that it may have read is as it
        // was.
        let passes: &[(bool, bool)] = match crosses {
            true => &[(true, false), (false, true)],
            false => &[(true, true)],
        };
        for &(devices, ram) in passes {
            let mut at = linear;
            let mut rest = data;
            while !rest.is_empty() {
                let n = rest.len().min((PAGE - at % PAGE) as usize);
                let (part, tail) = rest.split_at(n);
                match self.place(at, segment, Access::Write)? {
                    Place::Ram(host, physical) if ram => {
                        // SAFETY: `place` gave a pointer to RAM, and `n` stays within the page.
                        unsafe { store_bytes(host, part) };
                        self.wrote(physical);
                    }
                    Place::Device(address) if devices => self.device_write_bytes(address, part)?,
                    _ => {}
                }
                at = self.wrap(at.wrapping_add(n as u64));
                rest = tail;
            }
        }
        Ok(())
    }

    fn device_write_bytes(&mut self, address: u64, data: &[u8]) -> Exec {
        for (i, chunk) in data.chunks(8).enumerate() {
            let mut value = [0; 8];
            value[..chunk.len()].copy_from_slice(chunk);
            let value = u64::from_le_bytes(value);
            self.device_write(address + 8 * i as u64, chunk.len() as u8, value)?;
        }
        Ok(())
    }

    /// Faults unless `len` bytes at `linear` can be written; for instructions that write after they changed something.
    pub fn check_write(&mut self, linear: u64, len: u64, segment: u8) -> Exec {
        if self.watch.any() {
            self.watched(linear, len, Access::Write)
                .or_else(|e| self.raise(e))?;
        }
        self.check_canonical(linear, len, segment)?;
        let last = self.wrap(linear.wrapping_add(len - 1));
        self.place(linear, segment, Access::Write)?;
        if last & !(PAGE - 1) != linear & !(PAGE - 1) {
            self.place(last & !(PAGE - 1), segment, Access::Write)?;
        }
        Ok(())
    }

    /// Host address of `len` bytes of RAM that an instruction is about to write on its own, within one page; `None` if it is a device's. The
    /// instruction reports the write with [`Cpu::wrote_at`].
    pub fn writable(&mut self, linear: u64, segment: u8, len: u64) -> Exec<Option<*mut u8>> {
        if self.watch.any() {
            self.watched(linear, len, Access::Write)
                .or_else(|e| self.raise(e))?;
        }
        Ok(match self.place(linear, segment, Access::Write)? {
            Place::Ram(host, _) => Some(host),
            Place::Device(_) => None,
        })
    }

    /// See [`Cpu::writable`].
    pub fn wrote_at(&mut self, linear: u64) {
        let entry = self.tlb.entry(self.mmu, Direction::Write, linear);
        if entry.host(linear, 1).is_none()
            && let Ok(translation) = self.translate(linear, Access::Write)
        {
            self.wrote(translation.page);
        }
    }

    /// Reads with supervisor rights whatever the CPL: descriptor tables, task-state segments, interrupt tables.
    pub fn read_system<T: Word>(&mut self, linear: u64) -> Exec<T> {
        self.as_system(|c| c.read(c.wrap(linear), seg::NONE))
    }

    /// Writes with supervisor rights whatever the CPL.
    pub fn write_system<T: Word>(&mut self, linear: u64, value: T) -> Exec {
        self.as_system(|c| c.write(c.wrap(linear), seg::NONE, value))
    }

    /// Runs `f` with supervisor rights (an implicit access: SMAP is in force).
    pub fn as_system<R>(&mut self, f: impl FnOnce(&mut Cpu) -> R) -> R {
        let mmu = std::mem::replace(&mut self.mmu, MmuIndex::Kernel);
        let watch = std::mem::take(&mut self.watch.alignment);
        let result = f(self);
        self.mmu = mmu;
        self.watch.alignment = watch;
        result
    }

    /// Linear addresses are 32 bits wide outside of 64-bit mode.
    pub fn wrap(&self, linear: u64) -> u64 {
        if self.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Faults unless all of `len` bytes are at canonical addresses, which goes before any page fault.
    fn check_canonical(&mut self, linear: u64, len: u64, segment: u8) -> Exec {
        if !self.long_mode() || canonical(linear) && canonical(linear.wrapping_add(len - 1)) {
            return Ok(());
        }
        self.raise(match segment {
            seg::SS => Exception::SS0,
            _ => Exception::GP0,
        })
    }

    /// Translates a page for data access, filling the TLB; the exception is raised.
    fn place(&mut self, linear: u64, segment: u8, access: Access) -> Exec<Place> {
        self.check_canonical(linear, 1, segment)?;
        let direction = match access {
            Access::Write => Direction::Write,
            _ => Direction::Read,
        };
        if let Some(host) = self.tlb.entry(self.mmu, direction, linear).host(linear, 1) {
            // A page-crossing access to pages that are in the TLB. A write entry means: nothing to report.
            return Ok(Place::Ram(host, u64::MAX));
        }
        let translation = self.translate(linear, access)?;
        let physical = translation.page | linear & (PAGE - 1);
        if self.lapic.state().mode() == ApicMode::XApic
            && translation.page == self.lapic.state().page()
        {
            return Ok(Place::Device(physical));
        }
        let Some(page) = self.vm.ram.page(translation.page) else {
            return Ok(Place::Device(physical));
        };
        let host = page.host;
        if !self.watch.any() {
            // A read may enter the right to write, too, unless that would mark a page dirty that is not.
            let write = translation.writable
                && (access == Access::Write || page.tracker.is_dirty(page.index))
                && page.tracker.cache_write(page.index);
            self.tlb.fill(
                self.mmu,
                direction,
                linear,
                host,
                translation.page,
                write,
                translation.global,
                translation.size,
            );
        }
        // SAFETY: the offset stays within the page.
        let host = unsafe { host.add((linear & (PAGE - 1)) as usize) };
        Ok(Place::Ram(host, physical))
    }

    /// Fills the TLB so that an access of `size` bytes at `linear` hits, as far as that is possible: not if it faults, leaves the page,
    /// or is to a device or (writing) to code.
    pub fn prepare(&mut self, linear: u64, size: u64, access: Access) -> bool {
        linear & (PAGE - 1) <= PAGE - size
            && matches!(self.place(linear, seg::NONE, access), Ok(Place::Ram(_, _)))
            && {
                let direction = match access {
                    Access::Write => Direction::Write,
                    _ => Direction::Read,
                };
                let entry = self.tlb.entry(self.mmu, direction, linear);
                entry.host(linear, size).is_some()
            }
    }

    /// Walks the page tables with the current privilege; a page fault is raised.
    pub fn translate(&mut self, linear: u64, access: Access) -> Exec<Translation> {
        let privilege = Privilege {
            user: self.mmu == MmuIndex::User,
            ac: self.mmu == MmuIndex::KernelAc,
        };
        match self.paging().walk(&self.vm.ram, linear, access, privilege) {
            Ok(translation) => Ok(translation),
            Err(code) => self.raise(Exception::page_fault(linear, code)),
        }
    }

    /// A write to RAM that did not go through a TLB entry. Code that is being executed may have changed.
    #[inline]
    pub(crate) fn wrote(&mut self, physical: u64) {
        if let Some(page) = self.vm.ram.page(physical)
            && page.tracker.note_write(page.index)
        {
            self.code_written = true;
        }
    }

    fn device_read(&mut self, address: u64, size: u8) -> Exec<u64> {
        if self.is_lapic(address) {
            return Ok(self.lapic_read(address, size));
        }
        let access = Exit::MmioRead { address, size };
        match self.io.answer(access) {
            Some(value) => Ok(value),
            None => self.leave(access),
        }
    }

    fn device_write(&mut self, address: u64, size: u8, value: u64) -> Exec {
        if self.is_lapic(address) {
            self.lapic_write(address, size, value);
            return Ok(());
        }
        let access = Exit::MmioWrite {
            address,
            size,
            value,
        };
        match self.io.answer(access) {
            Some(_) => Ok(()),
            None => self.leave(access),
        }
    }

    fn is_lapic(&self, address: u64) -> bool {
        let lapic = self.lapic.state();
        lapic.mode() == ApicMode::XApic && address & !(PAGE - 1) == lapic.page()
    }

    /// Reads a port; permission has been checked.
    pub fn port_read(&mut self, port: u16, size: u8) -> Exec<u32> {
        let access = Exit::PortRead { port, size };
        match self.io.answer(access) {
            Some(value) => Ok(value as u32),
            None => self.leave(access),
        }
    }

    /// Writes a port; permission has been checked.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32) -> Exec {
        let access = Exit::PortWrite { port, size, value };
        match self.io.answer(access) {
            Some(_) => Ok(()),
            None => self.leave(access),
        }
    }

    fn leave<T>(&mut self, exit: Exit) -> Exec<T> {
        self.exit = Some(exit);
        Err(Stop::Io)
    }
}

/// Whether `linear` is canonical with 48 bits.
#[inline(always)]
pub fn canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

/// Replaces the value at `host` atomically.
///
/// # Safety
/// `host` is writable RAM for the size of `T`.
unsafe fn atomically<T: Word, R>(host: *mut u8, mut update: impl FnMut(T) -> (T, R)) -> R {
    // SAFETY: the caller's promise.
    let mut old = unsafe { T::load(host) };
    loop {
        let (new, result) = update(old);
        // SAFETY: the caller's promise.
        let found = unsafe { T::compare_exchange(host, old, new) };
        if found == old {
            return result;
        }
        old = found;
    }
}

/// Copies from RAM; naturally aligned sizes in one access.
///
/// # Safety
/// `host` is readable for `data.len()` bytes.
pub(crate) unsafe fn load_bytes(host: *const u8, data: &mut [u8]) {
    let mut from = host;
    let (words, rest) = data.as_chunks_mut::<8>();
    for word in words {
        // SAFETY: the caller's promise.
        unsafe {
            *word = u64::load(from).to_le_bytes();
            from = from.add(8);
        }
    }
    let mut at = 0;
    while at < rest.len() {
        let n = 1 << (rest.len() - at).ilog2();
        // SAFETY: the caller's promise; `at + n` is within the data.
        let value = unsafe {
            let from = from.add(at);
            match n {
                4 => u64::from(u32::load(from)),
                2 => u64::from(u16::load(from)),
                _ => u64::from(u8::load(from)),
            }
        };
        rest[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
        at += n;
    }
}

/// Copies to RAM; naturally aligned sizes in one access.
///
/// # Safety
/// `host` is writable for `data.len()` bytes.
unsafe fn store_bytes(host: *mut u8, data: &[u8]) {
    let mut to = host;
    let (words, rest) = data.as_chunks::<8>();
    for word in words {
        // SAFETY: the caller's promise.
        unsafe {
            u64::store(to, u64::from_le_bytes(*word));
            to = to.add(8);
        }
    }
    let mut at = 0;
    while at < rest.len() {
        let n = 1 << (rest.len() - at).ilog2();
        let mut value = [0; 8];
        value[..n].copy_from_slice(&rest[at..at + n]);
        let value = u64::from_le_bytes(value);
        // SAFETY: the caller's promise; `at + n` is within the data.
        unsafe {
            let to = to.add(at);
            match n {
                4 => u32::store(to, value as u32),
                2 => u16::store(to, value as u16),
                _ => u8::store(to, value as u8),
            }
        }
        at += n;
    }
}
