//! What is made of guest code, as text, against reviewed files: `golden/<topic>.txt`.
//!
//! A file is a list of cases: a title, the mode, the guest's code as assembly bytes, and behind them what the translator made of it. After a
//! change, `LODGER_UPDATE_GOLDEN=1 cargo test -p lodger-dbt-x86 golden` writes the files anew; the difference is to be read.

use std::collections::HashSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use iced_x86::{
    Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, SymbolResolver, SymbolResult,
};
use lodger_softmmu::{ENTRIES, MmuIndex};

use crate::emit::Code;
use crate::env::Layout;
use crate::group::KEPT;
use crate::insn::Simd;
use crate::refill::Refills;
use crate::routines::Routines;
use crate::translate::{Block, Mode, Source, Tools, Width};

/// Where blocks are translated to.
const BASE: usize = 0x4000_0000;

fn routines() -> Routines {
    let refills = |first| Refills {
        stack: first,
        site: [first + 1, first + 2],
        none: first + 3,
    };
    Routines {
        enter: 0x3000_0000,
        leave: 0x3000_0100,
        leave_saved: 0x3000_0200,
        miss: 0x3000_0300,
        trap: 0x3000_0400,
        load_vectors: 0x3000_0800,
        refills: [0x3000_0500, 0x3000_0600, 0x3000_0700].map(refills),
    }
}

/// Names for addresses.
struct Names(Vec<(u64, u64, String)>);

impl Names {
    fn new(layout: &Layout) -> Names {
        let mut names = Vec::new();
        let mut add = |start: u32, len: u32, name: &str| {
            names.push((u64::from(start), u64::from(len), name.to_string()));
        };
        for n in 0..16 {
            add(layout.register(n), 8, &format!("guest.r{n}"));
        }
        for (n, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
            add(layout.bases + 8 * n as u32, 8, &format!("base.{name}"));
            add(layout.selector(n), 2, &format!("selector.{name}"));
            add(layout.segment_base(n), 8, &format!("segment.{name}.base"));
            add(layout.segment_limit(n), 4, &format!("segment.{name}.limit"));
            add(
                layout.segment_attributes(n),
                2,
                &format!("segment.{name}.attributes"),
            );
        }
        for (index, mode) in [
            (MmuIndex::Kernel, "kernel"),
            (MmuIndex::KernelAc, "kernel_ac"),
            (MmuIndex::User, "user"),
        ] {
            for (direction, name) in ["read", "write"].iter().enumerate() {
                let table = layout.tables[index as usize][direction];
                add(table, 16 * ENTRIES as u32, &format!("tlb.{mode}.{name}"));
            }
            add(layout.stack(index), 16, &format!("stack.{mode}"));
            let slots = crate::env::jump_slots(index) as u32 * 8;
            let first = layout.jump(crate::env::jump_slot(index, 0));
            add(first, slots, &format!("jumps.{mode}"));
        }
        add(layout.narrow(false), 4, "narrow.ring0");
        add(layout.narrow(true), 4, "narrow.user");
        for (place, name) in [
            (layout.requests, "requests"),
            (layout.flags(), "flags"),
            (layout.rflags(), "rflags"),
            (layout.waiting(), "waiting"),
            (layout.value(), "value"),
            (layout.replaced(), "replaced"),
            (layout.indirect(), "indirect"),
            (layout.retry(), "retry"),
            (layout.resume(), "resume"),
            (layout.entry(), "entry"),
            (layout.ticks_left(), "ticks_left"),
            (layout.sign_mask(), "sign_mask"),
            (layout.no_if_mask(), "no_if_mask"),
            (layout.kernel_gs_base(), "kernel_gs_base"),
            (layout.no_ac_mask(), "no_ac_mask"),
            (layout.no_df_mask(), "no_df_mask"),
            (layout.control(0), "cr0"),
            (layout.control(2), "cr2"),
            (layout.control(3), "cr3"),
            (layout.control(4), "cr4"),
            (layout.bit_mask(4), "bit_mask.32"),
            (layout.bit_mask(8), "bit_mask.64"),
            (layout.upper_mask(), "upper_mask"),
            (layout.efer(), "efer"),
            (layout.star(), "star"),
            (layout.lstar(), "lstar"),
            (layout.sfmask(), "sfmask"),
        ] {
            add(place, 8, name);
        }
        for n in 0..KEPT {
            add(layout.kept(n), 8, &format!("kept{n}"));
        }
        add(layout.strings(), 32, "strings");
        for n in 0..64 {
            add(layout.site_entry(n), 24, &format!("site{n}"));
        }
        let r = routines();
        for (place, name) in [
            (r.leave, "leave"),
            (r.leave_saved, "leave_saved"),
            (r.miss, "miss"),
            (r.load_vectors, "load_vectors"),
        ] {
            add(place as u32, 1, name);
        }
        for (refills, mode) in r.refills.iter().zip(["kernel", "kernel_ac", "user"]) {
            for (place, name) in [
                (refills.stack, "stack"),
                (refills.site[0], "site_read"),
                (refills.site[1], "site_write"),
                (refills.none, "across"),
            ] {
                add(place as u32, 1, &format!("refill.{mode}.{name}"));
            }
        }
        Names(names)
    }
}

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        _: &Instruction,
        _: u32,
        _: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        let holds = |(start, len, _): &&(u64, u64, String)| address.wrapping_sub(*start) < *len;
        let (start, _, name) = self.0.iter().find(holds)?;
        let text = match address - start {
            0 => name.clone(),
            offset => format!("{name}+{offset}"),
        };
        Some(SymbolResult::with_string(address, text))
    }
}

