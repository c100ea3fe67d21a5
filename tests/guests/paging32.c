/* The 32-bit paging modes: two levels with 4 MiB pages (PSE), and PAE with 2 MiB pages, page-directory pointers and NX. Who may do
   what, error codes and CR2, accessed and dirty bits, reserved bits, the TLB's promises. SDM vol. 3A chapter 4. */
#include "guest.h"

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

/* One address that is mapped in many ways, and where ring 3 lives. The rest of the 4 GiB is mapped to itself for ring 0. */
#define TEST 0x80000000u
#define USER 0x90000000u
#define USER_STACK (USER + 0x100000)

/* The mode, and its name for the checks. */
static bool pae;
static const char *mode;
/* All page directories in a row, and what CR3 points to. */
static void *directory;
static u64 *pointers;
/* The page table of TEST, and the large page that TEST maps, which begins with RET. */
static void *pt;
static u8 *target;

/* In a ring 0 snippet the argument is in EDX, in one of ring 3 in EAX. */
SNIPPETS("read_it: mov (%edx), %al; ret\n"
         "write_it: movb $0x5a, 64(%edx); ret\n"
         "execute_it: jmp *%edx\n"
         "load_cr3: mov %edx, %cr3; ret\n"
         "load_cr4: mov %edx, %cr4; ret\n"
         "load_cr0: mov %edx, %cr0; ret\n");
USER_SNIPPETS("user_read: mov (%eax), %al; int $0x80\n"
              "user_write: movb $0x5a, 64(%eax); int $0x80\n"
              "user_execute: call *%eax; int $0x80\n"
              "user_load: mov %eax, %es; int $0x80\n");
extern u8 read_it[], write_it[], execute_it[], load_cr3[], load_cr4[], load_cr0[];
extern u8 user_start[], user_read[], user_write[], user_execute[], user_load[];

static const u8 *const ring0[] = {read_it, write_it, execute_it};
static const u8 *const ring3[] = {user_read, user_write, user_execute};

static word user_address(const u8 *p) { return USER + (p - user_start); }

static struct trap in_ring3(const u8 *code, word argument)
{
    return caught_far(
        (struct far_state){user_address(code), USER_STACK + 0xff0, USER_CODE_SEL, USER_DATA_SEL, 2, argument});
}

/* A check's name with the mode's before it. */
static const char *in_mode(const char *name)
{
    static char text[128];
    u32 len = 0;
    for (const char *s = mode; *s; s++)
        text[len++] = *s;
    for (const char *s = name; *s && len < sizeof text - 1; s++)
        text[len++] = *s;
    text[len] = 0;
    return text;
}

/* --- tables --- */

static void *entry_of(void *table, u32 index) { return (u8 *)table + index * (pae ? 8 : 4); }
static u64 get(const void *entry) { return pae ? *(volatile u64 *)entry : *(volatile u32 *)entry; }
static void set(void *entry, u64 value)
{
    if (pae)
        *(volatile u64 *)entry = value;
    else
        *(volatile u32 *)entry = value;
}

static u32 large_shift(void) { return pae ? 21 : 22; }
static void *pde(u32 address) { return entry_of(directory, address >> large_shift()); }

static void make_tables(void)
{
    directory = allocate(PAGE * 4);
    pt = allocate(PAGE);
    for (u32 i = 0; i < 1u << (32 - large_shift()); i++)
        set(entry_of(directory, i), (u64)i << large_shift() | P | W | PS);
    set(pde(TEST), (word)pt | ALL);
    void *user = allocate(PAGE);
    set(pde(USER), (word)user | ALL);
    set(entry_of(user, 0), (word)user_start | P | U);
    set(entry_of(user, 0x100), (word)allocate(PAGE) | ALL);
    /* In PAE mode CR3 has 27 bits. */
    pointers = (u64 *)((u8 *)allocate(PAGE) + 0x20);
    for (u32 i = 0; i < 4; i++)
        pointers[i] = ((word)directory + i * PAGE) | P;
}

