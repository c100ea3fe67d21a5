//! Translated blocks: finding them, the direct jumps between them, and what invalidates them.
//!
//! A block belongs to a linear address and the guest-physical page that was mapped there. It is reached in three ways, each with its
//! own conditions:
//! * by a lookup, which translates the address first;
//! * through a jump table, which the vCPU empties when the mapping of code may have changed (of pages that are not
//!   global only, if only those may have);
//! * by a direct jump from the same page, which holds as long as both blocks do; or between global pages, until a global
//!   mapping may have changed. A block that is an instruction across two pages depends on the second page's mapping, too.
//!
//! When code is written its page's blocks become stale: nothing leads to them any more. If it turns out that the bytes that their translation depends on are
//! as before, they are taken into use again. Memory is freed all at once, when it is used up.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, RandomState};
use std::io;
use std::ops::Range;

use lodger_host_sys::executable::ExecutableMemory;
use lodger_interp::{Cpu, Switch};
use lodger_softmmu::{AddressHasher, MmuIndex};

use crate::dump;
use crate::emit::{Code, distance};
use crate::env::{Env, Layout, jump_slot};
use crate::jumps::{Filled, Jumps};
use crate::routines::{Routines, assemble};
use crate::stats::Counters;
use crate::translate::{Block as Translation, Mode, Site, Source, Tools, Translated, Trap};

/// Bytes of translated code that the vCPUs of a VM hold together, at most.
const TOTAL: usize = 32 << 20;
/// Room that a block may need.
const BLOCK: usize = 64 << 10;
/// Bytes of an instruction, at most.
const LONGEST: usize = 15;
/// Sites that are kept, at most: the code cache is full before.
const MAX_SITES: usize = 1 << 22;

/// Jumps of a block to itself after which it is unrolled.
const HOT: u32 = 16;
/// Refills of an access's own entry, between two flushes, after which it does without.
pub const REFILLS: i32 = 32;

/// 32-bit code in the last page could go on at address zero: the interpreter does that.
const LAST_32: u64 = 0xffff_efff;

/// Pages of code that are looked up again after a flush, at most.
const PAGES: usize = 16;

pub type BlockId = u32;

type Hasher = BuildHasherDefault<AddressHasher>;

/// Index of the jump table of user code.
const USER: usize = MmuIndex::User as usize;

/// A translated block.
struct Block {
    linear: u64,
    physical: u64,
    /// The other page, if it is an instruction that crosses the page's end.
    second: Option<u64>,
    mode: Mode,
    global: bool,
    /// Host addresses of the checked entry and of the body.
    entry: u32,
    body: u32,
    /// Flags that must be in the register at the body.
    needs: u32,
    /// Nothing leads to it: its page was written.
    stale: bool,
    /// The code that the translation depends on: where in the page, and its hash.
    seen: Range<usize>,
    hash: u64,
    /// Sites whose jump leads here.
    incoming: Vec<u32>,
    traps: Box<[Trap]>,
    sites: Range<u32>,
    /// See [`Cache::is_hot_loop`].
    rounds: u32,
}

impl Block {
    /// The first and the last linear page that it is in.
    fn pages(&self) -> [u64; 2] {
        let first = self.linear >> 12;
        let last = first.wrapping_add(self.second.is_some().into());
        [first, last & (u64::MAX >> 12)]
    }

    /// How it is in a jump table.
    fn filled(&self, id: BlockId) -> Filled {
        Filled {
            block: id,
            slot: jump_slot(self.mode.mmu, self.linear) as u32,
            entry: self.entry,
            pages: self.pages(),
        }
    }
}