fn lines(code: &[u8], address: u64, bitness: u32, names: Option<Names>, text: &mut String) {
    let names = names.map(|names| Box::new(names) as Box<dyn SymbolResolver>);
    let mut formatter = IntelFormatter::with_options(names, None);
    formatter.options_mut().set_branch_leading_zeros(false);
    let mut line = String::new();
    for instruction in Decoder::with_ip(bitness, code, address, DecoderOptions::NONE) {
        line.clear();
        formatter.format(&instruction, &mut line);
        let _ = writeln!(text, "    {:<8x} {line}", instruction.ip());
    }
}

/// `kernel`, `user`, `user32`, ... and `counted`.
fn mode(words: &str) -> Mode {
    let has = |word| words.split(' ').any(|w| w == word);
    Mode {
        width: match has("32-bit") {
            true => Width::Bits32 { fs: true, gs: true },
            false => Width::Bits64,
        },
        mmu: match has("kernel") {
            true => MmuIndex::Kernel,
            false => MmuIndex::User,
        },
        simd: Simd {
            sse: true,
            avx: true,
        },
        counted: has("counted"),
        smap: true,
        bases: true,
        alone: has("alone"),
    }
}

/// What is made of the bytes `hex`, at offset 0x100 of a page.
fn translation(words: &str, hex: &str) -> String {
    const LINEAR: u64 = 0x40_1100;
    let layout = Layout::fixed();
    let mode = mode(words);
    let code: Vec<u8> = hex
        .split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).expect("two digits"))
        .collect();
    let mut page = [0xcc; 4096];
    page[0x100..][..code.len()].copy_from_slice(&code);
    let source = Source {
        linear: LINEAR,
        page: &page,
        global: mode.is_ring0(),
        mode,
        unroll: words.contains("unrolled"),
        wanderers: &HashSet::new(),
    };
    let mut host = Code::new(BASE, Vec::new());
    let (mut sites, mut entries) = (Vec::new(), 0);
    let translated = Block::new(
        &mut Tools::new(false),
        &layout,
        &source,
        routines(),
        &mut host,
        (&mut sites, &mut entries),
    )
    .translate()
    .expect("code within the page");
    let mut text = String::from("  guest\n");
    lines(
        &code[..translated.len],
        LINEAR,
        mode.bitness(),
        None,
        &mut text,
    );
    let entry = translated.body - BASE;
    let names = || Some(Names::new(&layout));
    text.push_str("  entry by table\n");
    lines(&host.bytes[..entry], BASE as u64, 64, names(), &mut text);
    text.push_str("  body\n");
    lines(
        &host.bytes[entry..],
        translated.body as u64,
        64,
        names(),
        &mut text,
    );
    text
}

/// A file with its translations made anew.
fn renewed(file: &str) -> String {
    let mut text = String::new();
    let mut words = "";
    for line in file.lines() {
        if line.starts_with("  ") || line.is_empty() {
            continue;
        }
        if line.starts_with("== ") {
            text.push('\n');
        }
        let _ = writeln!(text, "{line}");
        if let Some(mode) = line.strip_prefix("mode: ") {
            words = mode;
        }
        if let Some(hex) = line.strip_prefix("code: ") {
            text.push_str(&translation(words, hex));
        }
    }
    text
}

#[test]
fn translations_are_the_reviewed_ones() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("the folder is there")
        .map(|entry| entry.expect("readable").path())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    let mut differing = Vec::new();
    for file in files {
        let old = std::fs::read_to_string(&file).expect("readable");
        let new = renewed(&old);
        if old == new {
            continue;
        }
        if std::env::var_os("LODGER_UPDATE_GOLDEN").is_some() {
            std::fs::write(&file, new).expect("writable");
            continue;
        }
        let line = old.lines().zip(new.lines()).position(|(a, b)| a != b);
        let line = line.unwrap_or(old.lines().count().min(new.lines().count()));
        differing.push(format!(
            "{}:{}: {:?} is now {:?}",
            file.display(),
            line + 1,
            old.lines().nth(line),
            new.lines().nth(line)
        ));
    }
    assert!(
        differing.is_empty(),
        "{}\nLODGER_UPDATE_GOLDEN=1 writes the files anew; read the difference.",
        differing.join("\n")
    );
}
