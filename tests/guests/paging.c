/* 4-level paging: who may do what, error codes and CR2, accessed and dirty bits, reserved bits, the TLB's promises,
   page faults while another exception is delivered. SDM vol. 3A chapter 4, 6.12-6.15. */
#include "guest.h"
#include "chips.h"

#define P 1ull
#define W 2ull
#define U 4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define G 0x100ull
#define NX (1ull << 63)
#define ALL (P | W | U)

/* Error code. */
enum { E_P = 1, E_W = 2, E_U = 4, E_R = 8, E_I = 16 };
enum { READ, WRITE, EXECUTE };

/* One address that is mapped in many ways, and where ring 3 lives: entries 1 and 2 of the top table. */
#define TEST 0x8000000000ull
#define USER 0x10000000000ull
#define USER_STACK (USER + 0x100000)

/* Tables of TEST. */
static u64 *pdpt, *pd, *pt;
/* What TEST maps: 1 GiB of identity-mapped RAM for its size, whose first bytes return. */
static u8 *target;

SNIPPETS("read_it: mov (%rdi), %al; ret\n"
    "write_it: movb $0x5a, 64(%rdi); ret\n"
    "execute_it: jmp *%rdi\n"
    );
USER_SNIPPETS("user_read: mov (%rdi), %al; int $0x80\n"
    "user_write: movb $0x5a, 64(%rdi); int $0x80\n"
    "user_execute: call *%rdi; int $0x80\n");
extern u8 read_it[], write_it[], execute_it[], user_read[], user_write[], user_execute[], user_start[];

static const u8 *const ring0[] = {read_it, write_it, execute_it};
static const u8 *const ring3[] = {user_read, user_write, user_execute};

static word user_address(const void *p) { return USER + ((const u8 *)p - user_start); }

static struct trap access(u32 kind, u32 cpl, word flags_set)
{
    if (cpl == 3)
        return caught_far((struct far_state){
            user_address(ring3[kind]), USER_STACK + 0xff0, USER_CODE_SEL, USER_DATA_SEL, 2, TEST});
    word saved = flags();
    set_flags(saved | flags_set);
    struct trap t = CAUGHT(ring0[kind], TEST);
    set_flags(saved);
    return t;
}

static u64 *table(u64 *parent, u32 index, u64 flags_)
{
    u64 *t = allocate(PAGE);
    parent[index] = (word)t | flags_;
    return t;
}

static void map_user_code(void)
{
    u64 *t = table(identity_pml4, 2, ALL);
    t = table(t, 0, ALL);
    t = table(t, 0, ALL);
    t[0] = (word)user_start | P | U;
    t[0x100] = (word)allocate(PAGE) | ALL;
    set_gate(0x80, 3, 0, 14);
}

/* The size of a leaf by its level: 0 = 4 KiB, 1 = 2 MiB, 2 = 1 GiB. */
static const char *const sizes[] = {"4 KiB", "2 MiB", "1 GiB"};

/* Maps TEST by a leaf of that size; one of the tables above it has `upper`, the others everything. */
static u64 *map_test(u32 size, u64 leaf, u64 upper, u32 upper_level)
{
    u64 entries[4] = {(word)pt | ALL, (word)pt | ALL, (word)pd | ALL, (word)pdpt | ALL};
    u64 *at[4] = {pt, pd, pdpt, identity_pml4 + 1};
    /* A gigabyte at address 0 is as good as any: its first bytes are RAM. */
    u64 base = size == 2 ? 0 : (word)target;
    entries[size] = base | leaf | (size ? PS : 0);
    if (upper_level > size)
        entries[upper_level] = (entries[upper_level] & ~ALL) | upper;
    for (u32 level = 0; level < 4; level++)
        *at[level] = entries[level];
    invlpg((void *)TEST);
    return at[size];
}

struct controls {
    bool wp, nxe, smep, smap, ac;
};

static void set_controls(struct controls c)
{
    write_cr0((read_cr0() & ~(word)CR0_WP) | (c.wp ? CR0_WP : 0));
    write_cr4((read_cr4() & ~(word)(CR4_SMEP | CR4_SMAP)) | (c.smep ? CR4_SMEP : 0) | (c.smap ? CR4_SMAP : 0));
    wrmsr(EFER, (rdmsr(EFER) & ~(u64)EFER_NXE) | (c.nxe ? EFER_NXE : 0));
}