static void enter(void)
{
    make_tables();
    write_cr4((read_cr4() & ~(word)(CR4_PAE | CR4_PSE)) | (pae ? CR4_PAE : CR4_PSE));
    write_cr3(pae ? (word)pointers : (word)directory);
    write_cr0(read_cr0() | CR0_PG);
}

static void leave(void) { write_cr0(read_cr0() & ~CR0_PG); }

static void flush(void) { write_cr3(read_cr3()); }

/* Maps TEST by a small or a large page, the directory's entry with the rights `upper`. Returns the leaf. */
static void *map_test(bool large, u64 leaf, u64 upper)
{
    if (large)
        set(pde(TEST), (word)target | leaf | PS);
    else {
        set(entry_of(pt, 0), (word)target | leaf);
        set(pde(TEST), (word)pt | upper);
    }
    invlpg((void *)TEST);
    return large ? pde(TEST) : entry_of(pt, 0);
}

/* --- rights --- */

struct controls {
    bool wp, nxe, smep, smap, ac;
};

static void set_controls(struct controls c)
{
    write_cr0((read_cr0() & ~(word)CR0_WP) | (c.wp ? CR0_WP : 0));
    write_cr4((read_cr4() & ~(word)(CR4_SMEP | CR4_SMAP)) | (c.smep ? CR4_SMEP : 0) | (c.smap ? CR4_SMAP : 0));
    wrmsr(EFER, (rdmsr(EFER) & ~(u64)EFER_NXE) | (c.nxe ? EFER_NXE : 0));
}

static const struct controls usual = {1, 1, 0, 0, 0};

/* A set reserved bit; QEMU 7.2 forgets that the page is present. */
static u32 reserved_bit(void) { return under_tcg() ? E_R : E_P | E_R; }

/* The error code that the manual asks for, or NO_TRAP. */
static u32 expected(struct controls c, u64 leaf, u64 upper, u32 kind, u32 cpl)
{
    u64 both = leaf & upper;
    u32 error = (kind == WRITE ? E_W : 0) | (cpl == 3 ? E_U : 0) |
                (kind == EXECUTE && ((pae && c.nxe) || c.smep) ? E_I : 0);
    if (!(upper & P))
        return error;
    if ((upper & NX) && !c.nxe)
        return error | reserved_bit();
    if (!(leaf & P))
        return error;
    if ((leaf & NX) && !c.nxe)
        return error | reserved_bit();
    bool refused = kind == EXECUTE && ((leaf | upper) & NX);
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

static void try(struct controls c, bool large, u64 leaf, u64 upper, u32 kind, u32 cpl)
{
    void *entry = map_test(large, leaf, upper);
    u64 before = get(entry);
    struct trap t;
    if (cpl == 3)
        t = in_ring3(ring3[kind], TEST);
    else {
        word saved = flags();
        set_flags(saved | (c.ac ? AC_FLAG : 0));
        t = CAUGHT(ring0[kind], TEST);
        set_flags(saved);
    }
    u32 want = expected(c, leaf, large ? ALL : upper, kind, cpl);
    u32 got = t.vector == PF ? t.error : t.vector == (cpl == 3 ? 0x80 : NO_TRAP) ? NO_TRAP : 0x100 + t.vector;
    /* A walk that ends in a fault may or may not set A. */
    u64 after = get(entry);
    u64 want_entry = want == NO_TRAP ? before | A | (kind == WRITE ? D : 0) : before | (after & A);
    bool accessed = large || want != NO_TRAP || (get(pde(TEST)) & (A | D)) == A;
    if (t.vector == PF && t.cr2 != TEST + (kind == WRITE ? 64 : 0))
        got = 0x1000;
    if ((got != want || after != want_entry || !accessed) && !wrong++)
        say("%s: large %u, wp %u nxe %u smep %u smap %u ac %u, leaf %x, directory %x, access %u of ring %u: error %x, want %x; "
            "entry %x, want %x; directory accessed %u\n",
            mode, (u64)large, (u64)c.wp, (u64)c.nxe, (u64)c.smep, (u64)c.smap, (u64)c.ac, leaf, upper, (u64)kind, (u64)cpl,
            (u64)got, (u64)want, after, want_entry, (u64)accessed);
}

/* Rights of the leaf and of the directory's entry x size x access x ring, under some control bits. */
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
    };
    u32 combinations = pae ? 16 : 8;
    for (u32 n = 0; n < COUNT(cases); n++) {
        wrong = 0;
        set_controls(cases[n].c);
        for (u32 i = 0; i < combinations; i++)
            for (u32 j = 0; j <= combinations; j++) {
                /* The last round is that of large pages, which nothing is above. */
                bool large = j == combinations;
                u64 leaf = (i & 7) | (i & 8 ? NX : 0), upper = large ? ALL : (j & 7) | (j & 8 ? NX : 0);
                for (u32 kind = READ; kind <= EXECUTE; kind++)
                    for (u32 cpl = 0; cpl <= 3; cpl += 3)
                        try(cases[n].c, large, leaf, upper, kind, cpl);
            }
        set_controls(usual);
        check(in_mode(cases[n].name), wrong, 0);
    }
    map_test(false, ALL, ALL);
}

