//! Code that changes: by itself, through another linear address, under other mappings; and the exact counts around it.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::machine::{CODE, DATA, END_OF_PROGRAM, End, KERNEL, LOW_TABLE, Machine, Mode};

const TICKS: u64 = 100_000;
const FUNCTION: u64 = CODE + 0x1000;
/// The page-table entries of the programs' pages.
const ENTRIES: u64 = KERNEL + LOW_TABLE;

/// Runs 64-bit code of ring 0 at [`CODE`]; EAX at its end.
fn run(program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    let mut m = Machine::new(crate::engine(), Mode::Long(0), 1);
    let mut a = CodeAssembler::new(64).expect("64 bits are known");
    program(&mut a).expect("code");
    let code = [a.assemble(CODE).expect("code"), END_OF_PROGRAM.to_vec()].concat();
    m.memory.write(CODE, &code).expect("RAM");
    // MOV EAX, 1; RET.
    m.memory
        .write(FUNCTION, &[0xb8, 1, 0, 0, 0, 0xc3])
        .expect("RAM");
    let start = m.start(0);
    let outcome = m.run(&start, TICKS);
    assert_eq!(outcome.end, End::Done, "{:x?}", outcome.state);
    outcome.state.gpr[0]
}

#[test]
fn a_function_with_two_addresses_changes() {
    // Both addresses of the function have been executed before; then it changes through one of them, and each is called.
    let alias = DATA + 0xe000;
    let addresses = [FUNCTION, alias];
    for changed_through in addresses {
        for order in [[FUNCTION, alias], [alias, FUNCTION]] {
            let results = run(|a| {
                a.mov(rbx, ENTRIES + 8 * (alias >> 12))?;
                a.mov(qword_ptr(rbx), (FUNCTION | 3) as i32)?;
                for address in addresses {
                    a.mov(rcx, address)?;
                    a.call(rcx)?;
                }
                a.mov(rdi, changed_through)?;
                a.mov(byte_ptr(rdi + 1), 7)?;
                a.xor(edx, edx)?;
                for address in order {
                    a.mov(rcx, address)?;
                    a.call(rcx)?;
                    a.shl(edx, 4)?;
                    a.or(edx, eax)?;
                }
                a.mov(eax, edx)
            });
            assert_eq!(
                results, 0x77,
                "through {changed_through:x}, called by {order:x?}"
            );
        }
    }
}

#[test]
fn a_string_instruction_overwrites_what_follows_it() {
    // MOV AL, 1 becomes MOV AL, 9; the count is large enough for the whole-page path.
    let last = run(|a| {
        let (mut target, mut end) = (a.create_label(), a.create_label());
        a.lea(rdi, byte_ptr(target))?;
        a.mov(ecx, 2)?;
        a.mov(eax, 0x09b0)?;
        a.mov(esi, 0)?;
        a.stosw()?;
        a.set_label(&mut target)?;
        a.mov(al, 1)?;
        a.jmp(end)?;
        a.set_label(&mut end)?;
        a.zero_bytes()
    });
    assert_eq!(last & 0xff, 9);
    let count = run(|a| {
        let mut target = a.create_label();
        a.lea(rdi, byte_ptr(target))?;
        a.mov(ecx, 64)?;
        // INC EDX, two bytes each.
        a.mov(eax, 0xc2ff)?;
        a.xor(edx, edx)?;
        a.rep().stosw()?;
        a.set_label(&mut target)?;
        for _ in 0..64 {
            a.dec(edx)?;
        }
        a.mov(eax, edx)
    });
    assert_eq!(count, 64);
}

#[test]
fn a_loop_patches_itself() {
    // The immediate of ADD EAX, imm32 is the loop counter.
    let sum = run(|a| {
        let (mut top, mut add) = (a.create_label(), a.create_label());
        a.lea(rbx, byte_ptr(add))?;
        a.xor(eax, eax)?;
        a.mov(ecx, 1000)?;
        a.set_label(&mut top)?;
        a.mov(dword_ptr(rbx + 2), ecx)?;
        a.set_label(&mut add)?;
        a.add(edx, 0x0123_4567)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.mov(eax, edx)
    });
    assert_eq!(sum, 1000 * 1001 / 2);
}

#[test]
fn a_page_changes_places() {
    // The page of the function is mapped to other memory, with INVLPG, and back by a load of CR3.
    let sum = run(|a| {
        let entry = ENTRIES + 8 * (FUNCTION >> 12);
        a.mov(rbx, FUNCTION)?;
        a.mov(r9, entry)?;
        a.mov(r10, DATA + KERNEL)?;
        // MOV EAX, 0x20; RET at the other place.
        a.mov(rax, 0xc300_0000_20b8_u64)?;
        a.mov(qword_ptr(r10), rax)?;
        a.call(rbx)?;
        a.mov(edx, eax)?;
        a.mov(qword_ptr(r9), (DATA | 3) as i32)?;
        a.invlpg(byte_ptr(rbx))?;
        a.call(rbx)?;
        a.add(edx, eax)?;
        a.mov(qword_ptr(r9), (FUNCTION | 3) as i32)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.call(rbx)?;
        a.add(edx, eax)?;
        a.mov(eax, edx)
    });
    assert_eq!(sum, 0x22);
}

#[test]
fn the_limit_stops_anywhere_in_a_loop() {
    let mut m = Machine::new(crate::engine(), Mode::Long(0), 1);
    // MOV ECX, 1000; INC EAX; ADD [RBX], EAX; LOOP.
    let code = [0xb9, 0xe8, 3, 0, 0, 0xff, 0xc0, 0x01, 0x03, 0xe2, 0xfa];
    m.memory
        .write(CODE, &[&code[..], &END_OF_PROGRAM].concat())
        .expect("RAM");
    let mut start = m.start(0);
    start.gpr[3] = DATA;
    let mut seen = 0;
    for limit in [
        1, 2, 3, 4, 63, 64, 65, 190, 191, 192, 193, 1024, 2999, 3000, 3001,
    ] {
        m.memory.write(DATA, &[0; 8]).expect("RAM");
        let outcome = m.run(&start, limit);
        let (rounds, rest) = ((limit - 1) / 3, (limit - 1) % 3);
        let sum = rounds + u64::from(rest > 0);
        assert_eq!(outcome.ticks, limit);
        if limit <= 3000 {
            assert_eq!(outcome.end, End::TickLimit);
            assert_eq!(outcome.state.gpr[0], sum, "after {limit} instructions");
            assert_eq!(
                outcome.state.rip,
                CODE + [5, 7, 9][rest as usize],
                "after {limit} instructions"
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 14);
}

#[test]
fn a_string_copy_meets_the_end_of_a_page_within_an_element() {
    let (from, to, count) = (DATA + 0xffb, DATA + 0xe100, 4);
    let last = 8 * (count - 1);
    let left = run(|a| {
        a.mov(rsi, from)?;
        a.mov(rdi, to)?;
        // All pages are in the TLB.
        for page in [0, 0x1000] {
            a.mov(byte_ptr(rdi + page), 1)?;
            a.mov(byte_ptr(rsi + page), 1)?;
        }
        a.mov(rax, 0x1122_3344_5566_7788_u64)?;
        for n in 0..count {
            a.mov(qword_ptr(rsi + 8 * n), rax)?;
            a.add(rax, 1)?;
        }
        a.mov(ecx, count)?;
        a.rep().movsq()?;
        a.mov(rax, qword_ptr(to + last as u64))?;
        a.mov(rdx, qword_ptr(from + last as u64))?;
        a.xor(rax, rdx)?;
        a.or(rax, rcx)
    });
    assert_eq!(left, 0);
}