/* A set reserved bit; QEMU 7.2 forgets that the page is present. */
static u32 reserved_bit(void) { return under_tcg() ? E_R : E_P | E_R; }

/* The error code that the manual asks for, or NO_TRAP. */
static u32 expected(struct controls c, u64 leaf, u64 upper, u32 kind, u32 cpl)
{
    u64 both = leaf & upper;
    bool nx = (leaf | upper) & NX;
    u32 error = (kind == WRITE ? E_W : 0) | (cpl == 3 ? E_U : 0) |
                (kind == EXECUTE && (c.nxe || c.smep) ? E_I : 0);
    if (!(upper & P))
        return error;
    if ((upper & NX) && !c.nxe)
        return error | reserved_bit();
    if (!(leaf & P))
        return error;
    if ((leaf & NX) && !c.nxe)
        return error | reserved_bit();
    bool refused = kind == EXECUTE && nx;
    if (cpl == 3)
        refused |= !(both & U) || (kind == WRITE && !(both & W));
    else {
        refused |= kind == WRITE && !(both & W) && c.wp;
        if (both & U)
            refused |= kind == EXECUTE ? c.smep : c.smap && !c.ac;
    }
    return refused ? error | E_P : NO_TRAP;
}

/* The first mismatch is told in full. */
static u32 wrong;

static void try(struct controls c, u32 size, u64 leaf, u64 upper, u32 upper_level, u32 kind, u32 cpl)
{
    u64 *entry = map_test(size, leaf, upper, upper_level);
    u64 before = *entry;
    struct trap t = access(kind, cpl, c.ac && cpl == 0 ? AC_FLAG : 0);
    u32 want = expected(c, leaf, upper_level > size ? upper : ALL, kind, cpl);
    u32 got = t.vector == PF ? t.error : t.vector == (cpl == 3 ? 0x80 : NO_TRAP) ? NO_TRAP : 0x100 + t.vector;
    /* A walk that ends in a fault may or may not set A. */
    u64 want_entry = want == NO_TRAP ? before | A | (kind == WRITE ? D : 0) : before | (*entry & A);
    bool accessed = true;
    if (want == NO_TRAP) {
        u64 *above[4] = {pt, pd, pdpt, identity_pml4 + 1};
        for (u32 level = size + 1; level < 4; level++)
            accessed &= (*above[level] & (A | D)) == A;
    } else if (t.vector == PF && t.cr2 != TEST + (kind == WRITE ? 64 : 0)) {
        got = 0x1000;
    }
    if ((got != want || *entry != want_entry || !accessed) && !wrong++)
        say("%s: wp %u nxe %u smep %u smap %u ac %u, leaf %x, level %u %x, access %u of ring %u: error %x, want %x; "
            "entry %x, want %x; above accessed %u\n",
            sizes[size], (u64)c.wp, (u64)c.nxe, (u64)c.smep, (u64)c.smap, (u64)c.ac, leaf, (u64)upper_level, upper,
            (u64)kind, (u64)cpl, (u64)got, (u64)want, *entry, want_entry, (u64)accessed);
}

/* Leaf rights x rights of one table above x size x access x ring, under some control bits. */
static void try_all(struct controls c)
{
    for (u32 size = 0; size < 3; size++)
        for (u32 i = 0; i < 16; i++)
            for (u32 j = 0; j < 16; j++) {
                u64 leaf = (i & 7) | (i & 8 ? NX : 0), upper = (j & 7) | (j & 8 ? NX : 0);
                /* Without a table above, the leaf alone; absent tables only beneath a usable leaf. */
                u32 upper_level = upper == ALL ? 0 : size + 1 + (i + j) % (3 - size);
                if (!(upper & P) && (leaf != ALL || upper & ~W))
                    continue;
                /* Bit 63 of the top table's entries is an XD bit as well. */
                for (u32 kind = READ; kind <= EXECUTE; kind++)
                    for (u32 cpl = 0; cpl <= 3; cpl += 3)
                        try(c, size, leaf, upper, upper_level, kind, cpl);
            }
}