/* --- reserved and ignored bits --- */

/* A read of TEST under an entry with these bits: reserved by the mode, or not there at all and no matter. */
static void check_reserved(const char *name, bool large, u64 leaf, u64 upper)
{
    void *entry = map_test(large, leaf, upper);
    check_trap(in_mode(name), CAUGHT(read_it, TEST), PF, reserved_bit(), read_it);
    check_trap_quietly(name, CAUGHT(write_it, TEST), PF, reserved_bit() | E_W, write_it);
    check_trap_quietly(name, in_ring3(user_read, TEST), PF, reserved_bit() | E_U, (void *)user_address(user_read));
    set(entry, get(entry) & ~P);
    if (upper != ALL)
        set(pde(TEST), get(pde(TEST)) & ~P);
    invlpg((void *)TEST);
    check_trap_quietly("an absent entry's bits do not matter", CAUGHT(read_it, TEST), PF, 0, read_it);
}

static void reserved_bits(void)
{
    u32 width = cpuid(0x80000008, 0).a & 0xff;
    if (pae) {
        check_reserved("reserved: bit 52 of a page", false, ALL | 1ull << 52, ALL);
        check_reserved("reserved: bit 62 of a page", false, ALL | 1ull << 62, ALL);
        check_reserved("reserved: bit 52 of a table", false, ALL, ALL | 1ull << 52);
        check_reserved("reserved: bit 62 of a table", false, ALL, ALL | 1ull << 62);
        check_reserved("reserved: bit 13 of a 2 MiB page", true, ALL | 1 << 13, ALL);
        check_reserved("reserved: bit 20 of a 2 MiB page", true, ALL | 1 << 20, ALL);
        if (width < 52) {
            check_reserved("reserved: an address too wide", false, ALL | 1ull << 51, ALL);
            check_reserved("reserved: a table's address too wide", false, ALL, ALL | 1ull << 51);
        }
        set_controls((struct controls){1, 0, 0, 0, 0});
        check_reserved("reserved: NX without NXE", false, ALL | NX, ALL);
        set_controls(usual);
    } else {
        check_reserved("reserved: bit 21 of a 4 MiB page", true, ALL | 1 << 21, ALL);
        if (!(cpuid(1, 0).d >> 17 & 1))
            check_reserved("reserved: bit 13 of a 4 MiB page without PSE-36", true, ALL | 1 << 13, ALL);
        else {
            /* 4 GiB higher, where there is no memory. */
            map_test(true, ALL | 1 << 13, ALL);
            check(in_mode("bit 13 is address bit 32 (PSE-36)"), (CAUGHT(read_it, TEST).value & 0xff) == 0xc3, 0);
            if (width < 40)
                check_reserved("reserved: an address too wide", true, ALL | 1 << 20, ALL);
        }
    }
    map_test(true, ALL | 1 << 12, ALL);
    check(in_mode("PAT of a large page is not reserved"), CAUGHT(read_it, TEST).vector, NO_TRAP);
    map_test(false, ALL | 0xe00 | PS, ALL | 0xe00);
    check(in_mode("available bits do not matter"), CAUGHT(read_it, TEST).vector, NO_TRAP);
    map_test(false, ALL, ALL);
}

