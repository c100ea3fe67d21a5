//! What the jump tables of a vCPU hold: translated blocks by linear address, as long as their pages are mapped as they were.
//!
//! Blocks of pages that are not global belong to an address space (a PCID), like such entries of the TLB: those of other spaces are put aside
//! until their space is used again.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;

use lodger_softmmu::AddressHasher;

use crate::cache::BlockId;
use crate::env::{Env, JUMP_SLOTS};

/// A slot that was filled.
#[derive(Clone, Copy)]
pub struct Filled {
    pub block: BlockId,
    pub slot: u32,
    /// The block's entry.
    pub entry: u32,
    /// The first and the last linear page of the block.
    pub pages: [u64; 2],
}

/// Address spaces that are remembered while others are in use, and blocks of each.
const SPACES: usize = 8;
const KEPT: usize = 1024;

/// What of the jump tables is filled.
#[derive(Default)]
pub struct Jumps {
    /// With blocks of pages that are not global, and of those that are.
    filled: [Vec<Filled>; 2],
    /// The current address space, and others, the latest last.
    space: u16,
    spaces: Vec<(u16, Vec<Filled>)>,
    /// Linear pages that something leads to, in any address space, and as global ones.
    reached: [HashSet<u64, BuildHasherDefault<AddressHasher>>; 2],
    /// Where empty slots lead.
    miss: u64,
}

impl Jumps {
    /// Makes all slots lead nowhere: to `miss`.
    pub fn init(&mut self, env: &mut Env, miss: u64) {
        self.miss = miss;
        env.jumps.fill(miss);
    }

    /// The block is not to be entered any more.
    pub fn empty(&self, env: &mut Env, filled: &Filled) {
        let slot = &mut env.jumps[filled.slot as usize];
        if *slot == u64::from(filled.entry) {
            *slot = self.miss;
        }
    }

    /// Makes a slot lead to a block. False: too much is filled, and all is to be forgotten.
    pub fn fill(&mut self, env: &mut Env, filled: Filled, global: bool) -> bool {
        env.jumps[filled.slot as usize] = filled.entry.into();
        let list = &mut self.filled[usize::from(global)];
        list.push(filled);
        let few = list.len() <= JUMP_SLOTS;
        self.reach(filled.pages, global);
        few
    }

    /// Something leads to linear `pages`.
    pub fn reach(&mut self, pages: [u64; 2], global: bool) {
        self.reached[usize::from(global)].extend(pages);
    }

    /// Whether something leads to linear `page` as a global one.
    pub fn reaches_global(&self, page: u64) -> bool {
        self.reached[1].contains(&page)
    }

    /// The mapping of linear `page`, which is not a global one, has changed in the current address space; whether something led there.
    pub fn page_changed(&mut self, env: &mut Env, page: u64) -> bool {
        if !self.reached[0].contains(&page) {
            return false;
        }
        let mut local = std::mem::take(&mut self.filled[0]);
        local.retain(|filled| {
            let stays = !filled.pages.contains(&page);
            if !stays {
                self.empty(env, filled);
            }
            stays
        });
        self.filled[0] = local;
        true
    }

    /// The current address space.
    pub fn space(&self) -> u16 {
        self.space
    }

    /// Empties slots of blocks that are not global unless `stays`.
    pub fn retain(&mut self, env: &mut Env, mut stays: impl FnMut(&Filled) -> bool) {
        let mut local = std::mem::take(&mut self.filled[0]);
        local.retain(|filled| {
            let there = env.jumps[filled.slot as usize] == u64::from(filled.entry);
            let stays = there && stays(filled);
            if !stays {
                self.empty(env, filled);
            }
            stays
        });
        self.filled[0] = local;
    }

    /// Empties all slots.
    pub fn clear(&mut self, env: &mut Env) {
        for filled in self.filled.iter().flatten() {
            self.empty(env, filled);
        }
        self.filled.iter_mut().for_each(Vec::clear);
        self.spaces.clear();
        self.reached.iter_mut().for_each(HashSet::clear);
    }

    /// Another address space is in use. Slots are filled again with what is known of it, if it is to be kept and `valid`.
    pub fn switch(
        &mut self,
        env: &mut Env,
        space: u16,
        keep: bool,
        valid: impl Fn(BlockId) -> bool,
    ) {
        if space == self.space && keep {
            return;
        }
        let mut local = std::mem::take(&mut self.filled[0]);
        if space == self.space {
            local.drain(..).for_each(|filled| self.empty(env, &filled));
            self.filled[0] = local;
            return;
        }
        let known = self.spaces.iter().position(|(number, _)| *number == space);
        let new = known.map(|n| self.spaces.remove(n).1);
        if self.spaces.len() == SPACES {
            self.spaces.remove(0);
        }
        local.retain(|filled| {
            let there = env.jumps[filled.slot as usize] == u64::from(filled.entry);
            self.empty(env, filled);
            there
        });
        local.truncate(KEPT);
        self.spaces.push((self.space, local));
        self.space = space;
        let mut new = new.unwrap_or_default();
        new.retain(|filled| keep && valid(filled.block));
        for filled in &new {
            env.jumps[filled.slot as usize] = filled.entry.into();
        }
        self.filled[0] = new;
    }
}
