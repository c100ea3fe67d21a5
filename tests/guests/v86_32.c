/* Virtual-8086 mode: the way in by IRET and out by exceptions, interrupts and INT n; what IOPL and the I/O permission map guard;
   16-bit code in paragraphs; page faults. SDM vol. 3B chapter 21, vol. 2 for the single instructions. */
#include "chips.h"

/* Real-mode addresses: code, data and stack, each a segment of its own. */
#define CODE 0x8000
#define DATA 0x9000
#define STACK 0xa000
#define STACK_TOP 0xff0

static u8 *const code = (u8 *)CODE;
static u8 *const data = (u8 *)DATA;

/* What IRET takes, in its order on the stack, and AX. */
struct v86 {
    word ip, cs, flags, sp, ss, es, ds, fs, gs, ax;
};

SNIPPETS("enter_v86: pushl 32(%edx); pushl 28(%edx); pushl 24(%edx); pushl 20(%edx); pushl 16(%edx); pushl 12(%edx); pushl 8(%edx)\n"
         "pushl 4(%edx); pushl (%edx); mov 36(%edx), %eax; enter_v86_at: iretl\n"
         "load_cr4: mov %edx, %cr4; ret\n");
extern u8 enter_v86[], enter_v86_at[], load_cr4[];

/* The whole frame of the last exception or interrupt, which has the segment registers of virtual-8086 mode, and the handler's own. */
static struct frame found;
static void keep(struct frame *f)
{
    found = *f;
    give_up(f);
}

static struct trap enter(word flags_)
{
    struct v86 state = {0, CODE / 16, flags_ | VM | 2, STACK_TOP, STACK / 16, DATA / 16, DATA / 16, 0x1003, 0x1004, 0x1234};
    return CAUGHT(enter_v86, &state);
}

static struct trap run_bytes(const void *bytes, u32 len, word flags_)
{
    memcpy(code, bytes, len);
    /* #UD: the end. */
    code[len] = 0x0f;
    code[len + 1] = 0x0b;
    return enter(flags_);
}
#define RUN(bytes, flags) run_bytes(bytes, sizeof(bytes) - 1, flags)

/* --- one instruction each --- */

/* No exception: the #UD behind it comes. */
#define RUNS NO_TRAP
#define IDT_BIT 2