static void rights(void)
{
    static const struct {
        const char *name;
        struct controls c;
    } cases[] = {
        {"rights: no protection of supervisor", {0, 0, 0, 0, 0}},
        {"rights: WP", {1, 0, 0, 0, 0}},
        {"rights: NXE", {0, 1, 0, 0, 0}},
        {"rights: WP and NXE", {1, 1, 0, 0, 0}},
        {"rights: SMEP without NXE", {1, 0, 1, 0, 0}},
        {"rights: SMEP and NXE", {1, 1, 1, 0, 0}},
        {"rights: SMAP", {1, 1, 0, 1, 0}},
        {"rights: SMAP with AC", {1, 1, 0, 1, 1}},
        {"rights: SMAP without WP", {0, 1, 0, 1, 0}},
        {"rights: SMAP with AC without WP", {0, 1, 0, 1, 1}},
        {"rights: SMEP, SMAP", {1, 1, 1, 1, 0}},
        {"rights: AC without SMAP", {1, 1, 0, 0, 1}},
    };
    for (u32 i = 0; i < COUNT(cases); i++) {
        wrong = 0;
        set_controls(cases[i].c);
        try_all(cases[i].c);
        set_controls((struct controls){1, 1, 0, 0, 0});
        check(cases[i].name, wrong, 0);
    }
}

static void stac_clac(void)
{
    map_test(0, P | W | U, ALL, 0);
    set_controls((struct controls){1, 1, 0, 1, 0});
    asm volatile("stac");
    check_true("STAC sets AC", flags() & AC_FLAG);
    struct trap t = CAUGHT(read_it, TEST);
    asm volatile("clac");
    check("a user page may be read after STAC", t.vector, NO_TRAP);
    check_true("CLAC clears AC", !(flags() & AC_FLAG));
    check_trap("and not after CLAC", CAUGHT(read_it, TEST), PF, E_P, read_it);
    /* Loads of descriptors are supervisor accesses that AC does not allow. The table begins in a page of the supervisor. */
    u8 *pages = allocate(PAGE * 2);
    memcpy(pages + PAGE - FREE_SEL, gdt, FREE_SEL);
    memcpy(pages + PAGE, &gdt[DATA_SEL / 8], 8);
    pt[0] = (word)pages | P | W;
    pt[1] = (word)(pages + PAGE) | ALL;
    invlpg((void *)TEST);
    struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } there = {FREE_SEL + 7, TEST + PAGE - FREE_SEL}, here;
    extern u8 load_segment[], load_segment_at[];
    SNIPPETS("load_segment: mov %edi, %eax; load_segment_at: mov %eax, %es; ret\n");
    asm volatile("sgdt %0; lgdt %1; stac" : "=m"(here) : "m"(there));
    t = CAUGHT(load_segment, FREE_SEL);
    asm volatile("clac; lgdt %0" ::"m"(here));
    /* QEMU lets AC allow it. */
    if (!under_tcg()) {
        check_trap("a descriptor in a user page", t, PF, E_P, load_segment_at);
        check("its address", t.cr2, TEST + PAGE);
    }
    set_controls((struct controls){1, 1, 0, 0, 0});
    *(u8 *)target = 0xc3;
}