/* Without CR4.PSE a directory has no large pages; PAE does not care. */
static void page_size_extension(void)
{
    set(entry_of(pt, 0), (word)target | ALL);
    /* The rest runs on large pages. */
    if (pae) {
        map_test(true, ALL, ALL);
        write_cr4(read_cr4() & ~(word)CR4_PSE);
        check(in_mode("large pages need no PSE"), CAUGHT(read_it, TEST + 0x1000).vector, NO_TRAP);
        map_test(false, ALL, ALL);
        return;
    }
    leave();
    write_cr4(read_cr4() & ~(word)CR4_PSE);
    /* A table for each 4 MiB of the first 256 MiB; that of TEST says PS, which is ignored. */
    u32 *small = allocate(PAGE * 64);
    for (u32 i = 0; i < 64 * 1024; i++)
        small[i] = i << 12 | P | W;
    u32 *all = directory;
    u32 large[64];
    for (u32 i = 0; i < 64; i++) {
        large[i] = all[i];
        all[i] = (word)(small + i * 1024) | P | W;
    }
    all[TEST >> 22] = (word)pt | ALL | PS;
    write_cr0(read_cr0() | CR0_PG);
    struct trap t = CAUGHT(read_it, TEST), absent = CAUGHT(read_it, TEST + 0x1000);
    leave();
    for (u32 i = 0; i < 64; i++)
        all[i] = large[i];
    all[TEST >> 22] = (word)pt | ALL;
    write_cr4(read_cr4() | CR4_PSE);
    write_cr0(read_cr0() | CR0_PG);
    check(in_mode("without PSE a page table"), t.vector, NO_TRAP);
    check_trap(in_mode("and not a large page"), absent, PF, 0, read_it);
}

/* --- the TLB --- */

static u8 peek(u32 address) { return *(volatile u8 *)address; }