static void instructions(void)
{
#define BYTES(text) text, sizeof(text) - 1
    static const struct {
        const char *name, *bytes;
        u32 len;
        /* With IOPL 0, and with IOPL 3. */
        u32 low, low_error, high, high_error;
        /* Where a fault is. */
        u32 at;
        /* Wrong in QEMU. */
        bool not_in_tcg;
    } cases[] = {
        {"CLI", BYTES("\xfa"), GP, 0, RUNS, 0, 0, 0},
        {"STI", BYTES("\xfb"), GP, 0, RUNS, 0, 0, 0},
        {"PUSHF", BYTES("\x9c"), GP, 0, RUNS, 0, 0, 0},
        {"PUSHFD", BYTES("\x66\x9c"), GP, 0, RUNS, 0, 0, 0},
        {"POPF", BYTES("\x9d"), GP, 0, RUNS, 0, 0, 0},
        {"POPFD", BYTES("\x66\x9d"), GP, 0, RUNS, 0, 0, 0},
        {"INT 0x80, whose gate is open", BYTES("\xcd\x80"), GP, 0, 0x80, 0, 0, 0},
        {"INT 0x21, whose gate is not", BYTES("\xcd\x21"), GP, 0, GP, 0x21 << 3 | IDT_BIT, 0, 0},
        {"INT 3 in two bytes", BYTES("\xcd\x03"), GP, 0, BP, 0, 0, 0},
        {"INT3 knows no IOPL", BYTES("\xcc"), BP, 0, BP, 0, 0, 0},
        {"INTO neither", BYTES("\xb0\x7f\x04\x01\xce"), OF, 0, OF, 0, 0, 0},
        {"INTO without overflow", BYTES("\xb0\x7e\x04\x01\xce"), RUNS, 0, RUNS, 0, 0, 0},
        {"INT1", BYTES("\xf1"), DB, 0, DB, 0, 0, 1},
        {"BOUND", BYTES("\x62\x06\x00\x00"), BR, 0, BR, 0, 0, 0},
        {"a division by zero", BYTES("\x31\xc9\xf7\xf1"), DE, 0, DE, 0, 2, 0},
        {"HLT", BYTES("\xf4"), GP, 0, GP, 0, 0, 0},
        {"MOV from CR0", BYTES("\x0f\x20\xc0"), GP, 0, GP, 0, 0, 0},
        {"MOV to CR3", BYTES("\x0f\x22\xd8"), GP, 0, GP, 0, 0, 0},
        {"MOV from DR7", BYTES("\x0f\x21\xf8"), GP, 0, GP, 0, 0, 0},
        {"CLTS", BYTES("\x0f\x06"), GP, 0, GP, 0, 0, 0},
        {"LMSW", BYTES("\x0f\x01\xf0"), GP, 0, GP, 0, 0, 0},
        {"SMSW", BYTES("\x0f\x01\xe0"), RUNS, 0, RUNS, 0, 0, 0},
        {"LGDT", BYTES("\x0f\x01\x16\x00\x00"), GP, 0, GP, 0, 0, 0},
        {"LIDT", BYTES("\x0f\x01\x1e\x00\x00"), GP, 0, GP, 0, 0, 0},
        {"SGDT", BYTES("\x0f\x01\x06\x00\x00"), RUNS, 0, RUNS, 0, 0, 0},
        {"INVLPG", BYTES("\x0f\x01\x3e\x00\x00"), GP, 0, GP, 0, 0, 0},
        {"WBINVD", BYTES("\x0f\x09"), GP, 0, GP, 0, 0, 0},
        {"RDMSR", BYTES("\x0f\x32"), GP, 0, GP, 0, 0, 0},
        {"SYSEXIT", BYTES("\x0f\x35"), GP, 0, GP, 0, 0, 0},
        {"CPUID", BYTES("\x0f\xa2"), RUNS, 0, RUNS, 0, 0, 0},
        {"RDTSC", BYTES("\x0f\x31"), RUNS, 0, RUNS, 0, 0, 0},
        {"SLDT", BYTES("\x0f\x00\xc0"), UD, 0, UD, 0, 0, 0},
        {"STR", BYTES("\x0f\x00\xc8"), UD, 0, UD, 0, 0, 0},
        {"LLDT", BYTES("\x0f\x00\xd0"), UD, 0, UD, 0, 0, 0},
        {"LTR", BYTES("\x0f\x00\xd8"), UD, 0, UD, 0, 0, 0},
        {"VERR", BYTES("\x0f\x00\xe0"), UD, 0, UD, 0, 0, 0},
        {"LAR", BYTES("\x0f\x02\xc0"), UD, 0, UD, 0, 0, 0},
        {"LSL", BYTES("\x0f\x03\xc0"), UD, 0, UD, 0, 0, 0},
        {"ARPL", BYTES("\x63\xc0"), UD, 0, UD, 0, 0, 0},
        {"IN of a port that is closed", BYTES("\xe4\x81"), GP, 0, GP, 0, 0, 0},
        {"OUT to it", BYTES("\xe6\x81"), GP, 0, GP, 0, 0, 0},
        {"INSB", BYTES("\xba\x81\x00\x6c"), GP, 0, GP, 0, 3, 0},
        {"IN of a port that is open", BYTES("\xe4\x80"), RUNS, 0, RUNS, 0, 0, 0},
        {"IN of two of which one is closed", BYTES("\xe5\x80"), GP, 0, GP, 0, 0, 0},
        {"a word at the segment's end", BYTES("\xa1\xff\xff"), GP, 0, GP, 0, 0, 1},
        {"a byte there", BYTES("\xa0\xff\xff"), RUNS, 0, RUNS, 0, 0, 0},
        {"a word at the stack's end", BYTES("\xbd\xff\xff\x8b\x46\x00"), SS, 0, SS, 0, 3, 1},
        {"an offset of 17 bits", BYTES("\x67\xa0\x00\x00\x01\x00"), GP, 0, GP, 0, 0, 1},
    };
    tss.io_permissions[0x80 / 8] &= ~1;
    for (u32 i = 0; i < COUNT(cases); i++) {
        if (cases[i].not_in_tcg && under_tcg())
            continue;
        bool right = true;
        for (u32 iopl = 0; iopl <= 3; iopl += 3) {
            u32 vector = iopl ? cases[i].high : cases[i].low, error = iopl ? cases[i].high_error : cases[i].low_error;
            struct trap t = run_bytes(cases[i].bytes, cases[i].len, iopl << 12);
            bool trap = vector == BP || vector == OF || vector == DB || vector == 0x80;
            word ip = vector == RUNS || trap ? cases[i].len : cases[i].at;
            if (vector == RUNS)
                vector = UD;
            check_quietly("in virtual-8086 mode", t.flags & (VM | IOPL3), VM | iopl << 12);
            /* IP 0 is one to be checked. */
            right &= check_trap_quietly(cases[i].name, t, vector, error, NULL) && check_quietly(cases[i].name, t.ip, ip);
        }
        check(cases[i].name, right, true);
    }
}