static void reserved_bits(void)
{
    /* Bits beyond the physical addresses of this processor. */
    u32 width = cpuid(0x80000008, 0).a & 0xff;
    u64 beyond = width < 52 ? 1ull << 51 : 0;
    static const struct {
        const char *name;
        u32 level;
        u64 bits;
    } cases[] = {
        {"reserved: PS in the top table", 3, PS},
        {"reserved: bit 13 of a 1 GiB page", 2, PS | 1 << 13},
        {"reserved: bit 29 of a 1 GiB page", 2, PS | 1 << 29},
        {"reserved: bit 13 of a 2 MiB page", 1, PS | 1 << 13},
        {"reserved: bit 20 of a 2 MiB page", 1, PS | 1 << 20},
    };
    for (u32 i = 0; i < COUNT(cases); i++) {
        u64 *at[4] = {pt, pd, pdpt, identity_pml4 + 1};
        map_test(0, ALL, ALL, 0);
        u64 *entry = at[cases[i].level];
        u64 base = cases[i].bits & PS && cases[i].level < 3 ? 0 : *entry & ~0xfffull;
        *entry = base | ALL | cases[i].bits;
        invlpg((void *)TEST);
        check_trap(cases[i].name, CAUGHT(read_it, TEST), PF, reserved_bit(), read_it);
        check_trap_quietly(cases[i].name, CAUGHT(write_it, TEST), PF, reserved_bit() | E_W, write_it);
        struct trap t = access(READ, 3, 0);
        check_trap_quietly(cases[i].name, t, PF, reserved_bit() | E_U, NULL);
        *entry &= ~P;
        invlpg((void *)TEST);
        check_trap_quietly("an absent entry's bits do not matter", CAUGHT(read_it, TEST), PF, 0, read_it);
    }
    for (u32 level = 0; level < 4; level++) {
        u64 *at[4] = {pt, pd, pdpt, identity_pml4 + 1};
        map_test(0, ALL, ALL, 0);
        *at[level] |= beyond;
        invlpg((void *)TEST);
        check_trap_quietly("reserved: addresses too wide", CAUGHT(read_it, TEST), PF, beyond ? reserved_bit() : 0,
                           beyond ? read_it : NULL);
    }
    say("reserved: %u bits of physical address\n", (u64)width);
    /* Bits that software may use. */
    map_test(0, ALL | 0xe00 | 0x7full << 52, ALL, 0);
    check("available bits do not matter", CAUGHT(read_it, TEST).vector, NO_TRAP);
    map_test(1, ALL | 1 << 12, ALL, 0);
    check("PAT of a 2 MiB page is not reserved", CAUGHT(read_it, TEST).vector, NO_TRAP);
}

static u8 peek(u64 address) { return *(volatile u8 *)address; }

static void tlb(void)
{
    u8 *one = allocate(PAGE), *two = allocate(PAGE);
    *one = 1;
    *two = 2;
    u64 *leaf = map_test(0, ALL, ALL, 0);
#define MAP(page, bits)                                                                           \
    do {                                                                                          \
        *leaf = (word)(page) | (bits);                                                            \
        barrier();                                                                                \
    } while (0)
    MAP(one, ALL);
    invlpg((void *)TEST);
    check_quietly("first page", peek(TEST), 1);
    MAP(two, ALL);
    invlpg((void *)(TEST + 0xabc));
    check("INVLPG of any address in the page", peek(TEST), 2);
    MAP(one, ALL);
    write_cr3(read_cr3());
    check("a load of CR3", peek(TEST), 1);
    write_cr4(read_cr4() | CR4_PGE);
    MAP(two, ALL | G);
    invlpg((void *)TEST);
    check_quietly("second page", peek(TEST), 2);
    MAP(one, ALL | G);
    invlpg((void *)TEST);
    check("INVLPG of a global page", peek(TEST), 1);
    MAP(two, ALL);
    write_cr4(read_cr4() & ~(word)CR4_PGE);
    check("a change of CR4.PGE flushes global pages", peek(TEST), 2);
    MAP(0, 0);
    write_cr3(read_cr3());
    check_trap("an absent page", CAUGHT(read_it, TEST), PF, 0, read_it);
    MAP(one, ALL);
    check("absence is not cached", CAUGHT(read_it, TEST).vector, NO_TRAP);
    /* Rights gained without a flush: at most one more fault. */
    MAP(one, P | U);
    invlpg((void *)TEST);
    peek(TEST);
    check_trap("a write to a read-only page", CAUGHT(write_it, TEST), PF, E_P | E_W, write_it);
    MAP(one, ALL);
    CAUGHT(write_it, TEST);
    check("a right gained is there after one fault at most", CAUGHT(write_it, TEST).vector, NO_TRAP);
    *one = 0xc3;
    MAP(one, ALL | NX);
    invlpg((void *)TEST);
    check_trap("execution of data", CAUGHT(execute_it, TEST), PF, E_P | E_I, (void *)TEST);
    MAP(one, ALL);
    CAUGHT(execute_it, TEST);
    check("and when it has become code", CAUGHT(execute_it, TEST).vector, NO_TRAP);
    /* Dirty after it was read only. */
    MAP(one, ALL);
    invlpg((void *)TEST);
    peek(TEST);
    check("a read sets A alone", *leaf & (A | D), A);
    *(volatile u8 *)TEST = 0xc3;
    check("a write through a TLB entry made by a read sets D", *leaf & (A | D), A | D);
    /* A read-modify-write that does not change anything writes. */
    MAP(one, ALL);
    invlpg((void *)TEST);
    u8 old = 0, new = 9;
    asm volatile("lock cmpxchgb %2, (%1)" : "+a"(old) : "r"(TEST), "r"(new) : "memory");
    check("CMPXCHG that fails writes all the same", *leaf & D, D);
    MAP(one, P | U);
    invlpg((void *)TEST);
    extern u8 bit_test[], bit_test_set[];
    SNIPPETS("bit_test: btl $3, (%rdi); ret\n"
             "bit_test_set: btsl $0, (%rdi); ret\n");
    check("BT reads", CAUGHT(bit_test, TEST).vector, NO_TRAP);
    check_trap("BTS of a bit that is set writes", CAUGHT(bit_test_set, TEST), PF, E_P | E_W, bit_test_set);
    /* A table replaced by a large page, and back. */
    MAP(one, ALL);
    invlpg((void *)TEST);
    *one = 1;
    check_quietly("small page", peek(TEST), 1);
    u8 *large = allocate_aligned(0x200000, 0x200000);
    large[0] = 7;
    large[0x3000] = 8;
    *pd = (word)large | ALL | PS;
    write_cr3(read_cr3());
    check("a large page in the place of a table", peek(TEST) << 8 | peek(TEST + 0x3000), 0x708);
    *pd = (word)pt | ALL;
    invlpg((void *)(TEST + 0x3000));
    invlpg((void *)TEST);
    check("and the table again", peek(TEST), 1);
    /* Another top table, with the same lower half but for TEST. */
    u64 *top = allocate(PAGE);
    memcpy(top, identity_pml4, PAGE);
    u64 *t = table(table(table(top, 1, ALL), 0, ALL), 0, ALL);
    t[0] = (word)two | ALL;
    write_cr3((word)top);
    u8 there = peek(TEST);
    write_cr3((word)identity_pml4);
    check("each address space has its own", there << 8 | peek(TEST), 0x201);
    /* A table that maps itself: its entries can be read and written there. */
    identity_pml4[510] = (word)identity_pml4 | P | W;
    u64 self = 0xffffff7fbfdfe000;
    check("a recursive mapping", *(volatile u64 *)(self + 510 * 8) & ~(A | D), (word)identity_pml4 | P | W);
    identity_pml4[510] = 0;
    write_cr3(read_cr3());
    MAP(target, ALL);
    invlpg((void *)TEST);
}