pub struct Cache {
    pub layout: Layout,
    pub routines: Routines,
    /// Code of ring 0 uses the vector registers directly.
    ring0_vectors: bool,
    memory: ExecutableMemory,
    /// Bytes that the routines take.
    fixed: usize,
    tools: Tools,
    pub sites: Vec<Site>,
    blocks: Vec<Block>,
    by_address: HashMap<(u64, u8), Vec<BlockId>, Hasher>,
    /// Blocks by guest-physical page, that are not stale.
    by_page: HashMap<u64, Vec<BlockId>, Hasher>,
    /// Blocks that are loops, worth to be unrolled.
    loops: HashSet<(u64, u8)>,
    /// Instructions of user code whose accesses change pages often.
    wanderers: HashSet<u64>,
    /// Entries of sites that are taken.
    entries: usize,
    jumps: Jumps,
    /// Direct jumps to another page or to an instruction that goes on in another, not global and global.
    crossing: [HashSet<u32>; 2],
    buffer: Vec<u8>,
    hasher: RandomState,
    pub counters: Counters,
}

impl Cache {
    pub fn new(layout: Layout, vcpus: usize, exact_flags: bool) -> io::Result<Cache> {
        let size = (TOTAL / vcpus).max(4 << 20);
        let mut memory = ExecutableMemory::new(size)?;
        let (code, routines) =
            assemble(&layout, memory.next(64)).map_err(|e| io::Error::other(e.to_string()))?;
        memory.push(&code, 64).expect("there is room");
        Ok(Cache {
            layout,
            routines,
            ring0_vectors: false,
            fixed: memory.used(),
            memory,
            tools: Tools::new(exact_flags),
            sites: Vec::new(),
            blocks: Vec::new(),
            by_address: HashMap::default(),
            by_page: HashMap::default(),
            loops: HashSet::new(),
            wanderers: HashSet::new(),
            entries: 0,
            jumps: Jumps::default(),
            crossing: Default::default(),
            buffer: Vec::new(),
            hasher: RandomState::new(),
            counters: Counters::default(),
        })
    }