/* --- what it is like --- */

/* The first lines of a program in the data segment's paragraphs; results at DATA. */
SNIPPETS(".code16\n"
         "program: mov $0x5a, %bx; mov %bx, 0; mov %cs, 2; mov %ss, 4; mov %fs, 6; mov %gs, 8\n"
         "mov $0xffff, %ax; mov %ax, %es; movb %es:0x10, %al; mov %al, 10\n"           /* the byte at 1 MiB */
         "mov $0x12345678, %eax; mov %eax, 12\n"                                       /* 32-bit registers */
         "lcall $0x880, $0; mov %cx, 16\n"
         "mov $1, %sp; mov $0, %sp; push %bx; mov %sp, 18; mov $0xff0, %sp\n"           /* the stack goes round */
         "movw $0x20, 24; movw $0xa00, 26; les 24, %di; mov %es, 20; mov %di, 22\n"
         "xor %si, %si; mov $4, %cx; cld; rep movsb; mov %di, 28\n"
         "lea 30, %bx; movb $7, 33; mov $3, %al; xlat; mov %al, 30\n"
         "addr32 movl $0x99, 36\n"
         "pushf; pop 40; pushfl; popl 44\n"
         "pushl $0x3ff0cd5; popfl; pushfl; popl 48\n"                                   /* all that POPF may try */
         "int $0x80\n"
         "program_end:\n"
         "far_part: mov %cs, %cx; lret\n"
         "far_part_end:\n"
         ".code32\n");
extern u8 program[], program_end[], far_part[], far_part_end[];

static u16 result16(u32 at) { return *(volatile u16 *)(data + at); }
static u32 result32(u32 at) { return *(volatile u32 *)(data + at); }

static void like_an_8086(void)
{
    memcpy(code, program, program_end - program);
    memcpy((void *)0x8800, far_part, far_part_end - far_part);
    memset(data, 0, 64);
    struct trap t = enter(IOPL3);
    check("it runs to its end", t.vector << 16 | t.ip, 0x80 << 16 | (program_end - program));
    check("writes", result16(0), 0x5a);
    check("CS and SS as they came", result16(2) << 16 | result16(4), CODE / 16 << 16 | STACK / 16);
    check("FS and GS as they came", result16(6) << 16 | result16(8), 0x10031004);
    check("above 1 MiB", data[10], *(volatile u8 *)0x100000);
    check("32-bit registers", result32(12), 0x12345678);
    check("a far call into another paragraph", result16(16), 0x880);
    check("the stack goes round at 64 KiB", result16(18), 0xfffe);
    check("LES", result16(20) << 16 | result16(22), 0xa000020);
    check("REP MOVSB", result16(28), 0x24);
    check("XLAT", data[30], 7);
    check("32-bit offsets within 64 KiB", result32(36), 0x99);
    check("PUSHF shows IOPL", result16(40) & 0x7002, IOPL3 | 2);
    check("PUSHFD does not show VM and RF", result32(44) & (VM | RF | IOPL3), IOPL3);
    /* VM, VIF, VIP and IOPL stay; AC, ID, NT, OF, DF and the rest may change. */
    check("POPFD: what it may change", result32(48) & ~(word)0x200000, IOPL3 | AC_FLAG | 0xcd7);
}

