//! Counters of one translator, for a person.

use std::sync::{Arc, Mutex};

use iced_x86::Code;

/// What a vCPU's translator has done.
#[derive(Debug, Clone)]
pub struct Counters {
    pub translated_blocks: u64,
    pub translated_instructions: u64,
    pub translated_bytes: u64,
    /// Blocks that became stale, and were taken into use again.
    pub stale_blocks: u64,
    pub revived_blocks: u64,
    pub cache_flushes: u64,
    /// Exits by cause.
    pub entries: u64,
    pub links: u64,
    pub unlinked_jumps: u64,
    pub table_misses: u64,
    pub tlb_misses: u64,
    pub slow_accesses: u64,
    pub traps: u64,
    pub requests: u64,
    pub clock_reads: u64,
    /// Jump tables emptied.
    pub local_flushes: u64,
    pub full_flushes: u64,
    /// Instructions left to the interpreter, by opcode.
    pub interpreted: Vec<u64>,
}

/// How many opcodes iced knows.
const CODES: usize = 1 << 13;

impl Default for Counters {
    fn default() -> Counters {
        Counters {
            translated_blocks: 0,
            translated_instructions: 0,
            translated_bytes: 0,
            stale_blocks: 0,
            revived_blocks: 0,
            cache_flushes: 0,
            entries: 0,
            links: 0,
            unlinked_jumps: 0,
            table_misses: 0,
            tlb_misses: 0,
            slow_accesses: 0,
            traps: 0,
            requests: 0,
            clock_reads: 0,
            local_flushes: 0,
            full_flushes: 0,
            interpreted: vec![0; CODES],
        }
    }
}

/// The counters of the vCPUs of a VM, brought up to date now and then.
pub type Shared = Arc<Mutex<Vec<Arc<Mutex<Counters>>>>>;

/// Opcodes that are listed.
const OPCODES: usize = 40;

/// All vCPUs together, by name.
pub fn sum(shared: &Shared) -> Vec<(String, u64)> {
    let mut values: Vec<(String, u64)> = Vec::new();
    let mut add = |name: &str, value: u64| match values.iter_mut().find(|(n, _)| n == name) {
        Some((_, sum)) => *sum += value,
        None => values.push((name.into(), value)),
    };
    let mut interpreted = vec![0; CODES];
    for vcpu in shared.lock().expect("a vCPU panicked").iter() {
        let c = vcpu.lock().expect("a vCPU panicked").clone();
        add("translated blocks", c.translated_blocks);
        add("translated instructions", c.translated_instructions);
        add("translated code, bytes", c.translated_bytes);
        add("blocks gone stale", c.stale_blocks);
        add("stale blocks revived", c.revived_blocks);
        add("code cache flushes", c.cache_flushes);
        add("entries to code", c.entries);
        add("jumps linked", c.links);
        add("direct jumps not linked", c.unlinked_jumps);
        add("jump table misses", c.table_misses);
        add("jump tables emptied, not global", c.local_flushes);
        add("jump tables emptied, all", c.full_flushes);
        add("TLB misses filled", c.tlb_misses);
        add("accesses interpreted", c.slow_accesses);
        add("host traps", c.traps);
        add("exits for requests", c.requests);
        add("exits for the clock", c.clock_reads);
        for (sum, count) in interpreted.iter_mut().zip(c.interpreted) {
            *sum += count;
        }
    }
    let mut interpreted: Vec<(usize, u64)> = interpreted.into_iter().enumerate().collect();
    interpreted.retain(|(_, count)| *count > 0);
    interpreted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (code, count) in interpreted.into_iter().take(OPCODES) {
        let code = Code::try_from(code).unwrap_or(Code::INVALID);
        values.push((format!("interpreted {code:?}"), count));
    }
    values
}