/* Accesses across two pages of which the second is absent or read-only. */
static void crossing(void)
{
    u8 *two = allocate(PAGE * 2);
    pt[1] = 0;
    u64 *leaf = map_test(0, ALL, ALL, 0);
    *leaf = (word)two | ALL;
    invlpg((void *)TEST);
    extern u8 read8[], write8[], xchg8[], push8[], push8_at[], rep_movs[], fxsave_at[];
    SNIPPETS("read8: mov (%rdi), %rax; ret\n"
        "write8: mov %rdi, (%rdi); ret\n"
        "xchg8: xchg %rax, (%rdi); ret\n"
        "push8: mov %rsp, %rax; mov %rdi, %rsp; push8_at: push %rdi; mov %rax, %rsp; ret\n"
        "fxsave_at: fxsave (%rdi); ret\n"
        "rep_movs: lea user_start(%rip), %rsi; mov $16, %ecx; rep movsb; ret\n");
    u64 end = TEST + PAGE;
    struct trap t = CAUGHT(read8, end - 3);
    check_trap("a read across into an absent page", t, PF, 0, read8);
    check("CR2 is the start of the second page", t.cr2, end);
    memset(two + PAGE - 8, 0x11, 8);
    t = CAUGHT(write8, end - 3);
    check_trap("a write across", t, PF, E_W, write8);
    check("CR2", t.cr2, end);
    bool partial = left_out("writes across pages may stop in the middle");
    if (!partial)
        check("nothing is written to the first page", *(u64 *)(two + PAGE - 8), 0x1111111111111111);
    pt[1] = (word)(two + PAGE) | P | U;
    invlpg((void *)end);
    t = CAUGHT(xchg8, end - 5);
    check_trap("an exchange across into a read-only page", t, PF, E_P | E_W, xchg8);
    check("CR2", t.cr2, end);
    if (!partial)
        check("nothing is written", *(u64 *)(two + PAGE - 8), 0x1111111111111111);
    pt[1] = 0;
    invlpg((void *)end);
    t = CAUGHT(push8, end + 8);
    check_trap("PUSH to an absent page", t, PF, E_W, push8_at);
    check("RSP is as before", t.sp, end + 8);
    check("CR2", t.cr2, end);
    t = CAUGHT(fxsave_at, end - 32);
    check_trap("FXSAVE across", t, PF, E_W, fxsave_at);
    check("CR2", t.cr2, end);
    /* A repeated instruction stops in the middle, with its registers there. */
    t = CAUGHT(rep_movs, end - 5);
    check("REP MOVSB into an absent page: #PF", t.vector, PF);
    check("CR2", t.cr2, end);
    check("five bytes are copied", memcmp(two + PAGE - 5, user_start, 5), 0);
    /* An instruction across, of which the second part is absent. */
    static const u8 code[] = {0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0xc3};
    memcpy(two + PAGE - 4, code, sizeof code);
    *leaf = (word)two | ALL;
    t = CAUGHT(execute_it, end - 4);
    check_trap("an instruction across into an absent page", t, PF, E_I, (void *)(end - 4));
    check("CR2", t.cr2, end);
    pt[1] = (word)(two + PAGE) | ALL | NX;
    check_trap("into a page that is not code", CAUGHT(execute_it, end - 4), PF, E_P | E_I, (void *)(end - 4));
    pt[1] = (word)(two + PAGE) | ALL;
    invlpg((void *)end);
    t = CAUGHT(execute_it, end - 4);
    check("an instruction across two pages", t.value, 0x0807060504030201);
    /* The two pages need not follow each other in memory. */
    u8 *other = allocate(PAGE);
    memcpy(other, two + PAGE, sizeof code);
    other[0] = 0x33;
    pt[1] = (word)other | ALL;
    invlpg((void *)end);
    check("the second page replaced", CAUGHT(execute_it, end - 4).value, 0x0807060504330201);
    check("data across scattered pages", *(volatile u64 *)(end - 4), 0x060504330201b848);
}