/* IRET with operands of both sizes, within virtual-8086 mode. */
static void returns(void)
{
    static const u8 push_and_iret[] = {
        0x68, 0x02, 0x02,                       /* flags: IF, IOPL 0 */
        0x68, 0x00, 0x08,                       /* CS */
        0x6a, 0x40,                             /* IP */
        0xcf,
    };
    static const u8 push_and_iretd[] = {
        0x66, 0x68, 0x02, 0x02, 0x10, 0x00,     /* flags: IF, IOPL 0, no VM, VIP */
        0x66, 0x68, 0x00, 0x08, 0x00, 0x00,     /* CS */
        0x66, 0x6a, 0x40,                       /* EIP */
        0x66, 0xcf,
    };
    code[0x40] = 0x0f;
    code[0x41] = 0x0b;
    struct trap t = run_bytes(push_and_iret, sizeof push_and_iret, IOPL3);
    check("IRET within the mode", t.vector << 16 | t.ip, UD << 16 | 0x40);
    check("IRET: IF changes, IOPL and VM do not", t.flags & (VM | IOPL3 | IF), VM | IOPL3 | IF);
    t = run_bytes(push_and_iret, sizeof push_and_iret, 0);
    check_trap("IRET with IOPL 0", t, GP, 0, (void *)(sizeof push_and_iret - 1));
    t = run_bytes(push_and_iretd, sizeof push_and_iretd, IOPL3);
    check("IRETD within the mode", t.vector << 16 | t.ip, UD << 16 | 0x40);
    check("IRETD: nor are VIF and VIP", t.flags & (VM | IOPL3 | IF | 3 << 19), VM | IOPL3 | IF);
    /* Only ring 0 may enter it. */
    USER_SNIPPETS("user_iret: pushf; orl $0x20000, (%esp); push $0x2b; push $1f; iretl; 1: mov %cs, %eax; int $0x80\n");
    extern u8 user_iret[];
    static u8 stack[256] __attribute__((aligned(16)));
    /* QEMU lets it, and takes any offset. */
    if (under_tcg())
        return;
    t = caught_far((struct far_state){(word)user_iret, (word)stack + sizeof stack, USER_CODE_SEL, USER_DATA_SEL, IOPL3 | 2, 0});
    check("IRET of ring 3 cannot set VM", t.vector << 16 | (t.value & 0xffff), 0x80 << 16 | USER_CODE_SEL);
    check("nor is it set", t.flags & VM, 0);
    /* The offset must be within 64 KiB. */
    struct v86 state = {0x10000, CODE / 16, VM | 2, STACK_TOP, STACK / 16, 0, 0, 0, 0, 0};
    check_trap("IRET to an offset beyond the segment", CAUGHT(enter_v86, &state), GP, 0, enter_v86_at);
}

/* --- handlers --- */

static word handler_ds, handler_fs, handler_gs;

/* The registers that a handler begins with, which the runtime's entry pushes first. */
static void note_and_go_on(struct frame *f)
{
    found = *f;
    handler_ds = f->ds;
    handler_fs = f->fs;
    handler_gs = f->gs;
    f->ax = 0x4321;
}

static void handlers(void)
{
    on(0x80, note_and_go_on);
    on(UD, keep);
    /* INT 0x80; MOV DI, AX; MOV SI, GS */
    struct trap t = RUN("\xcd\x80\x89\xc7\x8c\xee", IOPL3 | IF);
    struct frame after = found;
    check("INT comes back", t.vector << 16 | t.ip, UD << 16 | 6);
    check("with what the handler gave it", after.di & 0xffff, 0x4321);
    check("and its segments", (after.si & 0xffff) << 16 | after.v86_gs, 0x10041004);
    check("all of them", after.v86_es << 16 | after.v86_ds, DATA / 16 << 16 | DATA / 16);
    check("FS too", after.v86_fs, 0x1003);
    check("CS and SS", after.cs << 16 | after.ss, CODE / 16 << 16 | STACK / 16);
    check("SP", after.sp, STACK_TOP);
    check("a handler begins with null data segments", handler_ds | handler_fs | handler_gs, 0);
    on(0x80, keep);
    set_gate(0x80, 3, 0, 15);
    t = RUN("\xcd\x80", IOPL3 | IF);
    check("a trap gate works as well", t.vector << 16 | t.ip, 0x80 << 16 | 2);
    check("the frame is at the top of the stack of ring 0", found.v86_gs, 0x1004);
    set_gate(0x80, 3, 0, 14);
    /* Handlers must be in ring 0, and not conforming. */
    u64 usual = *gate(0x80);
    gdt[FREE_SEL / 8] = 0x00cf9f000000ffff;
    *gate(0x80) = (usual & ~0xffff0000ull) | FREE_SEL << 16;
    check_trap("a handler in conforming code", RUN("\xcd\x80", IOPL3), GP, FREE_SEL, NULL);
    *gate(0x80) = (usual & ~0xffff0000ull) | (USER_CODE_SEL & ~3) << 16;
    check_trap("a handler in ring 3", RUN("\xcd\x80", IOPL3), GP, USER_CODE_SEL & ~3, NULL);
    gdt[FREE_SEL / 8] = 0x00cfbb000000ffff;
    *gate(0x80) = (usual & ~0xffff0000ull) | FREE_SEL << 16;
    /* QEMU looks at the stack of ring 1 first. */
    if (!under_tcg())
        check_trap("a handler in ring 1", RUN("\xcd\x80", IOPL3), GP, FREE_SEL, NULL);
    *gate(0x80) = usual & ~(0x80ull << 40);
    check_trap("an absent gate", RUN("\xcd\x80", IOPL3), NP, 0x80 << 3 | IDT_BIT, NULL);
    *gate(0x80) = usual;
    /* Single step. */
    on(DB, keep);
    t = RUN("\x90\x90", TF);
    check("single step is a trap after the first instruction", t.vector << 16 | t.ip, DB << 16 | 1);
    t = RUN("\x90\x90", TF | IOPL3);
    check("with IOPL 3 too", t.vector << 16 | t.ip, DB << 16 | 1);
    on(DB, NULL);
}