static void tlb(void)
{
    u8 *one = allocate(PAGE), *two = allocate(PAGE);
    *one = 1;
    *two = 2;
    void *leaf = map_test(false, ALL, ALL);
#define MAP(page, bits)                                                                           \
    do {                                                                                          \
        set(leaf, (word)(page) | (bits));                                                         \
        barrier();                                                                                \
    } while (0)
    MAP(one, ALL);
    invlpg((void *)TEST);
    check_quietly("first page", peek(TEST), 1);
    MAP(two, ALL);
    invlpg((void *)(TEST + 0xabc));
    check(in_mode("INVLPG"), peek(TEST), 2);
    MAP(one, ALL);
    flush();
    check(in_mode("a load of CR3"), peek(TEST), 1);
    write_cr4(read_cr4() | CR4_PGE);
    MAP(two, ALL | G);
    invlpg((void *)TEST);
    check_quietly("second page", peek(TEST), 2);
    MAP(one, ALL | G);
    invlpg((void *)TEST);
    check(in_mode("INVLPG of a global page"), peek(TEST), 1);
    MAP(two, ALL);
    write_cr4(read_cr4() & ~(word)CR4_PGE);
    check(in_mode("a change of CR4.PGE flushes global pages"), peek(TEST), 2);
    MAP(0, 0);
    flush();
    check_trap(in_mode("an absent page"), CAUGHT(read_it, TEST), PF, 0, read_it);
    MAP(one, ALL);
    check(in_mode("absence is not cached"), CAUGHT(read_it, TEST).vector, NO_TRAP);
    *(volatile u8 *)TEST = 1;
    check(in_mode("a write through a TLB entry made by a read sets D"), get(leaf) & (A | D), A | D);
    /* Any address in a large page invalidates all of it. */
    u32 size = 1u << large_shift();
    u8 *other = allocate_aligned(size, size);
    other[0] = 7;
    other[size - 1] = 8;
    target[size - 1] = 9;
    map_test(true, ALL, ALL);
    check_quietly("a large page's ends", peek(TEST) << 8 | peek(TEST + size - 1), 0xc309);
    set(pde(TEST), (word)other | ALL | PS);
    invlpg((void *)(TEST + size / 2));
    check(in_mode("INVLPG inside a large page"), peek(TEST) << 8 | peek(TEST + size - 1), 0x708);
    /* Between large and small. */
    set(pde(TEST), (word)pt | ALL);
    invlpg((void *)(TEST + size - 1));
    invlpg((void *)TEST);
    check(in_mode("a table in the place of a large page"), peek(TEST), 1);
    check_trap(in_mode("whose other entries are absent"), CAUGHT(read_it, TEST + size - 1), PF, 0, read_it);
    map_test(false, ALL, ALL);
}

/* --- page-directory pointers --- */

static void directory_pointers(void)
{
    static const struct {
        const char *name;
        u64 bits;
    } cases[] = {
        {"PAE: #GP: a pointer with bit 1", 2}, {"PAE: #GP: a pointer with bit 2", 4}, {"PAE: #GP: a pointer with bit 5", 0x20},
        {"PAE: #GP: a pointer with bit 8", 0x100}, {"PAE: #GP: a pointer with bit 63", NX}, {"PAE: #GP: a pointer too wide", 1ull << 52},
    };
    u64 *others = allocate(32);
    /* QEMU looks at them when it walks. */
    bool loaded = !under_tcg();
    for (u32 i = 0; i < COUNT(cases) && loaded; i++) {
        memcpy(others, pointers, 32);
        others[3] |= cases[i].bits;
        word before = read_cr3();
        check_trap(cases[i].name, CAUGHT(load_cr3, (word)others), GP, 0, load_cr3);
        check_quietly("CR3 is as before", read_cr3(), before);
        others[3] &= ~P;
        check_quietly("an absent pointer's bits do not matter", CAUGHT(load_cr3, (word)others).vector, NO_TRAP);
        write_cr3(before);
    }
    memcpy(others, pointers, 32);
    others[2] = 0;
    write_cr3((word)others);
    struct trap t = CAUGHT(read_it, TEST);
    check_trap("PAE: an absent pointer", t, PF, 0, read_it);
    check("PAE: CR2", t.cr2, TEST);
    others[2] = pointers[2] | 0xe00;
    write_cr3((word)others);
    check("PAE: and when it is there", CAUGHT(read_it, TEST).vector, NO_TRAP);
    check("PAE: pointers have no accessed bits", others[2], pointers[2] | 0xe00);
    /* A write to CR4 that changes PGE, PSE, PAE or SMEP loads them as well. */
    others[2] = 0;
    write_cr4(read_cr4() ^ CR4_PGE);
    check_trap("PAE: a change of CR4 loads the pointers", CAUGHT(read_it, TEST), PF, 0, read_it);
    write_cr4(read_cr4() ^ CR4_PGE);
    if (loaded) {
        others[2] = pointers[2] | 2;
        check_trap("PAE: #GP by CR4", CAUGHT(load_cr4, read_cr4() ^ CR4_PGE), GP, 0, load_cr4);
        leave();
        check_trap("PAE: #GP when paging is switched on", CAUGHT(load_cr0, read_cr0() | CR0_PG), GP, 0, load_cr0);
        check("PAE: and it stays off", read_cr0() & CR0_PG, 0);
    }
    write_cr3((word)pointers);
    write_cr0(read_cr0() | CR0_PG);
}