static void addresses(void)
{
    extern u8 read_rbp[], read_rbp_at[];
    SNIPPETS("read_rbp: push %rbp; mov %rdi, %rbp; read_rbp_at: mov (%rbp), %rax; pop %rbp; ret\n");
    check_trap("a non-canonical address", CAUGHT(read_it, 1ull << 47), GP, 0, read_it);
    /* QEMU does not tell the stack's accesses apart. */
    check_trap("on the stack", CAUGHT(read_rbp, 1ull << 47), under_tcg() ? GP : SS, 0, read_rbp_at);
    check_trap("just below the upper half", CAUGHT(read_it, 0xffff7fffffffffff), GP, 0, read_it);
    struct trap t = CAUGHT(read_it, 0xffff800000000000);
    check_trap("the upper half is canonical", t, PF, 0, read_it);
    check("CR2 has all 64 bits", t.cr2, 0xffff800000000000);
    t = CAUGHT(execute_it, 1ull << 47);
    /* QEMU jumps first and faults there. */
    check_trap("a jump to a non-canonical address", t, GP, 0, under_tcg() ? NULL : execute_it);
    extern u8 load_cr3[];
    SNIPPETS("load_cr3: mov %rdi, %cr3; ret\n");
    /* QEMU takes them, and hangs. */
    if (!under_tcg())
        check_trap("reserved bits of CR3", CAUGHT(load_cr3, read_cr3() | 1ull << 60), GP, 0, load_cr3);
    /* The last page below the hole, through which an access would run into it. */
    u64 *t3 = table(table(table(identity_pml4, 255, ALL), 511, ALL), 511, ALL);
    t3[511] = (word)target | ALL;
    extern u8 read8[];
    if (!left_out("the canonical end of an access"))
        check_trap("an access that runs out of the lower half", CAUGHT(read8, (1ull << 47) - 4), GP, 0, read8);
    identity_pml4[255] = 0;
    write_cr3(read_cr3());
}

static u8 spare_stack[4096] __attribute__((aligned(16)));