static volatile u32 ticks;
static word tick_flags;
static void on_tick(struct frame *f)
{
    ticks++;
    tick_flags = f->flags;
    pic_eoi(0);
    /* Out of the endless loop. */
    f->ip = 2;
}

/* External interrupts come whatever IOPL is, when IF is set. */
static void external(void)
{
    on(PIC_VECTOR, on_tick);
    pic_init();
    for (word iopl = 0; iopl <= IOPL3; iopl += IOPL3) {
        ticks = 0;
        pit_start(0, 2000);
        pic_allow(1 << 0);
        struct trap t = RUN("\xeb\xfe", iopl | IF);
        check("an interrupt", ticks << 16 | t.vector << 8 | t.ip, 1 << 16 | UD << 8 | 2);
        check("out of virtual-8086 mode", tick_flags & (VM | IF | IOPL3), VM | IF | iopl);
        pic_allow(0);
    }
    on(PIC_VECTOR, NULL);
}

/* --- paging --- */

enum { E_P = 1, E_W = 2, E_U = 4 };

static void paging(void)
{
    /* The first 4 MiB by a table: for ring 3 as far as 8086 addresses reach. */
    u32 *directory = allocate(PAGE), *table = allocate(PAGE);
    for (u32 i = 0; i < 1024; i++) {
        directory[i] = i << 22 | 0x83;
        table[i] = i << 12 | (i < 0x110 ? 7 : 3);
    }
    directory[0] = (word)table | 7;
    table[0xb] = 0xb000 | 3;
    table[0xc] = 0xc000 | 5;
    table[0xd] = 0;
    table[0x10f] = 0;
    write_cr4(read_cr4() | CR4_PSE);
    write_cr3((word)directory);
    write_cr0(read_cr0() | CR0_PG);
    /* In the data segment: MOV AL, [n], MOV [n], AL. */
    struct trap t = RUN("\xa0\x00\x20", 0);
    check_trap("paging: a page of the supervisor", t, PF, E_P | E_U, NULL);
    check("paging: CR2", t.cr2, 0xb000);
    t = RUN("\xa0\x05\x30", 0);
    check("paging: a page for reading", t.vector, UD);
    t = RUN("\xa2\x05\x30", 0);
    check_trap("paging: is not for writing", t, PF, E_P | E_W | E_U, NULL);
    check("paging: CR2", t.cr2, 0xc005);
    t = RUN("\xa2\x00\x40", IOPL3);
    check_trap("paging: an absent page", t, PF, E_W | E_U, NULL);
    /* MOV AX, 0xffff; MOV ES, AX; MOV AL, ES:[0xffef] */
    t = RUN("\xb8\xff\xff\x8e\xc0\x26\xa0\xef\xff", 0);
    check_trap("paging: above 1 MiB", t, PF, E_U, (void *)5);
    check("paging: CR2", t.cr2, 0x10ffdf);
    check("paging: the instruction's registers", found.v86_es, 0xffff);
    write_cr0(read_cr0() & ~CR0_PG);
}

/* The mode's extensions: the bit of CR4 is there if CPUID says so, and only then. */
static void extensions(void)
{
    /* QEMU takes it without telling. */
    if (under_tcg())
        return;
    bool vme = cpuid(1, 0).d >> 1 & 1;
    struct trap t = CAUGHT(load_cr4, read_cr4() | CR4_VME);
    check("CR4.VME is what CPUID says", t.vector, vme ? NO_TRAP : GP);
    check("and its value", read_cr4() & CR4_VME, vme ? CR4_VME : 0);
    write_cr4(read_cr4() & ~(word)CR4_VME);
}

void run(void)
{
    if (left_out("virtual-8086 mode"))
        return;
    set_gate(0x80, 3, 0, 14);
    set_gate(BP, 3, 0, 14);
    set_gate(OF, 3, 0, 14);
    instructions();
    like_an_8086();
    returns();
    handlers();
    external();
    on(PF, keep);
    paging();
    extensions();
}
