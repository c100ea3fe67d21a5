//! The cache of decoded code.
//!
//! A block is a run of instructions within one guest-physical page, up to the first unconditional transfer. It is found by
//! linear address and mode through a small direct-mapped table ([`Jump`]), which any change of the address mapping
//! invalidates as a whole, and behind that by guest-physical address. A block is valid as long as its page's version is
//! (see the tracker of `lodger-guest-memory`); if only other bytes of the page changed it is taken into use again.
//!
//! Blocks are freed only all together, when there are too many, and never while one is being executed.

use std::collections::{HashMap, HashSet};
use std::hash::BuildHasherDefault;
use std::sync::atomic::{AtomicU32, Ordering};

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use lodger_guest_memory::Tracker;
use lodger_native::Full;
use lodger_softmmu::AddressHasher;
use lodger_x86::Exception;
use lodger_x86::paging::Access;

use crate::cpu::{CodeSize, Cpu, Exec, seg};
use crate::decode::{decode, ends_block};
use crate::memory::{canonical, load_bytes};
use crate::op::{Op, Rare};

const PAGE: u64 = 4096;
/// Instructions in a block, at most.
const MAX_OPS: usize = 64;
/// Decoded instructions that the vCPUs of a VM hold together, at most; at about 80 bytes each.
const TOTAL_OPS: usize = 320_000;
const JUMPS: usize = 8192;
const FETCHES: usize = 128;

/// Decoded code.
pub struct Block {
    pub ops: Box<[Op]>,
    /// What the `imm` of some ops points to: boxed, because it must not move.
    #[expect(clippy::vec_box)]
    _rare: Vec<Box<Rare>>,
    /// The code that was decoded.
    bytes: Box<[u8]>,
    /// Where the version of the page is kept, and the version that was decoded. Null: good for one execution.
    word: *const AtomicU32,
    version: u32,
    /// Linear address and mode in which it was decoded last, for crash reports.
    pub linear: u64,
}

impl Block {
    #[inline(always)]
    fn is_current(&self) -> bool {
        // SAFETY: the word belongs to the tracker of guest memory, which the VM keeps alive.
        let word = unsafe { &*self.word };
        word.load(Ordering::Acquire) & Tracker::VERSION_MASK == self.version
    }
}

#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    key: u64,
    block: *mut Block,
}

#[derive(Clone, Copy)]
struct Fetch {
    linear: u64,
    key: u64,
    physical: u64,
    global: bool,
}

/// The blocks of one vCPU.
pub struct BlockCache {
    jumps: Box<[Jump]>,
    fetches: Box<[Fetch]>,
    /// By guest-physical address << 2 | code size.
    map: HashMap<u64, *mut Block, BuildHasherDefault<AddressHasher>>,
    /// Boxed, because others point to them.
    #[expect(clippy::vec_box)]
    arena: Vec<Box<Block>>,
    /// A block that crosses a page or a limit: decoded anew for each execution.
    once: Option<Box<Block>>,
    ops: usize,
    limit: usize,
    /// Move on with every change of the mapping from linear addresses to code, of pages that are not global and of all; low bits: mode.
    key: u64,
    global_key: u64,
    generation: u64,
    global_generation: u64,
    /// Linear addresses of global pages that something is known of.
    global_pages: HashSet<u64, BuildHasherDefault<AddressHasher>>,
}

/// Such pages, at most.
const GLOBAL_PAGES: usize = 1 << 16;
/// Tells the key of what is global.
const GLOBAL_KEY: u64 = 8;

// SAFETY: the pointers are to blocks that the cache owns.
unsafe impl Send for BlockCache {}

impl BlockCache {
    /// For one of `vcpus` vCPUs.
    pub fn new(vcpus: usize) -> BlockCache {
        let none = Jump {
            linear: 0,
            key: u64::MAX,
            block: std::ptr::null_mut(),
        };
        let unknown = Fetch {
            linear: 0,
            key: u64::MAX,
            physical: 0,
            global: false,
        };
        BlockCache {
            jumps: vec![none; JUMPS].into(),
            fetches: vec![unknown; FETCHES].into(),
            map: HashMap::default(),
            arena: Vec::new(),
            once: None,
            ops: 0,
            limit: (TOTAL_OPS / vcpus).max(MAX_OPS * 64),
            key: 0,
            global_key: GLOBAL_KEY,
            generation: 0,
            global_generation: 0,
            global_pages: HashSet::default(),
        }
    }