/* --- system accesses, and accesses across pages --- */

static void across(void)
{
    u8 *two = allocate(PAGE * 2);
    u32 end = TEST + PAGE;
    set(pde(TEST), (word)pt | ALL);
    set(entry_of(pt, 0), (word)two | ALL);
    set(entry_of(pt, 1), 0);
    flush();
    extern u8 read4[], write4[];
    SNIPPETS("read4: mov (%edx), %eax; ret\n"
             "write4: mov %edx, (%edx); ret\n");
    struct trap t = CAUGHT(read4, end - 2);
    check_trap(in_mode("a read across into an absent page"), t, PF, 0, read4);
    check(in_mode("CR2 is the start of the second page"), t.cr2, end);
    t = CAUGHT(write4, end - 1);
    check_trap(in_mode("a write across"), t, PF, E_W, write4);
    check(in_mode("nothing is written to the first page"), two[PAGE - 1], 0);
    static const u8 code[] = {0xb8, 1, 2, 3, 4, 0xc3};
    memcpy(two + PAGE - 2, code, sizeof code);
    t = CAUGHT(execute_it, end - 2);
    check_trap(in_mode("an instruction across into an absent page"), t, PF, pae ? E_I : 0, (void *)(end - 2));
    check(in_mode("CR2 is the start of the second page"), t.cr2, end);
    set(entry_of(pt, 1), (word)(two + PAGE) | ALL);
    check(in_mode("an instruction across two pages"), CAUGHT(execute_it, end - 2).value, 0x04030201);

    /* A descriptor that ring 3 loads is read with the rights of the supervisor; the GDT crosses into an absent page. */
    memcpy(two + PAGE - FREE_SEL, gdt, FREE_SEL);
    memcpy(two + PAGE, &gdt[USER_DATA_SEL / 8], 8);
    set(entry_of(pt, 0), (word)two | P | W);
    set(entry_of(pt, 1), 0);
    flush();
    struct __attribute__((packed)) {
        u16 limit;
        u32 base;
    } there = {FREE_SEL + 7, end - FREE_SEL}, here;
    asm volatile("sgdt %0" : "=m"(here));
    asm volatile("lgdt %0" ::"m"(there));
    t = in_ring3(user_load, FREE_SEL | 3);
    asm volatile("lgdt %0" ::"m"(here));
    check_trap(in_mode("a descriptor in an absent page"), t, PF, 0, (void *)user_address(user_load));
    check(in_mode("its address"), t.cr2, end);
    set(entry_of(pt, 1), (word)(two + PAGE) | P | W);
    asm volatile("lgdt %0" ::"m"(there));
    t = in_ring3(user_load, FREE_SEL | 3);
    asm volatile("lgdt %0" ::"m"(here));
    check(in_mode("and in one of the supervisor"), t.vector, 0x80);
    map_test(false, ALL, ALL);
}

static void everything(void)
{
    enter();
    set_controls(usual);
    rights();
    reserved_bits();
    page_size_extension();
    tlb();
    across();
    if (pae)
        directory_pointers();
    leave();
}

void run(void)
{
    if (left_out("paging outside of long mode"))
        return;
    set_gate(0x80, 3, 0, 14);
    target = allocate_aligned(0x400000, 0x400000);
    *target = 0xc3;
    mode = "32-bit: ";
    pae = false;
    everything();
    mode = "PAE: ";
    pae = true;
    everything();
    /* From the one mode to the other while paging is on is not what any system does; each by itself again is. */
    mode = "32-bit again: ";
    pae = false;
    enter();
    map_test(false, ALL, ALL);
    check(in_mode("a page"), peek(TEST), 0xc3);
    leave();
}