/* The error code for a gate: its index, and that it is in the IDT. QEMU takes the gate's size of 16 into account. */
static u32 absent_gate(u32 vector) { return (under_tcg() ? vector * 16 : vector * 8) | 2; }

/* Page faults during the delivery of other exceptions: their stacks are absent. */
static void nested(void)
{
    extern u8 breakpoint[], invalid[], invalid_at[], divide[], divide_at[];
    SNIPPETS("breakpoint: int3; ret\n"
        "invalid: invalid_at: ud2; ret\n"
        "divide: xor %ecx, %ecx; divide_at: div %ecx; ret\n");
    u64 absent = TEST + 0x10000;
    tss.ist[0] = (word)spare_stack + sizeof spare_stack;
    tss.ist[1] = absent + 0x1000;
    set_gate(DF, 0, 1, 14);
    struct trap t;
    /* Benign, then a page fault: the page fault. */
    set_gate(UD, 0, 2, 14);
    t = CAUGHT(invalid, 0);
    check_trap("#UD with an absent stack is a page fault", t, PF, E_W, invalid_at);
    check("CR2 is in that stack", t.cr2 & ~0xfffull, absent);
    set_gate(UD, 0, 0, 14);
    /* Contributory, then a page fault: the page fault. */
    set_gate(GP, 0, 2, 14);
    t = CAUGHT(read_it, 1ull << 47);
    check_trap("#GP with an absent stack is a page fault", t, PF, E_W, read_it);
    set_gate(GP, 0, 0, 14);
    /* Page fault, page fault: double. */
    set_gate(PF, 0, 2, 14);
    t = CAUGHT(read_it, TEST + 0x5000);
    check_trap("a page fault with an absent stack is a double fault", t, DF, 0, read_it);
    check("it has its own stack", t.sp != 0, 1);
    t = CAUGHT(invalid, 0);
    check_trap("and #UD, whose stack is there, is not", t, UD, 0, invalid_at);
    /* Page fault, contributory: double. */
    set_gate(PF, 0, 0, 14);
    gate(PF)[0] &= ~(0x80ull << 40);
    t = CAUGHT(read_it, TEST + 0x5000);
    check_trap("a page fault with an absent gate is a double fault", t, DF, 0, read_it);
    set_gate(PF, 0, 0, 14);
    /* Contributory, contributory: double. */
    gate(DE)[0] &= ~(0x80ull << 40);
    check_trap("#DE with an absent gate is a double fault", CAUGHT(divide, 0), DF, 0, divide_at);
    set_gate(DE, 0, 0, 14);
    /* Benign, contributory: the latter. An exception is an external event in its error code (not so in QEMU's). */
    gate(UD)[0] &= ~(0x80ull << 40);
    check_trap("#UD with an absent gate is #NP", CAUGHT(invalid, 0), NP, absent_gate(UD) | !under_tcg(), invalid_at);
    set_gate(UD, 0, 0, 14);
    /* A software interrupt is not external: EXT is clear, RIP is that of the instruction. */
    gate(BP)[0] &= ~(0x80ull << 40);
    check_trap("INT3 with an absent gate", CAUGHT(breakpoint, 0), NP, absent_gate(BP), breakpoint);
    set_gate(BP, 0, 0, 14);
    tss.ist[1] = 0x0000900000000000;
    set_gate(BP, 0, 2, 14);
    check_trap("INT3 with a non-canonical stack", CAUGHT(breakpoint, 0), SS, 0, breakpoint);
    set_gate(BP, 0, 0, 14);
    check_trap("INT3 as ever", CAUGHT(breakpoint, 0), BP, 0, breakpoint + 1);
    set_gate(DF, 0, 0, 14);
}

void run(void)
{
    pdpt = allocate(PAGE);
    pd = allocate(PAGE);
    pt = allocate(PAGE);
    /* The first byte of RAM is what a page of 1 GiB at 0 begins with. */
    target = allocate_aligned(0x200000, 0x200000);
    *target = 0xc3;
    asm volatile("movb $0xc3, 0" ::: "memory");
    map_user_code();
    if (!left_out("rights: accesses to read-only pages end in #UD"))
        rights();
    if (!left_out("STAC and CLAC"))
        stac_clac();
    reserved_bits();
    tlb();
    crossing();
    addresses();
    if (!left_out("exceptions while another is delivered: all are double faults"))
        nested();
}