    /// The mapping from linear addresses to code, or the right to execute it, may have changed, but for global pages.
    pub fn local_mappings_changed(&mut self) {
        self.generation += 1;
        self.set_keys(self.key & 7);
    }

    /// The same, of all pages.
    pub fn all_mappings_changed(&mut self) {
        self.global_generation += 1;
        self.global_pages.clear();
        self.local_mappings_changed();
    }

    /// The same, of the page at `linear`.
    pub fn mapping_changed(&mut self, linear: u64) {
        match self.global_pages.contains(&(linear & !(PAGE - 1))) {
            true => self.all_mappings_changed(),
            false => self.local_mappings_changed(),
        }
    }

    /// The mode in which code is decoded and fetched.
    pub fn set_mode(&mut self, code: CodeSize, user: bool) {
        self.set_keys(u64::from(user) << 2 | code as u64);
    }

    fn set_keys(&mut self, mode: u64) {
        self.key = self.generation << 4 | mode;
        self.global_key = self.global_generation << 4 | GLOBAL_KEY | mode;
    }

    /// Whether what was noted with `key` is still true.
    #[inline(always)]
    fn is_current(&self, key: u64) -> bool {
        key == self.key || key == self.global_key
    }

    /// Drops everything.
    fn clear(&mut self) {
        self.map.clear();
        self.arena.clear();
        self.ops = 0;
        self.global_generation += 1;
        self.local_mappings_changed();
    }
}

impl Cpu {
    /// Linear address of the next instruction.
    #[inline(always)]
    pub fn code_address(&self) -> u64 {
        if self.long64() {
            self.rip()
        } else {
            self.rip().wrapping_add(self.bases[seg::CS as usize]) & 0xffff_ffff
        }
    }

    /// The block at CS:RIP. `Err`: fetching it faults. The pointer is good until the next call.
    #[inline(always)]
    pub fn block(&mut self) -> Exec<*const Block> {
        let linear = self.code_address();
        let jump = &self.blocks.jumps[(linear ^ linear >> 12) as usize % JUMPS];
        if jump.linear == linear && self.blocks.is_current(jump.key) {
            // SAFETY: blocks live until `clear`, which moves the key on.
            let block = unsafe { &*jump.block };
            if block.is_current() && self.within_code_segment(block) {
                return Ok(jump.block);
            }
        }
        self.block_slow(linear)
    }

    /// Whether all of a block at RIP is within the limit of the code segment.
    #[inline(always)]
    fn within_code_segment(&self, block: &Block) -> bool {
        let limit = u64::from(self.segments[seg::CS as usize].limit);
        self.long64() || self.rip() + block.bytes.len() as u64 <= limit + 1
    }

    #[cold]
    #[inline(never)]
    fn block_slow(&mut self, linear: u64) -> Exec<*const Block> {
        let limit = u64::from(self.segments[seg::CS as usize].limit);
        if self.long64() {
            if !canonical(linear) {
                return self.gp0();
            }
        } else if self.rip() > limit {
            return self.gp0();
        }
        let (physical, global) = self.fetch(linear)?;
        let key = physical << 2 | self.code as u64;
        let mut found = self.blocks.map.get(&key).copied();
        if let Some(block) = found
            // SAFETY: blocks live until `clear`, which empties the map.
            && !self.revalidate(unsafe { &mut *block }, physical)
        {
            found = None;
        }
        let block = match found {
            Some(block) => block,
            None => match self.decode_block(linear, physical)? {
                Some(block) => {
                    self.blocks.map.insert(key, block);
                    block
                }
                None => return self.decode_one(linear),
            },
        };
        // SAFETY: as above.
        let decoded = unsafe { &mut *block };
        decoded.linear = linear;
        if !self.within_code_segment(decoded) {
            // Part of it is beyond the code segment: one instruction at a time, each with a look at the limit.
            return self.decode_one(linear);
        }
        self.blocks.jumps[(linear ^ linear >> 12) as usize % JUMPS] = Jump {
            linear,
            key: match global {
                true => self.blocks.global_key,
                false => self.blocks.key,
            },
            block,
        };
        Ok(block)
    }

