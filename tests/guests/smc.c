/* Code that changes: by every kind of store, in the same and in other pages, through other addresses, by DMA, by the page tables. SDM
   vol. 3A 8.1.3: a jump between the change and the execution is enough on the same processor, through the same address; a
   serializing instruction is always enough. */
#include "virtio.h"

typedef u32 function(void);

/* mov $value, %eax; ret */
static void write_function(u8 *at, u32 value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static void serialize(void) { cpuid(0, 0); }

static u32 call(const void *at)
{
    function *f = (function *)at;
    return f();
}

static u8 *page;

/* --- kinds of stores, each writing the immediate of the function at `page` --- */

SNIPPETS("store_mov: mov %esi, 1(%rdi); jmp *%rdi\n"
         "store_bytes: mov %sil, 1(%rdi); shr $8, %esi; mov %sil, 2(%rdi); shr $8, %esi; mov %si, 3(%rdi); jmp *%rdi\n"
         "store_xchg: xchg %esi, 1(%rdi); jmp *%rdi\n"
         "store_cmpxchg: mov 1(%rdi), %eax; lock cmpxchg %esi, 1(%rdi); jmp *%rdi\n"
         "store_xadd: mov 1(%rdi), %eax; sub %eax, %esi; lock xadd %esi, 1(%rdi); jmp *%rdi\n"
         "store_add: sub 1(%rdi), %esi; add %esi, 1(%rdi); jmp *%rdi\n"
         "store_movs: push %rdi; push %rsi; mov %rsp, %rsi; inc %rdi; movsl; pop %rsi; pop %rdi; jmp *%rdi\n"
         "store_rep_movs: push %rdi; push %rsi; mov %rsp, %rsi; inc %rdi; mov $4, %ecx; rep movsb; pop %rsi; pop %rdi; jmp *%rdi\n"
         "store_push: mov %rsp, %rax; lea 9(%rdi), %rsp; mov 5(%rdi), %edx; shl $32, %rdx; or %rdx, %rsi; push %rsi; mov %rax, %rsp; jmp *%rdi\n"
         "store_sse: movd %esi, %xmm0; movd %xmm0, 1(%rdi); jmp *%rdi\n"
         "store_sse16: movups (%rdi), %xmm1; movups %xmm1, scratch(%rip); mov %esi, scratch + 1(%rip); movups scratch(%rip), %xmm1;"
         "movups %xmm1, (%rdi); jmp *%rdi\n"
         "store_x87: push %rsi; fildl (%rsp); fistpl 1(%rdi); pop %rsi; jmp *%rdi\n"
         "store_cmpxchg8b: push %rbx; mov (%rdi), %eax; mov 4(%rdi), %edx; mov %eax, %ebx; mov %edx, %ecx; shl $32, %rcx; or %rbx, %rcx;"
         "mov %rcx, scratch(%rip); mov %esi, scratch + 1(%rip); mov scratch(%rip), %ebx; mov scratch + 4(%rip), %ecx; lock cmpxchg8b (%rdi);"
         "pop %rbx; jmp *%rdi\n"
         "store_bts: movl $0, 1(%rdi); mov $31, %ecx; 1: bt %ecx, %esi; jnc 2f; bts %ecx, 1(%rdi); 2: dec %ecx; jns 1b; jmp *%rdi\n"
         "store_next: mov %esi, store_next_target + 1(%rip); store_next_target: mov $0, %eax; ret\n"
         "store_next_byte: mov %sil, store_byte_target + 1(%rip); store_byte_target: mov $0, %al; movzbl %al, %eax; ret\n"
         ".pushsection .bss; .balign 16; scratch: .skip 16; .popsection\n");
extern u8 store_mov[], store_bytes[], store_xchg[], store_cmpxchg[], store_xadd[], store_add[], store_movs[], store_rep_movs[],
    store_push[], store_sse[], store_sse16[], store_x87[], store_cmpxchg8b[], store_bts[], store_next[], store_next_byte[];

static void stores(void)
{
    static const struct {
        const char *name;
        u8 *code;
        u32 mask;
        bool not_when_limited;
    } kinds[] = {
        {"MOV", store_mov, ~0u, 0},
        {"MOV of bytes and words", store_bytes, ~0u, 0},
        {"XCHG", store_xchg, ~0u, 0},
        {"LOCK CMPXCHG", store_cmpxchg, ~0u, 0},
        {"LOCK XADD", store_xadd, ~0u, 0},
        {"ADD", store_add, ~0u, 0},
        {"BTS", store_bts, ~0u, 0},
        {"MOVS", store_movs, ~0u, 0},
        {"REP MOVS", store_rep_movs, ~0u, 0},
        {"PUSH", store_push, ~0u, 0},
        {"MOVD", store_sse, ~0u, 1},
        {"MOVUPS", store_sse16, ~0u, 1},
        {"FISTP", store_x87, ~0u, 1},
        {"LOCK CMPXCHG8B", store_cmpxchg8b, ~0u, 0},
        {"MOV to the next instruction", store_next, ~0u, 0},
        {"MOV to a byte of the next instruction", store_next_byte, 0xff, 0},
    };
    for (u32 k = 0; k < COUNT(kinds); k++) {
        if (kinds[k].not_when_limited && left_out(kinds[k].name))
            continue;
        u32 wrong = 0;
        write_function(page, 0);
        for (u32 i = 1; i < 300; i++) {
            u32 value = i * 0x01234567, got;
            u64 target = (word)page, argument = value;
            asm volatile("call *%3"
                         : "=a"(got), "+D"(target), "+S"(argument)
                         : "r"(kinds[k].code)
                         : "rcx", "rdx", "memory", "cc");
            wrong += (got & kinds[k].mask) != (value & kinds[k].mask);
        }
        check(kinds[k].name, wrong, 0);
    }
}

/* A loop that changes its own body while it runs. */
static void own_loop(void)
{
    extern u8 changing_loop[];
    SNIPPETS("changing_loop: xor %eax, %eax; mov $200, %ecx\n"
             "1: .byte 0x05; changing_imm: .long 0\n" /* add $n, %eax */
             "incl changing_imm(%rip); dec %ecx; jnz 1b; ret\n"
             ".globl changing_imm\n");
    extern u32 changing_imm;
    changing_imm = 1;
    check("a loop that counts in its own instruction", call(changing_loop), 200 * 201 / 2);
    changing_imm = 1;
    check("again", call(changing_loop), 200 * 201 / 2);
}

/* Other instructions in the place of old ones, of other lengths; calls and jumps into the middle. */
static void other_instructions(void)
{
    static const struct {
        u8 len, code[12];
        u32 result;
    } versions[] = {
        {6, {0xb8, 1, 0, 0, 0, 0xc3}, 1},
        {3, {0x31, 0xc0, 0xc3}, 0},
        {8, {0x31, 0xc0, 0xff, 0xc0, 0xff, 0xc0, 0x90, 0xc3}, 2},
        {6, {0x6a, 0x55, 0x58, 0x90, 0x90, 0xc3}, 0x55},
        {8, {0xeb, 2, 0x0f, 0x0b, 0xb0, 7, 0x90, 0xc3}, 7},
    };
    u32 wrong = 0;
    for (u32 i = 0; i < 500; i++) {
        u32 v = (i * 7 + i / 3) % COUNT(versions);
        memcpy(page + 0x100, versions[v].code, versions[v].len);
        u32 got = call(page + 0x100);
        wrong += versions[v].result == 7 ? (got & 0xff) != 7 : got != versions[v].result;
    }
    check("other instructions in the same place", wrong, 0);
    /* Many functions on many pages, made, called, made anew. */
    enum { FUNCTIONS = 500 };
    u8 *many = allocate(FUNCTIONS * 64);
    wrong = 0;
    for (u32 generation = 1; generation < 6; generation++) {
        for (u32 i = 0; i < FUNCTIONS; i++)
            write_function(many + i * 64, generation * 1000 + i);
        for (u32 i = 0; i < FUNCTIONS; i++)
            wrong += call(many + i * 64) != generation * 1000 + i;
    }
    check("many functions, made anew", wrong, 0);
    /* Data beside code. */
    write_function(page + 0x800, 5);
    volatile u64 *data = (u64 *)(page + 0x880);
    wrong = 0;
    for (u32 i = 0; i < 2000; i++) {
        *data = *data + 1;
        wrong += call(page + 0x800) != 5;
    }
    check("data beside code", wrong * 10000 + *data, 2000);
}

/* --- pages --- */

#define ALIAS 0x8000000000ull
static u64 *alias_table;

static void map_alias(u32 index, const void *frame)
{
    alias_table[index] = (word)frame | 3;
    invlpg((void *)(ALIAS + index * PAGE));
}

static void pages(void)
{
    u64 *t = identity_pml4;
    u32 index = 1;
    for (u32 level = 0; level < 3; level++) {
        u64 *next = allocate(PAGE);
        t[index] = (word)next | 3;
        t = next;
        index = 0;
    }
    alias_table = t;
    u8 *two = allocate(2 * PAGE), *other = allocate(PAGE);
    u8 *across = two + PAGE - 3;
    u32 wrong = 0;
    write_function(across, 0);
    for (u32 i = 1; i < 200; i++) {
        /* The immediate lies in both pages: change one part, then the other. */
        across[1] = i;
        wrong += call(across) != ((u32)(i - 1) << 16 | i);
        two[PAGE] = i;
        wrong += call(across) != ((u32)i << 16 | i);
    }
    check("an instruction across two pages", wrong, 0);

    map_alias(0, page);
    map_alias(1, page);
    write_function(page, 1);
    wrong = 0;
    for (u32 i = 1; i < 200; i++) {
        *(volatile u32 *)(ALIAS + 1) = i;
        serialize();
        wrong += call(page) != i;
        wrong += call((void *)(ALIAS + PAGE)) != i;
        *(volatile u32 *)(page + 1) = i + 1000;
        serialize();
        wrong += call((void *)ALIAS) != i + 1000;
        *(volatile u32 *)(ALIAS + 1) = i + 2000;
        serialize();
        wrong += call((void *)(ALIAS + PAGE)) != i + 2000;
    }
    check("code changed through another address", wrong, 0);

    wrong = 0;
    write_function(page, 1);
    write_function(other, 2);
    for (u32 i = 0; i < 200; i++) {
        map_alias(0, i & 1 ? other : page);
        wrong += call((void *)ALIAS) != 1 + (i & 1);
    }
    check("another page at the same address", wrong, 0);

    /* The second page of an instruction across two is replaced. */
    u8 *second[2] = {allocate(PAGE), allocate(PAGE)};
    memcpy(second[0], two + PAGE, 16);
    memcpy(second[1], two + PAGE, 16);
    second[0][0] = 1;
    second[1][0] = 2;
    map_alias(2, two);
    across[1] = 0;
    across[2] = 0;
    wrong = 0;
    for (u32 i = 0; i < 200; i++) {
        map_alias(3, second[i & 1]);
        wrong += call((void *)(ALIAS + 3 * PAGE - 3)) != (1 + (i & 1)) << 16;
    }
    check("the second page of an instruction replaced", wrong, 0);

    /* Freed and used again: data, then code, then data. */
    wrong = 0;
    for (u32 i = 0; i < 100; i++) {
        memset(other, 0xcc, PAGE);
        write_function(other + i * 16, i);
        wrong += call(other + i * 16) != i;
    }
    check("a page filled anew each time", wrong, 0);
}

/* The processor sets the accessed bit of a page-table entry, and that byte is an instruction's immediate. */
static void accessed_bit_in_code(void)
{
    /* PTE 5 of this table: its low byte is flags, the second `ret` (with address bits 14 and 15, G, and a bit for software). */
    u64 *table = allocate(PAGE);
    u8 *frame = allocate_aligned(0x10000, 0x10000) + 0xc000;
    u64 *t = identity_pml4;
    u32 index = 3;
    for (u32 level = 0; level < 2; level++) {
        u64 *next = allocate(PAGE);
        t[index] = (word)next | 3;
        t = next;
        index = 0;
    }
    t[0] = (word)table | 3;
    table[4] = 0xb0ull << 56; /* mov $low byte of the next entry, %al */
    table[5] = (word)frame | 0x303;
    const u8 *code = (u8 *)&table[5] - 1;
    u32 before = call(code) & 0xff;
    *(volatile u8 *)(3ull << 39 | 5 * PAGE);
    serialize();
    u32 read = call(code) & 0xff;
    *(volatile u8 *)(3ull << 39 | 5 * PAGE) = 1;
    serialize();
    u32 written = call(code) & 0xff;
    check("the processor's own writes to page tables change code", before << 16 | read << 8 | written, 0x032363);
}

static void dma(void)
{
    struct virtio v;
    if (!virtio_start(&v, VIRTIO_BLK)) {
        check("virtio-blk: a disk", has_option("disk"), 0);
        return;
    }
    /* Sectors 0 and 1 get functions, which are then read over each other. */
    u32 wrong = 0;
    u8 *sector = page + 0x400;
    for (u32 i = 0; i < 2; i++) {
        write_function(sector, 100 + i);
        wrong += blk_request(&v, BLK_WRITE, i, sector, 512) != 0;
    }
    for (u32 i = 0; i < 50; i++) {
        wrong += blk_request(&v, BLK_READ, i & 1, sector, 512) != 0;
        serialize();
        wrong += call(sector) != 100 + (i & 1);
    }
    check("code that a device writes", wrong, 0);
    v.common[20] = 0;
}

void run(void)
{
    page = allocate(PAGE);
    stores();
    own_loop();
    other_instructions();
    pages();
    accessed_bit_in_code();
    dma();
}