    /// Addresses of all code.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.memory.range()
    }

    /// Makes the jump tables lead nowhere.
    pub fn init(&mut self, env: &mut Env) {
        self.jumps.init(env, self.routines.miss as u64);
    }

    /// Whether code of a privilege uses the vector registers directly.
    pub fn has_vectors(&self, index: MmuIndex) -> bool {
        index as usize == USER || self.ring0_vectors
    }

    /// Code of ring 0 is to use the vector registers directly from now on.
    pub fn use_vectors_in_ring0(&mut self, env: &mut Env) {
        self.clear(env);
        self.ring0_vectors = true;
    }

    /// Forgets everything.
    pub fn clear(&mut self, env: &mut Env) {
        self.jumps.clear(env);
        self.memory.truncate(self.fixed);
        self.sites.clear();
        self.blocks.clear();
        self.by_address.clear();
        self.by_page.clear();
        self.loops.clear();
        self.wanderers.clear();
        self.entries = 0;
        env.empty_sites();
        self.crossing.iter_mut().for_each(HashSet::clear);
        self.counters.cache_flushes += 1;
    }

    /// Another address space is in use.
    pub fn switch_space(&mut self, cpu: &mut Cpu, env: &mut Env, switch: Switch) {
        self.counters.local_flushes += 1;
        let blocks = &self.blocks;
        if switch.same_tables && !switch.keep && switch.space == self.jumps.space() {
            // Most code is where it was: as if it had been looked up again at once.
            let mut pages: Vec<(u64, Option<u64>)> = Vec::with_capacity(PAGES);
            self.jumps.retain(env, |filled| {
                let block = &blocks[filled.block as usize];
                let page = filled.pages[0];
                let known = pages.iter().find(|(linear, _)| *linear == page);
                let physical = match known {
                    Some((_, physical)) => *physical,
                    None if pages.len() == PAGES => None,
                    None => {
                        let physical = cpu.user_code_page(block.linear);
                        pages.push((page, physical));
                        physical
                    }
                };
                let simple = block.mode.mmu == MmuIndex::User && block.second.is_none();
                simple && physical == Some(block.physical & !0xfff)
            });
        } else {
            let valid = |id| !blocks[id as usize].stale;
            self.jumps.switch(env, switch.space, switch.keep, valid);
        }
        self.unlink_crossing(false);
    }

    /// All mappings may have changed.
    pub fn all_mappings_changed(&mut self, env: &mut Env) {
        self.counters.full_flushes += 1;
        self.jumps.clear(env);
        self.unlink_crossing(false);
        self.unlink_crossing(true);
    }

    /// Direct jumps to other pages, that are global or that are not, lead there no more.
    fn unlink_crossing(&mut self, global: bool) {
        for site in std::mem::take(&mut self.crossing[usize::from(global)]) {
            self.unlink(site);
        }
    }

    /// The mapping of one page may have changed.
    pub fn mapping_changed(&mut self, env: &mut Env, linear: u64) {
        if self.jumps.reaches_global(linear >> 12) {
            self.all_mappings_changed(env);
        } else if self.jumps.page_changed(env, linear >> 12) {
            self.unlink_crossing(false);
        }
    }

    /// Guest-physical `page` was written.
    pub fn code_written(&mut self, env: &mut Env, page: u64) {
        for id in self.by_page.remove(&page).unwrap_or_default() {
            if !self.blocks[id as usize].stale {
                self.counters.stale_blocks += 1;
                self.detach(env, id);
            }
        }
    }

    /// Nothing leads to the block any more.
    fn detach(&mut self, env: &mut Env, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.stale = true;
        let filled = block.filled(id);
        let incoming = std::mem::take(&mut block.incoming);
        self.jumps.empty(env, &filled);
        for site in incoming {
            self.unlink(site);
        }
    }

    /// The jump of a [`Site::Direct`] leads to block `id`. Whether it is a loop's that has had some rounds: then the block is retired, and
    /// will be unrolled.
    pub fn is_hot_loop(&mut self, env: &mut Env, site: u32, id: BlockId) -> bool {
        let block = &mut self.blocks[id as usize];
        let key = (block.linear, block.mode.mmu as u8);
        if !block.sites.contains(&site) || block.mode.alone || self.loops.contains(&key) {
            return false;
        }
        block.rounds += 1;
        let hot = block.rounds == HOT;
        if hot {
            self.loops.insert(key);
            self.retire(env, id);
        }
        hot
    }

    /// The code at `place` may have accesses that change pages so often that their own entries are no use: then it is translated again,
    /// without these.
    pub fn look_at_entries(&mut self, env: &mut Env, place: u32) {
        let id = self.block_at(place);
        let sites = self.blocks[id as usize].sites.clone();
        let often = |site: &Site, least: u32| match site {
            Site::Access {
                rip,
                entry: Some(entry),
                ..
            } => (env.site(*entry).refills >= least).then_some(*rip),
            _ => None,
        };
        let sites = &self.sites[sites.start as usize..sites.end as usize];
        if sites
            .iter()
            .any(|site| often(site, REFILLS as u32).is_some())
        {
            let wanderers = sites
                .iter()
                .filter_map(|site| often(site, REFILLS as u32 / 2));
            self.wanderers.extend(wanderers);
            self.retire(env, id);
        }
    }

    /// The block will never be used again.
    fn retire(&mut self, env: &mut Env, id: BlockId) {
        let block = &self.blocks[id as usize];
        let key = (block.linear, block.mode.mmu as u8);
        if let Some(ids) = self.by_address.get_mut(&key) {
            ids.retain(|other| *other != id);
        }
        if !block.stale {
            self.detach(env, id);
        }
    }

    fn block_at(&self, place: u32) -> BlockId {
        let after = self.blocks.partition_point(|b| b.entry <= place);
        after.checked_sub(1).expect("code belongs to a block") as BlockId
    }

    /// The jump of `site` leads to its stub again.
    fn unlink(&mut self, site: u32) {
        if let Site::Direct { patch, stub, .. } = self.sites[site as usize] {
            self.memory
                .patch(patch as usize, distance(patch as usize, stub as usize));
        }
    }

    /// The block at `linear`, translated if need be. `None`: the interpreter must have a look.
    pub fn find(
        &mut self,
        cpu: &mut Cpu,
        env: &mut Env,
        linear: u64,
        mode: Mode,
    ) -> Option<BlockId> {
        if mode.is_32() && linear > LAST_32 {
            return None;
        }
        let (physical, global) = cpu.fetch(linear).ok()?;
        let candidates = self.by_address.get(&(linear, mode.mmu as u8));
        let found = candidates.and_then(|ids| {
            let right = |id: &&BlockId| {
                let block = &self.blocks[**id as usize];
                // One that was translated before its page became global would do, but it cannot be reached as well.
                let reach = block.global == global || !block.global && block.second.is_some();
                block.physical == physical && block.mode == mode && reach
            };
            ids.iter().find(right).copied()
        });
        if let Some(id) = found {
            let block = &self.blocks[id as usize];
            let second = block.second;
            let crosses_alike = second.is_none_or(|page| {
                let next = (linear & !0xfff).wrapping_add(0x1000);
                cpu.fetch(next)
                    .is_ok_and(|(physical, _)| physical & !0xfff == page)
            });
            let current = !block.stale || second.is_none() && self.revive(cpu, id);
            if current && crosses_alike {
                return Some(id);
            }
            let key = (linear, mode.mmu as u8);
            let ids = self.by_address.get_mut(&key).expect("just found");
            ids.retain(|other| *other != id);
        }
        self.translate(cpu, env, linear, physical, global, mode)
    }

    /// Takes a stale block into use again if its bytes are the same.
    fn revive(&mut self, cpu: &mut Cpu, id: BlockId) -> bool {
        let block = &mut self.blocks[id as usize];
        if cpu.watch(block.physical).is_none() {
            return false;
        }
        let mut now = [0; 4096];
        let now = &mut now[block.seen.clone()];
        cpu.peek(block.physical & !0xfff | block.seen.start as u64, now);
        let same = self.hasher.hash_one(now) == block.hash;
        if same {
            block.stale = false;
            let page = block.physical & !0xfff;
            self.by_page.entry(page).or_default().push(id);
            self.counters.revived_blocks += 1;
        }
        same
    }

    fn translate(
        &mut self,
        cpu: &mut Cpu,
        env: &mut Env,
        linear: u64,
        physical: u64,
        mut global: bool,
        mode: Mode,
    ) -> Option<BlockId> {
        if self.memory.room() < BLOCK || self.sites.len() > MAX_SITES {
            self.clear(env);
        }
        cpu.watch(physical)?;
        let mut page = [0; 4096 + LONGEST];
        cpu.peek(physical & !0xfff, &mut page[..4096]);
        let mut second = None;
        let base = self.memory.next(16);
        let first_site = self.sites.len() as u32;
        let mut translated = self.translate_bytes(linear, &page[..4096], global, mode);
        if translated.is_none() {
            // The instruction goes on in the next page.
            let (next, next_global) = cpu.fetch((linear & !0xfff).wrapping_add(0x1000)).ok()?;
            cpu.watch(next)?;
            cpu.peek(next, &mut page[4096..]);
            second = Some(next & !0xfff);
            global &= next_global;
            translated = self.translate_bytes(linear, &page, global, mode);
        }
        let translated = translated?;
        self.memory.push(&self.buffer, 16).expect("there is room");
        let block = Block {
            linear,
            physical,
            second,
            mode,
            global,
            entry: base as u32,
            body: translated.body as u32,
            needs: translated.needs,
            stale: false,
            hash: self.hasher.hash_one(&page[translated.seen.clone()]),
            seen: translated.seen,
            incoming: Vec::new(),
            traps: translated.traps.into(),
            sites: first_site..self.sites.len() as u32,
            rounds: 0,
        };
        if tracing::enabled!(target: "lodger_dbt_x86::dump", tracing::Level::TRACE) {
            let start = (linear & 0xfff) as usize;
            let guest = &page[start..start + translated.len];
            let text = dump::block(guest, linear, mode.bitness(), &self.buffer, base as u64);
            tracing::trace!(target: "lodger_dbt_x86::dump", "block {linear:x}, {mode:?}\n{text}");
        }
        self.counters.translated_blocks += 1;
        self.counters.translated_bytes += self.buffer.len() as u64;
        self.counters.translated_instructions += translated.insns as u64;
        let id = self.blocks.len() as BlockId;
        self.blocks.push(block);
        self.by_address
            .entry((linear, mode.mmu as u8))
            .or_default()
            .push(id);
        for page in second.into_iter().chain([physical & !0xfff]) {
            self.by_page.entry(page).or_default().push(id);
        }
        Some(id)
    }

    /// Translates into the buffer.
    fn translate_bytes(
        &mut self,
        linear: u64,
        page: &[u8],
        global: bool,
        mode: Mode,
    ) -> Option<Translated> {
        let source = Source {
            linear,
            page,
            global,
            mode,
            wanderers: &self.wanderers,
            unroll: !mode.alone && self.loops.contains(&(linear, mode.mmu as u8)),
        };
        let buffer = std::mem::take(&mut self.buffer);
        let mut code = Code::new(self.memory.next(16), buffer);
        let translated = Translation::new(
            &mut self.tools,
            &self.layout,
            &source,
            self.routines,
            &mut code,
            (&mut self.sites, &mut self.entries),
        )
        .translate();
        self.buffer = code.bytes;
        translated
    }

    /// Host address at which a block is entered when it is known to be the right one.
    pub fn body(&self, id: BlockId) -> u64 {
        self.blocks[id as usize].body.into()
    }

    /// Makes the jump of a [`Site::Direct`] lead to a block, if that may be.
    pub fn link(&mut self, site: u32, id: BlockId) {
        let Site::Direct {
            patch,
            leaves_page,
            restoring,
            ..
        } = self.sites[site as usize]
        else {
            return;
        };
        let block = &mut self.blocks[id as usize];
        if block.sites.contains(&site) && block.rounds > 0 && block.rounds < HOT {
            return;
        }
        if leaves_page && !block.global {
            self.counters.unlinked_jumps += 1;
            return;
        }
        if leaves_page || block.second.is_some() {
            // A set: the guest must not make it grow by having the same jump linked again and again.
            self.crossing[usize::from(block.global)].insert(site);
            self.jumps.reach(block.pages(), block.global);
        }
        self.counters.links += 1;
        // It may be there from before a flush; the guest must not make the list grow.
        if !block.incoming.contains(&site) {
            block.incoming.push(site);
        }
        let (mut jump, body) = (patch, block.body);
        if let (Some((start, last)), true) = (restoring, block.needs != 0) {
            self.memory
                .patch(patch as usize, distance(patch as usize, start as usize));
            jump = last;
        }
        self.memory
            .patch(jump as usize, distance(jump as usize, body as usize));
    }

    /// Makes the jump table lead to a block.
    pub fn enter_in_table(&mut self, env: &mut Env, id: BlockId) {
        let block = &self.blocks[id as usize];
        if !self.jumps.fill(env, block.filled(id), block.global) {
            self.all_mappings_changed(env);
        }
    }

    /// The instruction on which the host trapped at `place`, and its guest address.
    pub fn trapped(&self, place: u64) -> (u64, Trap) {
        let place = place as u32;
        let block = &self.blocks[self.block_at(place) as usize];
        let found = block.traps.iter().find(|trap| trap.place == place);
        let trap = found.expect("only noted instructions trap");
        (block.linear.wrapping_add(trap.offset.into()), *trap)
    }
}