    /// Guest-physical address of code at `linear`.
    fn fetch_address(&mut self, linear: u64) -> Exec<u64> {
        Ok(self.fetch(linear)?.0)
    }

    /// Guest-physical address of code at `linear`, and whether it is mapped there in all address spaces.
    pub fn fetch(&mut self, linear: u64) -> Exec<(u64, bool)> {
        let (page, slot) = (linear & !(PAGE - 1), (linear >> 12) as usize % FETCHES);
        let fetch = self.blocks.fetches[slot];
        if fetch.linear == page && self.blocks.is_current(fetch.key) {
            return Ok((fetch.physical | linear & (PAGE - 1), fetch.global));
        }
        if self.long64() && !canonical(linear) {
            return self.gp0();
        }
        let mmu = self.mmu;
        if mmu == lodger_softmmu::MmuIndex::KernelAc {
            self.mmu = lodger_softmmu::MmuIndex::Kernel;
        }
        let translation = self.translate(linear, Access::Execute);
        self.mmu = mmu;
        let translation = translation?;
        let (physical, global) = (translation.page, translation.global);
        self.tlb.note_size(linear, translation.size);
        if global && self.blocks.global_pages.len() == GLOBAL_PAGES {
            self.blocks.all_mappings_changed();
        }
        if global {
            self.blocks.global_pages.insert(page);
        }
        self.blocks.fetches[slot] = Fetch {
            linear: page,
            key: match global {
                true => self.blocks.global_key,
                false => self.blocks.key,
            },
            physical,
            global,
        };
        Ok((physical | linear & (PAGE - 1), global))
    }

    /// Guest-physical page that user code at `linear` is fetched from, by the page tables as they are.
    pub fn user_code_page(&mut self, linear: u64) -> Option<u64> {
        let mmu = std::mem::replace(&mut self.mmu, lodger_softmmu::MmuIndex::User);
        let translation = self.translate(linear, Access::Execute);
        self.mmu = mmu;
        let translation = translation.ok()?;
        self.tlb.note_size(linear, translation.size);
        Some(translation.page)
    }

    /// Takes an outdated block into use again if its own bytes have not changed.
    fn revalidate(&mut self, block: &mut Block, physical: u64) -> bool {
        if block.is_current() {
            return true;
        }
        let Some(version) = self.watch(physical) else {
            return false;
        };
        let mut now = [0; MAX_OPS * 15];
        let now = &mut now[..block.bytes.len()];
        self.peek(physical, now);
        let same = *now == *block.bytes;
        if same {
            // Not otherwise: another linear address may still lead to the outdated block.
            block.version = version;
        }
        same
    }

    /// Declares that code of the page at `physical` is going to be cached; its version. `None`: not RAM.
    pub fn watch(&mut self, physical: u64) -> Option<u32> {
        let vm = self.vm.clone();
        let page = vm.ram.page(physical)?;
        let (version, writable_somewhere) = page.tracker.watch_code(page.index);
        if writable_somewhere {
            self.protect_everywhere(physical & !(PAGE - 1));
            page.tracker.writes_uncached(page.index, version);
        }
        Some(version)
    }

    /// Reads code within one page; not RAM reads as ones.
    pub fn peek(&self, physical: u64, data: &mut [u8]) {
        match self.vm.ram.page(physical) {
            None => data.fill(0xff),
            Some(page) => {
                let offset = (physical & (PAGE - 1)) as usize;
                // SAFETY: the callers stay within the page.
                unsafe { load_bytes(page.host.add(offset), data) };
            }
        }
    }

    fn bitness(&self) -> u32 {
        match self.code {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        }
    }

