//! The program by which a guest tells how it has ended: `status N` writes N to port 0xf4, the
//! debug-exit port. A shell cannot do that on a kernel without /dev/port, as Debian's cloud kernel is.
//!
//! It is an ELF file of one segment (System V ABI, x86-64), a few instructions long.

/// Where it is loaded.
const BASE: u64 = 0x40_0000;
const ELF_HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

/// What it does.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x48, 0x8b, 0x74, 0x24, 0x10, // mov rsi, [rsp + 16]: the argument
    0x31, 0xdb,                   // xor ebx, ebx
    0x0f, 0xb6, 0x06,             // 1: movzx eax, byte [rsi]
    0x2c, b'0',                   // sub al, '0'
    0x72, 0x0a,                   // jb 2f
    0x6b, 0xdb, 10,               // imul ebx, ebx, 10
    0x01, 0xc3,                   // add ebx, eax
    0x48, 0xff, 0xc6,             // inc rsi
    0xeb, 0xef,                   // jmp 1b
    0xb8, 173, 0, 0, 0,           // 2: mov eax, 173: ioperm(0xf4, 1, 1)
    0xbf, 0xf4, 0, 0, 0,          // mov edi, 0xf4
    0xbe, 1, 0, 0, 0,             // mov esi, 1
    0x89, 0xf2,                   // mov edx, esi
    0x0f, 0x05,                   // syscall
    0x89, 0xd8,                   // mov eax, ebx
    0xe6, 0xf4,                   // out 0xf4, al
    0xb8, 60, 0, 0, 0,            // mov eax, 60: exit(125), if the machine goes on
    0xbf, 125, 0, 0, 0,           // mov edi, 125
    0x0f, 0x05,                   // syscall
];

/// The file.
pub(crate) fn program() -> Vec<u8> {
    let headers = ELF_HEADER + PROGRAM_HEADER;
    let size = u64::from(headers) + CODE.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&2u16.to_le_bytes()); // e_type: executable
    put(&62u16.to_le_bytes()); // e_machine: x86-64
    put(&1u32.to_le_bytes()); // e_version
    put(&(BASE + u64::from(headers)).to_le_bytes()); // e_entry
    put(&u64::from(ELF_HEADER).to_le_bytes()); // e_phoff
    put(&0u64.to_le_bytes()); // e_shoff
    put(&0u32.to_le_bytes()); // e_flags
    for half in [ELF_HEADER, PROGRAM_HEADER, 1, 0, 0, 0] {
        put(&half.to_le_bytes()); // sizes and numbers of headers
    }
    put(&1u32.to_le_bytes()); // p_type: loaded
    put(&5u32.to_le_bytes()); // p_flags: readable, executable
    for word in [0, BASE, BASE, size, size, 0x1000] {
        put(&word.to_le_bytes()); // offset, addresses, sizes, alignment
    }
    put(CODE);
    file
}