    /// Decodes a block. `None`: its first instruction crosses the page, or it is not in RAM.
    fn decode_block(&mut self, linear: u64, physical: u64) -> Exec<Option<*mut Block>> {
        if self.blocks.ops > self.blocks.limit {
            self.blocks.clear();
        }
        let Some(version) = self.watch(physical) else {
            return Ok(None);
        };
        let room = (PAGE - physical % PAGE) as usize;
        let mut bytes = vec![0; room.min(MAX_OPS * 15)];
        self.peek(physical, &mut bytes);
        let Some(mut block) = self.decode_bytes(&bytes, MAX_OPS) else {
            return Ok(None);
        };
        let page = self.vm.ram.page(physical).expect("watched, so it is RAM");
        block.word = page.tracker.version_word(page.index);
        block.version = version;
        block.linear = linear;
        self.blocks.ops += block.ops.len();
        let mut block = Box::new(block);
        let pointer = &raw mut *block;
        self.blocks.arena.push(block);
        Ok(Some(pointer))
    }

    /// Decodes up to `most` instructions; `None`: the first one needs more bytes.
    fn decode_bytes(&mut self, bytes: &[u8], most: usize) -> Option<Block> {
        loop {
            match self.try_decode(bytes, most) {
                Ok(block) => return block,
                Err(Full) => {
                    // Decoded blocks refer to stubs.
                    self.blocks.clear();
                    self.stubs.clear();
                }
            }
        }
    }

    fn try_decode(&mut self, bytes: &[u8], most: usize) -> Result<Option<Block>, Full> {
        let mut decoder = Decoder::with_ip(self.bitness(), bytes, 0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let (mut ops, mut rares) = (Vec::new(), Vec::new());
        let mut end = 0;
        while ops.len() < most && decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            let short = decoder.last_error() == DecoderError::NoMoreBytes;
            if short || instruction.is_invalid() && self.is_endless(&bytes[end..]) {
                break;
            }
            end = decoder.position();
            let (op, rare) = decode(&instruction, &mut self.stubs)?;
            ops.push(op);
            rares.extend(rare);
            if ends_block(&instruction) {
                break;
            }
        }
        if ops.is_empty() {
            return Ok(None);
        }
        Ok(Some(Block {
            ops: ops.into(),
            _rare: rares,
            bytes: bytes[..end].into(),
            word: std::ptr::null(),
            version: 0,
            linear: 0,
        }))
    }

    /// Whether the 15 bytes that an instruction may have do not suffice.
    fn is_endless(&self, bytes: &[u8]) -> bool {
        // With 15 bytes or more the decoder does not tell this from an undefined opcode.
        let Some(start) = bytes.get(..14) else {
            return false;
        };
        let mut decoder = Decoder::new(self.bitness(), start, DecoderOptions::NONE);
        let _ = decoder.decode();
        bytes.len() > start.len() && decoder.last_error() == DecoderError::NoMoreBytes
    }

    /// Decodes one instruction for one execution, fetching it byte by byte as far as it goes.
    fn decode_one(&mut self, linear: u64) -> Exec<*const Block> {
        let limit = u64::from(self.segments[seg::CS as usize].limit);
        let mut bytes = Vec::with_capacity(15);
        loop {
            let n = bytes.len() as u64;
            let beyond = !self.long64() && self.rip() + n > limit;
            if beyond || n == 15 {
                return self.raise(Exception::GP0);
            }
            let at = linear.wrapping_add(n);
            let at = if self.long64() { at } else { at & 0xffff_ffff };
            let physical = self.fetch_address(at)?;
            let mut byte = [0];
            self.peek(physical, &mut byte);
            bytes.push(byte[0]);
            if let Some(mut block) = self.decode_bytes(&bytes, 1) {
                block.linear = linear;
                let block = self.blocks.once.insert(Box::new(block));
                return Ok(&raw const **block);
            }
        }
    }
}

impl Cpu {
    /// Reads code at `linear` for a report, as far as its page goes; how many bytes. Changes nothing in the guest.
    pub fn peek_code(&self, linear: u64, data: &mut [u8]) -> Option<usize> {
        let slot = (linear >> 12) as usize % FETCHES;
        let fetch = self.blocks.fetches[slot];
        if fetch.linear != linear & !(PAGE - 1) {
            return None;
        }
        let len = data.len().min((PAGE - linear % PAGE) as usize);
        self.peek(fetch.physical | linear & (PAGE - 1), &mut data[..len]);
        Some(len)
    }
}
