/* 32-bit protected mode without paging: segments and their limits, exceptions that 64-bit mode does not have, interrupt, trap and call
   gates of both sizes between rings, far returns, SYSENTER. SDM vol. 3A chapters 5 and 6. Task gates are in tasks32.c. */
#include "guest.h"

#define IDT_BIT 2

/* Descriptors of this guest, from FREE_SEL on. */
enum {
    CODE1 = FREE_SEL, DATA1 = FREE_SEL + 8, CONFORMING = FREE_SEL + 16, ABSENT_DATA = FREE_SEL + 24, ABSENT_CODE = FREE_SEL + 32,
    READ_ONLY = FREE_SEL + 40, EXECUTE_ONLY = FREE_SEL + 48, SMALL = FREE_SEL + 56, DOWN = FREE_SEL + 64, BASED_CODE = FREE_SEL + 72,
    LOW_STACK = FREE_SEL + 80, ABSENT1 = FREE_SEL + 88, LDT_SEL = FREE_SEL + 96, GATE = FREE_SEL + 104, SMALL1 = FREE_SEL + 112,
};

static u64 with_base(u64 descriptor, word base)
{
    return descriptor | (u64)(base & 0xffffff) << 16 | (u64)(base >> 24) << 56;
}

static u8 segment[0x2000];
static u8 ring1_stack[4096] __attribute__((aligned(16))), user_stack[4096] __attribute__((aligned(16)));
#define RING1_TOP ((word)ring1_stack + sizeof ring1_stack)
#define USER_TOP ((word)user_stack + sizeof user_stack - 64)

extern u8 based_code[];

static void make_descriptors(void)
{
    gdt[CODE1 / 8] = 0x00cfbb000000ffff;
    gdt[DATA1 / 8] = 0x00cfb3000000ffff;
    gdt[CONFORMING / 8] = 0x00cf9f000000ffff;
    gdt[ABSENT_DATA / 8] = 0x00cf13000000ffff;
    gdt[ABSENT_CODE / 8] = 0x00cf1b000000ffff;
    gdt[READ_ONLY / 8] = 0x00cf91000000ffff;
    gdt[EXECUTE_ONLY / 8] = 0x00cf99000000ffff;
    gdt[SMALL / 8] = with_base(0x0040930000000fff, (word)segment);
    gdt[DOWN / 8] = with_base(0x0040970000000fff, (word)segment);
    gdt[BASED_CODE / 8] = with_base(0x00409b000000ffff, (word)based_code);
    gdt[LOW_STACK / 8] = 0x00c09300000003ff; /* 4 MiB */
    gdt[ABSENT1 / 8] = 0x00cf33000000ffff;
    gdt[SMALL1 / 8] = with_base(0x0040b30000000fff, (word)segment);
    tss.ss1 = DATA1 | 1;
    tss.esp1 = RING1_TOP;
    /* After a reset there is a table at address 0. */
    asm volatile("lldt %w0" ::"r"(0));
}

static struct trap in_ring3(const u8 *code, word argument)
{
    return caught_far((struct far_state){(word)code, USER_TOP, USER_CODE_SEL, USER_DATA_SEL, 2, argument});
}

static struct frame found;
static word frame_at;
static void keep(struct frame *f)
{
    found = *f;
    frame_at = (word)f;
    give_up(f);
}

/* --- segments and exceptions --- */

/* A snippet `name`, its interesting instruction at `name_at`, the next at `name_next`. The argument is in EDX. */
#define SNIPPET(name, before, instruction)                                                        \
    SNIPPETS(#name ": " before "\n" #name "_at: " instruction "\n" #name "_next: ret\n");         \
    extern u8 name[], name##_at[], name##_next[]

SNIPPET(overflow, "mov $0x7f, %al; add $1, %al", "into");
SNIPPET(no_overflow, "xor %eax, %eax", "into");
SNIPPET(bounds_low, "push $5; push $2; mov %esp, %ecx; add $8, %esp; mov $1, %eax", "bound %eax, (%ecx)");
SNIPPET(bounds_high, "push $5; push $2; mov %esp, %ecx; add $8, %esp; mov $6, %eax", "bound %eax, (%ecx)");
SNIPPET(bounds_in, "push $5; push $2; mov %esp, %ecx; add $8, %esp; mov $5, %eax", "bound %eax, (%ecx)");
SNIPPET(adjust, "mov $7, %eax", "aam $0");
SNIPPET(no_swapgs, "", ".byte 0x0f, 0x01, 0xf8");
SNIPPET(no_syscall, "", "syscall");
SNIPPET(no_arpl, "", ".byte 0xf0, 0x63, 0xc0");
SNIPPET(load_es, "", "mov %edx, %es");
SNIPPET(load_ss, "", "mov %edx, %ss");
SNIPPET(read_small, "mov $0x38 + 56, %eax; mov %eax, %es", "movl %es:(%edx), %eax");
SNIPPET(read_small_byte, "mov $0x38 + 56, %eax; mov %eax, %es", "movb %es:(%edx), %al");
SNIPPET(read_down, "mov $0x38 + 64, %eax; mov %eax, %es", "movl %es:(%edx), %eax");
SNIPPET(write_read_only, "mov $0x38 + 40, %eax; mov %eax, %es", "movl $0, %es:(%edx)");
SNIPPET(write_code, "", "movl $0, %cs:(%edx)");
SNIPPET(read_null, "xor %eax, %eax; mov %eax, %es", "movl %es:(%edx), %eax");
SNIPPET(read_stack, "mov %ss, %ecx; mov $0x38 + 80, %eax; mov %eax, %ss; push %ebp; mov %edx, %ebp", "movl (%ebp), %eax; pop %ebp; mov %ecx, %ss");
SNIPPET(jump_execute_only, "ljmp $0x38 + 48, $1f; 1:", "movl %cs:(%edx), %eax; ljmp $8, $1f; 1:");
SNIPPET(jump_far, "push %edx; push $0; push %edx; movl $based_code_end - based_code + 0x10000, (%esp)", "ljmp *(%esp)");
SNIPPET(run_off, "", "ljmp $0x38 + 72, $0xfffe");
SNIPPET(jump_null, "push $0; push %edx", "lret");
SNIPPET(load_cr4_, "", "mov %edx, %cr4");
SNIPPET(load_cr0_, "", "mov %edx, %cr0");
SNIPPETS("based_code: nop; based_code_end: nop\n");

static void simple(void)
{
    static const struct {
        const char *name;
        const u8 *code, *ip;
        word argument;
        u32 vector, error;
        /* Wrong in QEMU; beyond engines that emulate. */
        bool not_in_tcg, not_when_limited;
    } cases[] = {
        {"#OF: INTO is a trap", overflow, overflow_next, 0, OF, 0, 0, 1},
        {"INTO without overflow", no_overflow, NULL, 0, NO_TRAP, 0, 0,0},
        {"#BR: below", bounds_low, bounds_low_at, 0, BR, 0, 0, 1},
        {"#BR: above", bounds_high, bounds_high_at, 0, BR, 0, 0, 1},
        {"BOUND: in", bounds_in, NULL, 0, NO_TRAP, 0, 0, 1},
        {"#DE: AAM by 0", adjust, adjust_at, 0, DE, 0, 0, 0},
        {"#UD: SWAPGS", no_swapgs, no_swapgs_at, 0, UD, 0, 0, 1},
        {"#UD: SYSCALL without EFER.SCE", no_syscall, no_syscall_at, 0, UD, 0, 0,0},
        {"#UD: LOCK ARPL", no_arpl, no_arpl_at, 0, UD, 0, 1, 1},
        {"#GP: code that cannot be read as data", load_es, load_es_at, EXECUTE_ONLY, GP, EXECUTE_ONLY, 0, 0},
        {"code that can be read as data", load_es, NULL, CODE_SEL, NO_TRAP, 0, 0, 0},
        {"conforming code with RPL 3 as data", load_es, NULL, CONFORMING | 3, NO_TRAP, 0, 0, 0},
        {"#NP: absent data", load_es, load_es_at, ABSENT_DATA, NP, ABSENT_DATA, 0, 0},
        {"#GP: beyond the GDT", load_es, load_es_at, 0x1000, GP, 0x1000, 0, 0},
        {"#GP: of an LDT that is not there", load_es, load_es_at, 0xc, GP, 0xc, 0, 0},
        {"null as data", load_es, NULL, 3, NO_TRAP, 0, 0, 0},
        {"#GP: null as stack", load_ss, load_ss_at, 0, GP, 0, 0, 0},
        {"#SS: an absent stack segment", load_ss, load_ss_at, ABSENT_DATA, SS, ABSENT_DATA, 0, 0},
        {"#GP: a stack segment of ring 1", load_ss, load_ss_at, DATA1, GP, DATA1, 0, 0},
        {"#GP: a stack segment with RPL 1", load_ss, load_ss_at, DATA_SEL | 1, GP, DATA_SEL, 0, 0},
        {"limit: the last byte", read_small_byte, NULL, 0xfff, NO_TRAP, 0, 0,0},
        {"limit: the last four", read_small, NULL, 0xffc, NO_TRAP, 0, 0,0},
        {"#GP: four bytes of which one is beyond the limit", read_small, read_small_at, 0xffd, GP, 0, 1,0},
        {"#GP: far beyond the limit", read_small, read_small_at, 0x80000000, GP, 0, 1,0},
        {"#GP: around the end", read_small, read_small_at, 0xfffffffe, GP, 0, 1,0},
        {"expand-down: above the limit", read_down, NULL, 0x1000, NO_TRAP, 0, 0,0},
        {"#GP: expand-down: the limit itself", read_down, read_down_at, 0xfff, GP, 0, 1,0},
        {"#GP: a write to read-only data", write_read_only, write_read_only_at, (word)segment, GP, 0, 1,0},
        {"#GP: a write to code", write_code, write_code_at, (word)segment, GP, 0, 1,0},
        {"#GP: an access through null", read_null, read_null_at, (word)segment, GP, 0, 1,0},
        {"the stack segment's limit: within", read_stack, NULL, 0x3ffffc, NO_TRAP, 0, 0,0},
        {"#SS: the stack segment's limit: beyond", read_stack, read_stack_at, 0x3ffffd, SS, 0, 1,0},
        {"#GP: code that cannot be read", jump_execute_only, jump_execute_only_at, (word)segment, GP, 0, 1,0},
        {"#GP: a far jump beyond the limit", jump_far, jump_far_at, BASED_CODE, GP, 0, 0,0},
        {"#GP: a far return to null", jump_null, jump_null_at, 0, GP, 0, 0,0},
        {"#GP: reserved bits of CR4", load_cr4_, load_cr4__at, 0x80000600, GP, 0, 1,0},
        {"#GP: PG without PE", load_cr0_, load_cr0__at, CR0_PG | 0x32, GP, 0, 1,0},
        {"#GP: NW without CD", load_cr0_, load_cr0__at, 0x20010033, GP, 0, 1,0},
    };
    for (u32 i = 0; i < COUNT(cases); i++) {
        if (cases[i].not_in_tcg && under_tcg())
            continue;
        if (cases[i].not_when_limited && left_out(cases[i].name))
            continue;
        struct trap t = CAUGHT(cases[i].code, cases[i].argument);
        asm volatile("mov %0, %%ss; mov %0, %%ds; mov %0, %%es" ::"r"(DATA_SEL));
        check_trap(cases[i].name, t, cases[i].vector, cases[i].error, cases[i].ip);
    }
    /* An instruction that begins inside the limit and ends beyond it; QEMU goes on. */
    if (under_tcg())
        return;
    segment[0] = 0xb8;
    gdt[BASED_CODE / 8] = with_base(0x00409b000000ffff, (word)segment - 0xfffe);
    struct trap t = CAUGHT(run_off, 0);
    gdt[BASED_CODE / 8] = with_base(0x00409b000000ffff, (word)based_code);
    check_trap("#GP: an instruction that crosses the limit of the code", t, GP, 0, (void *)0xfffe);
    check("in that segment", t.cs, BASED_CODE);
}

/* What LAR, LSL, VERR and VERW say of selectors; a table of its own. */
SNIPPETS("lar_: xor %eax, %eax; lar %edx, %eax; ret\n"
         "lsl_: xor %eax, %eax; lsl %edx, %eax; ret\n"
         "verr_: verr %dx; setz %al; movzbl %al, %eax; ret\n"
         "verw_: verw %dx; setz %al; movzbl %al, %eax; ret\n");
extern u8 lar_[], lsl_[], verr_[], verw_[];

static void questions(void)
{
    static const struct {
        const char *name;
        u16 selector;
        u32 rights, limit;
        bool read, write;
    } cases[] = {
        {"asked: code", CODE_SEL, 0x00cf9b00, 0xffffffff, 1, 0},
        {"asked: data", DATA_SEL, 0x00cf9300, 0xffffffff, 1, 1},
        {"asked: read-only data", READ_ONLY, 0x00cf9100, 0xffffffff, 1, 0},
        {"asked: code that cannot be read", EXECUTE_ONLY, 0x00cf9900, 0xffffffff, 0, 0},
        {"asked: a limit in bytes", SMALL, 0x00409300, 0xfff, 1, 1},
        {"asked: absent data", ABSENT_DATA, 0x00cf1300, 0xffffffff, 1, 1},
        {"asked: RPL 3", DATA_SEL | 3, 0, 0, 0, 0},
        {"asked: RPL 3 of conforming code", CONFORMING | 3, 0x00cf9f00, 0xffffffff, 1, 0},
        {"asked: a TSS", TSS_SEL, 0x00008b00, sizeof(struct tss) - 1, 0, 0},
        {"asked: null", 0, 0, 0, 0, 0},
        {"asked: beyond the GDT", 0x1000, 0, 0, 0, 0},
    };
    for (u32 i = 0; i < COUNT(cases); i++) {
        /* What was loaded by now has its accessed bit; the limit's bits are undefined. */
        const u32 known = 0x00f0fe00;
        bool right = check_quietly(cases[i].name, CAUGHT(lar_, cases[i].selector).value & known, cases[i].rights & known);
        right &= check_quietly("LSL", CAUGHT(lsl_, cases[i].selector).value, cases[i].limit);
        right &= check_quietly("VERR", CAUGHT(verr_, cases[i].selector).value, cases[i].read);
        right &= check_quietly("VERW", CAUGHT(verw_, cases[i].selector).value, cases[i].write);
        check(cases[i].name, right, 1);
    }
    static u64 ldt[3];
    ldt[1] = 0x00cf93000000ffff;
    ldt[2] = 0x00cf13000000ffff;
    set_tss_descriptor(LDT_SEL, ldt, sizeof ldt - 1, 2);
    asm volatile("lldt %w0" ::"r"(LDT_SEL));
    check("LDT: a segment", CAUGHT(load_es, 0xc).vector, NO_TRAP);
    check_trap("LDT: #NP", CAUGHT(load_es, 0x14), NP, 0x14, load_es_at);
    check_trap("LDT: #GP: beyond it", CAUGHT(load_es, 0x1c), GP, 0x1c, load_es_at);
    asm volatile("mov %0, %%es; lldt %w1" ::"r"(DATA_SEL), "r"(0));
}

/* --- interrupt and trap gates --- */

USER_SNIPPETS("user_int: mov %esp, %ecx; int $0x82; user_int_next: int $0x80\n"
              "user_undefined: ud2\n");
extern u8 user_int[], user_int_next[], user_undefined[];

/* Handlers without the runtime: they note what they find, and end the run by vector 0x81. */
volatile struct {
    u32 esp, cs, ss, stack[8], flags;
} noted;
#define NOTE                                                                                      \
    "mov %esp, noted; movl $0, noted + 4; mov %cs, noted + 4; movl $0, noted + 8; mov %ss, noted + 8\n"                        \
    "mov (%esp), %eax; mov %eax, noted + 12; mov 4(%esp), %eax; mov %eax, noted + 16; mov 8(%esp), %eax; mov %eax, noted + 20\n" \
    "mov 12(%esp), %eax; mov %eax, noted + 24; mov 16(%esp), %eax; mov %eax, noted + 28; mov 20(%esp), %eax; mov %eax, noted + 32\n" \
    "mov 24(%esp), %eax; mov %eax, noted + 36; pushf; popl noted + 44\n"
SNIPPETS("note_and_end: " NOTE "int $0x81\n"
         "note_and_iret: " NOTE "iretl\n"
         "note_and_lret: " NOTE "lret\n"
         "note_and_lret_12: " NOTE "lret $12\n"
         "int_82: pushf; orl $0x200, (%esp); popf; int $0x82; int_82_next: cli; ret\n");
extern u8 note_and_end[], note_and_iret[], note_and_lret[], note_and_lret_12[], int_82[], int_82_next[];

static u64 make_gate(u32 type, u32 dpl, u16 selector, word offset, u32 parameters)
{
    return (offset & 0xffff) | (u64)selector << 16 | (u64)parameters << 32 | (u64)(0x80 | dpl << 5 | type) << 40 |
           (u64)(offset >> 16) << 48;
}
enum { CALL16 = 4, INTERRUPT16 = 6, TRAP16 = 7, CALL32 = 12, INTERRUPT32 = 14, TRAP32 = 15 };

static void interrupt_gates(void)
{
    on(0x82, keep);
    set_gate(0x82, 3, 0, INTERRUPT32);
    CAUGHT(int_82, 0);
    check("ring 0: an interrupt gate: CS:EIP", found.cs << 28 | found.ip, CODE_SEL << 28 | (word)int_82_next);
    check("ring 0: IF is saved", found.flags & IF, IF);
    check("ring 0: SS:ESP is not", frame_at < (word)user_stack || frame_at >= (word)user_stack + sizeof user_stack, 1);
    struct trap t = in_ring3(user_int, 0);
    check_trap("ring 3: an interrupt gate", t, 0x82, 0, user_int_next);
    check("ring 3: the stack is that of the TSS", frame_at + __builtin_offsetof(struct frame, v86_es), tss.esp0);
    check("ring 3: SS:ESP", found.ss == USER_DATA_SEL && found.sp == found.cx, 1);
    check("ring 3: CS", found.cs, USER_CODE_SEL);

    *gate(0x82) = make_gate(INTERRUPT32, 3, CODE_SEL, (word)note_and_iret, 0);
    t = CAUGHT(int_82, 0);
    check("an interrupt gate clears IF", noted.flags & IF, 0);
    *gate(0x82) = make_gate(TRAP32, 3, CODE_SEL, (word)note_and_iret, 0);
    t = CAUGHT(int_82, 0);
    check("a trap gate does not", noted.flags & IF, IF);
    t = in_ring3(user_int, 0);
    check_trap("IRET to ring 3", t, 0x80, 0, user_int_next + 2);
    check("with its stack", t.sp == USER_TOP && t.ss == USER_DATA_SEL, 1);

    /* 16-bit gates save 16 bits; their handlers are within 64 KiB of the segment's base. */
    gdt[BASED_CODE / 8] = with_base(0x00409b000000ffff, (word)note_and_end);
    for (u32 type = INTERRUPT16; type <= TRAP16; type++) {
        *gate(0x82) = make_gate(type, 3, BASED_CODE, 0, 0);
        t = CAUGHT(int_82, 0);
        check("a 16-bit gate: IP, CS", noted.stack[0], ((word)int_82_next & 0xffff) | CODE_SEL << 16);
        check("FLAGS", noted.stack[1] & (IF | 0xffff0000 * 0), IF);
        check("IF as with 32 bits", noted.flags & IF, type == TRAP16 ? IF : 0);
        t = in_ring3(user_int, 0);
        check("from ring 3: IP, CS", noted.stack[0], ((word)user_int_next & 0xffff) | USER_CODE_SEL << 16);
        check("FLAGS, SP", noted.stack[1] >> 16, USER_TOP & 0xffff);
        check("SS, on the stack of the TSS", (noted.stack[2] & 0xffff) << 8 | (tss.esp0 - noted.esp), USER_DATA_SEL << 8 | 10);
    }
    gdt[BASED_CODE / 8] = with_base(0x00409b000000ffff, (word)based_code);

    /* Ring 1 has a stack of its own. */
    *gate(0x82) = make_gate(INTERRUPT32, 3, CODE1, (word)note_and_end, 0);
    t = in_ring3(user_int, 0);
    check("ring 3 to ring 1: comes", t.vector, GP);
    set_gate(0x81, 3, 0, INTERRUPT32);
    t = in_ring3(user_int, 0);
    check("ring 3 to ring 1: CS, SS", noted.cs << 16 | noted.ss, (CODE1 | 1) << 16 | DATA1 | 1);
    check("its stack", noted.esp, RING1_TOP - 20);
    check("the frame", noted.stack[1] << 16 | noted.stack[4], USER_CODE_SEL << 16 | USER_DATA_SEL);
    check("from there to ring 0", t.vector << 16 | t.cs, 0x81 << 16 | CODE1 | 1);
    check_trap("ring 0 to ring 1", CAUGHT(int_82, 0), GP, CODE1, int_82_next - 2);
    /* Conforming code runs in the ring that it is called from. */
    *gate(0x82) = make_gate(INTERRUPT32, 3, CONFORMING, (word)note_and_end, 0);
    t = in_ring3(user_int, 0);
    check("ring 3 to conforming code: CS, SS", noted.cs << 16 | noted.ss, (CONFORMING | 3) << 16 | USER_DATA_SEL);
    check("the same stack, three words", noted.esp, USER_TOP - 12);
}

static void bad_interrupts(void)
{
    static const struct {
        const char *name;
        u32 type, dpl;
        u16 selector, stack;
        word esp;
        u32 vector, error;
        bool not_in_tcg;
    } cases[] = {
        {"INT: #GP: a gate of ring 0", INTERRUPT32, 0, CODE_SEL, DATA1 | 1, 0, GP, 0x82 << 3 | IDT_BIT, 0},
        {"INT: #GP: a call gate", CALL32, 3, CODE_SEL, DATA1 | 1, 0, GP, 0x82 << 3 | IDT_BIT, 0},
        {"INT: #GP: a TSS", 9, 3, CODE_SEL, DATA1 | 1, 0, GP, 0x82 << 3 | IDT_BIT, 0},
        {"INT: #GP: data", 0x13, 3, CODE_SEL, DATA1 | 1, 0, GP, 0x82 << 3 | IDT_BIT, 1},
        {"INT: #GP: null as code", INTERRUPT32, 3, 0, DATA1 | 1, 0, GP, 0, 0},
        {"INT: #GP: data as code", INTERRUPT32, 3, DATA_SEL, DATA1 | 1, 0, GP, DATA_SEL, 0},
        {"INT: #GP: beyond the GDT", INTERRUPT32, 3, 0x1000, DATA1 | 1, 0, GP, 0x1000, 0},
        {"INT: #NP: absent code", INTERRUPT32, 3, ABSENT_CODE, DATA1 | 1, 0, NP, ABSENT_CODE, 0},
        {"INT: #GP: an offset beyond the limit", INTERRUPT32, 3, BASED_CODE, DATA1 | 1, 0, GP, 0, 1},
        {"INT: #TS: no stack for ring 1", INTERRUPT32, 3, CODE1, 0, 0, TS, 0, 0},
        {"INT: #TS: a stack with another RPL", INTERRUPT32, 3, CODE1, DATA1, 0, TS, DATA1, 0},
        {"INT: #TS: a stack of another ring", INTERRUPT32, 3, CODE1, DATA_SEL | 1, 0, TS, DATA_SEL, 0},
        {"INT: #TS: a stack that is code", INTERRUPT32, 3, CODE1, CODE1 | 1, 0, TS, CODE1, 0},
        {"INT: #TS: a stack beyond the GDT", INTERRUPT32, 3, CODE1, 0x1001, 0, TS, 0x1000, 0},
        {"INT: #SS: an absent stack", INTERRUPT32, 3, CODE1, ABSENT1 | 1, 0, SS, ABSENT1, 1},
        {"INT: #SS: no room on the stack", INTERRUPT32, 3, CODE1, SMALL1 | 1, 12, SS, SMALL1, 1},
        {"INT: #SS: a stack beyond its limit", INTERRUPT32, 3, CODE1, SMALL1 | 1, 0x1010, SS, SMALL1, 1},
    };
    for (u32 i = 0; i < COUNT(cases); i++) {
        if (cases[i].not_in_tcg && under_tcg())
            continue;
        *gate(0x82) = make_gate(cases[i].type, cases[i].dpl, cases[i].selector, (word)note_and_end, 0);
        tss.ss1 = cases[i].stack;
        tss.esp1 = cases[i].esp;
        check_trap(cases[i].name, in_ring3(user_int, 0), cases[i].vector, cases[i].error, user_int_next - 2);
    }
    tss.ss1 = DATA1 | 1;
    tss.esp1 = RING1_TOP;
    *gate(0x82) &= ~(0x80ull << 40);
    check_trap("INT: #NP: an absent gate", in_ring3(user_int, 0), NP, 0x82 << 3 | IDT_BIT, user_int_next - 2);
    /* A TSS that has the stack of ring 0 only. */
    *gate(0x82) = make_gate(INTERRUPT32, 3, CODE1, (word)note_and_end, 0);
    set_tss_descriptor(TSS_SEL, &tss, 15, 9);
    asm volatile("ltr %w0" ::"r"(TSS_SEL));
    check_trap("INT: #TS: a TSS without a stack for ring 1", in_ring3(user_int, 0), TS, TSS_SEL, user_int_next - 2);
    set_tss_descriptor(TSS_SEL, &tss, sizeof tss - 1, 9);
    asm volatile("ltr %w0" ::"r"(TSS_SEL));
    struct __attribute__((packed)) {
        u16 limit;
        u32 base;
    } usual, small;
    asm volatile("sidt %0" : "=m"(usual));
    small = usual;
    small.limit = 0x82 * 8 + 6;
    asm volatile("lidt %0" ::"m"(small));
    struct trap t = in_ring3(user_int, 0);
    asm volatile("lidt %0" ::"m"(usual));
    check_trap("INT: #GP: beyond the IDT", t, GP, 0x82 << 3 | IDT_BIT, user_int_next - 2);
}

/* --- call gates --- */

struct __attribute__((packed)) {
    u32 offset;
    u16 selector;
} far_pointer;

SNIPPETS("call_far: lcall *far_pointer; call_far_next: ret\n"
         "jump_far_: ljmp *far_pointer\n");
extern u8 call_far[], call_far_next[], jump_far_[];
USER_SNIPPETS("user_call: push $0x33; push $0x22; push $0x11; mov %esp, %ecx; user_call_at: lcall *far_pointer; user_call_next: int $0x80\n"
              "user_call_16: push $0x22; push $0x11; mov %esp, %ecx; lcall *far_pointer; user_call_16_next: int $0x80\n"
              "user_jump: user_jump_at: ljmp *far_pointer\n");
extern u8 user_call[], user_call_at[], user_call_next[], user_call_16[], user_call_16_next[], user_jump[], user_jump_at[];

static void call_gates(void)
{
    on(0x80, keep);
    far_pointer.offset = 0xdeadbeef;
    far_pointer.selector = GATE;
    gdt[GATE / 8] = make_gate(CALL32, 3, CODE_SEL, (word)note_and_lret, 3);
    struct trap t = CAUGHT(call_far, 0);
    check("call gate, ring 0: there and back", t.vector, NO_TRAP);
    check("call gate, ring 0: the same stack, no parameters", noted.stack[0] == (word)call_far_next && noted.stack[1] == CODE_SEL, 1);
    gdt[GATE / 8] = make_gate(CALL32, 3, CODE_SEL, (word)note_and_lret_12, 3);
    t = in_ring3(user_call, 0);
    check_trap("call gate, ring 3: there and back", t, 0x80, 0, user_call_next + 2);
    check("call gate: CS, SS", noted.cs << 16 | noted.ss, CODE_SEL << 16 | DATA_SEL);
    check("call gate: CS:EIP", noted.stack[1] << 24 | noted.stack[0], USER_CODE_SEL << 24 | (word)user_call_next);
    check("call gate: parameters", noted.stack[2] << 16 | noted.stack[3] << 8 | noted.stack[4], 0x112233);
    check("call gate: SS:ESP", noted.stack[6] << 24 | noted.stack[5], USER_DATA_SEL << 24 | found.cx);
    check("call gate: on the stack of the TSS", noted.esp, tss.esp0 - 28);
    check("RET n: releases the parameters on both stacks", found.sp, found.cx + 12);
    check("RET: CS, SS", found.cs << 16 | found.ss, USER_CODE_SEL << 16 | USER_DATA_SEL);
    /* To ring 1. */
    gdt[GATE / 8] = make_gate(CALL32, 3, CODE1, (word)note_and_lret_12, 3);
    t = in_ring3(user_call, 0);
    check_trap("call gate to ring 1", t, 0x80, 0, user_call_next + 2);
    check("its CS, SS", noted.cs << 16 | noted.ss, (CODE1 | 1) << 16 | DATA1 | 1);
    check("its stack", noted.esp, RING1_TOP - 28);
    /* Conforming code: neither ring nor stack changes. */
    gdt[GATE / 8] = make_gate(CALL32, 3, CONFORMING, (word)note_and_lret, 3);
    t = in_ring3(user_call, 0);
    check_trap("call gate to conforming code", t, 0x80, 0, user_call_next + 2);
    /* QEMU shows the ring of the code. */
    if (!under_tcg())
        check("its CS, SS", noted.cs << 16 | noted.ss, (CONFORMING | 3) << 16 | USER_DATA_SEL);
    check("its stack", noted.esp, found.cx - 8);
    /* Without a gate. */
    far_pointer.offset = (word)note_and_lret;
    far_pointer.selector = CONFORMING;
    t = in_ring3(user_call, 0);
    check("far call to conforming code", t.vector << 16 | noted.cs, 0x80 << 16 | CONFORMING | 3);
    far_pointer.selector = CODE_SEL;
    check_trap("far call to ring 0", in_ring3(user_call, 0), GP, CODE_SEL, user_call_at);
    far_pointer.selector = USER_CODE_SEL;
    check_trap("far call from ring 0 to ring 3", CAUGHT(call_far, 0), GP, USER_CODE_SEL & ~3, call_far);
    far_pointer.selector = GATE;
    /* A gate of 16 bits copies words. */
    gdt[BASED_CODE / 8] = with_base(0x00409b000000ffff, (word)note_and_end);
    gdt[GATE / 8] = make_gate(CALL16, 3, BASED_CODE, 0, 2);
    t = in_ring3(user_call_16, 0);
    check("16-bit call gate: IP, CS", noted.stack[0], ((word)user_call_16_next & 0xffff) | USER_CODE_SEL << 16);
    check("16-bit call gate: parameters are words", noted.stack[1], 0x11);
    check("16-bit call gate: SP, SS", noted.stack[2], ((USER_TOP - 8) & 0xffff) | USER_DATA_SEL << 16);
    gdt[BASED_CODE / 8] = with_base(0x00409b000000ffff, (word)based_code);
    /* Jumps through a gate. */
    gdt[GATE / 8] = make_gate(CALL32, 3, CODE_SEL, (word)note_and_end, 0);
    check_trap("JMP through a call gate to ring 0", in_ring3(user_jump, 0), GP, CODE_SEL, user_jump_at);
    t = CAUGHT(jump_far_, 0);
    check("JMP in ring 0", t.vector << 16 | noted.cs, 0x81 << 16 | CODE_SEL);
    gdt[GATE / 8] = make_gate(CALL32, 3, CONFORMING, (word)note_and_end, 0);
    t = in_ring3(user_jump, 0);
    check("JMP to conforming code", t.vector << 16 | noted.cs, 0x81 << 16 | CONFORMING | 3);
    check("the same stack", noted.esp, USER_TOP);
}

static void bad_calls(void)
{
    static const struct {
        const char *name;
        u32 dpl;
        u16 pointer, selector, stack;
        word esp;
        u32 vector, error;
        bool not_in_tcg;
    } cases[] = {
        {"call gate: #GP: of ring 0", 0, GATE, CODE_SEL, DATA1 | 1, 0, GP, GATE, 0},
        {"call gate: #GP: of ring 2", 2, GATE, CODE_SEL, DATA1 | 1, 0, GP, GATE, 0},
        {"call gate: #GP: null as code", 3, GATE, 0, DATA1 | 1, 0, GP, 0, 0},
        {"call gate: #GP: data as code", 3, GATE, DATA_SEL, DATA1 | 1, 0, GP, DATA_SEL, 0},
        {"call gate: #NP: absent code", 3, GATE, ABSENT_CODE, DATA1 | 1, 0, NP, ABSENT_CODE, 0},
        {"call gate: #GP: an offset beyond the limit", 3, GATE, BASED_CODE, DATA1 | 1, 0, GP, 0, 1},
        {"call gate: #TS: no stack", 3, GATE, CODE1, 0, 0, TS, 0, 0},
        {"call gate: #TS: a stack of another ring", 3, GATE, CODE1, DATA_SEL | 1, 0, TS, DATA_SEL, 0},
        {"call gate: #TS: a stack with another RPL", 3, GATE, CODE1, DATA1 | 2, 0, TS, DATA1, 0},
        {"call gate: #SS: an absent stack", 3, GATE, CODE1, ABSENT1 | 1, 0, SS, ABSENT1, 1},
        {"call gate: #SS: no room on the stack", 3, GATE, CODE1, SMALL1 | 1, 20, SS, SMALL1, 1},
    };
    for (u32 i = 0; i < COUNT(cases); i++) {
        if (cases[i].not_in_tcg && under_tcg())
            continue;
        gdt[GATE / 8] = make_gate(CALL32, cases[i].dpl, cases[i].selector, (word)note_and_end, 3);
        far_pointer.selector = cases[i].pointer;
        tss.ss1 = cases[i].stack;
        tss.esp1 = cases[i].esp;
        check_trap(cases[i].name, in_ring3(user_call, 0), cases[i].vector, cases[i].error, user_call_at);
    }
    tss.ss1 = DATA1 | 1;
    tss.esp1 = RING1_TOP;
    gdt[GATE / 8] &= ~(0x80ull << 40);
    check_trap("call gate: #NP: absent", in_ring3(user_call, 0), NP, GATE, user_call_at);
    gdt[GATE / 8] = make_gate(CALL32, 1, CODE_SEL, (word)note_and_end, 0);
    far_pointer.selector = GATE | 2;
    check_trap("call gate: #GP: RPL in ring 0", CAUGHT(call_far, 0), GP, GATE, call_far);
    gdt[GATE / 8] = make_gate(CALL32, 3, USER_CODE_SEL & ~3, (word)note_and_end, 0);
    far_pointer.selector = GATE;
    check_trap("call gate: #GP: from ring 0 to ring 3", CAUGHT(call_far, 0), GP, USER_CODE_SEL & ~3, call_far);
}

/* --- returns to outer rings --- */

/* Far return and IRET by what the argument points to: EIP, CS, (EFLAGS,) ESP, SS, with data segments of ring 0 and ring 3. */
SNIPPETS("return_far: mov $0x10, %eax; mov %eax, %fs; mov $0x33, %eax; mov %eax, %gs\n"
         "push 16(%edx); push 12(%edx); push 4(%edx); push (%edx); return_far_at: lret\n"
         "return_interrupt: mov $0x10, %eax; mov %eax, %fs; mov $0x33, %eax; mov %eax, %gs\n"
         "push 16(%edx); push 12(%edx); push 8(%edx); push 4(%edx); push (%edx); return_interrupt_at: iretl\n");
extern u8 return_far[], return_far_at[], return_interrupt[], return_interrupt_at[];
USER_SNIPPETS("user_here: user_here_next: int $0x80\n"
              "user_inward: push $0x10; push $0; push $8; push $0; user_inward_at: lret\n"
              "user_flags: pushf; orl $0x3200, (%esp); push $0x2b; push $1f; iretl; 1: pushf; pop %eax; int $0x80\n");
extern u8 user_here[], user_inward[], user_inward_at[], user_flags[];

static void returns(void)
{
    struct {
        word ip, cs, flags, sp, ss;
    } to;
    static const struct {
        const char *name;
        u16 cs, ss;
        u32 vector, error;
        word ip;
        bool not_in_tcg;
    } cases[] = {
        {"to ring 3", USER_CODE_SEL, USER_DATA_SEL, 0x80, 0, 0, 0},
        {"#GP: to null", 0, USER_DATA_SEL, GP, 0, 0, 0},
        {"#GP: to data", USER_DATA_SEL, USER_DATA_SEL, GP, USER_DATA_SEL & ~3, 0, 0},
        {"#GP: to code of ring 0 with RPL 3", CODE_SEL | 3, USER_DATA_SEL, GP, CODE_SEL, 0, 0},
        {"#GP: to code of ring 1 with RPL 3", CODE1 | 3, USER_DATA_SEL, GP, CODE1, 0, 0},
        {"#NP: to absent code", ABSENT_CODE, USER_DATA_SEL, NP, ABSENT_CODE, 0, 0},
        {"#GP: a null stack", USER_CODE_SEL, 0, GP, 0, 0, 0},
        {"#GP: a stack with another RPL", USER_CODE_SEL, USER_DATA_SEL & ~3, GP, USER_DATA_SEL & ~3, 0, 0},
        {"#GP: a stack of another ring", USER_CODE_SEL, DATA1 | 3, GP, DATA1, 0, 0},
        {"#GP: a stack that is code", USER_CODE_SEL, USER_CODE_SEL, GP, USER_CODE_SEL & ~3, 0, 0},
        {"to conforming code in ring 3", CONFORMING | 3, USER_DATA_SEL, 0x80, 0, 0, 0},
        {"to ring 1", CODE1 | 1, DATA1 | 1, GP, 0x80 << 3 | IDT_BIT, 0, 0},
    };
    set_gate(0x80, 3, 0, INTERRUPT32);
    for (u32 interrupt = 0; interrupt < 2; interrupt++) {
        say(interrupt ? "IRET:\n" : "RET:\n");
        for (u32 i = 0; i < COUNT(cases); i++) {
            to.ip = (word)user_here;
            to.cs = cases[i].cs;
            to.flags = 2;
            to.sp = USER_TOP;
            to.ss = cases[i].ss;
            bool ring1 = (to.cs & 3) == 1, arrives = cases[i].vector == 0x80 || ring1;
            if (ring1)
                set_gate(0x80, 0, 0, INTERRUPT32);
            struct trap t = CAUGHT(interrupt ? return_interrupt : return_far, &to);
            set_gate(0x80, 3, 0, INTERRUPT32);
            const u8 *at = cases[i].vector == 0x80 ? user_here + 2 : ring1 ? user_here : interrupt ? return_interrupt_at : return_far_at;
            check_trap(cases[i].name, t, cases[i].vector, cases[i].error, at);
            check_quietly("in which segment", t.cs, arrives ? cases[i].cs : CODE_SEL);
            if (cases[i].vector == 0x80)
                check_quietly("data segments: of ring 3 or null", found.fs << 16 | found.gs, 0 << 16 | USER_DATA_SEL);
        }
    }
    check_trap("ring 3: RET to ring 0", in_ring3(user_inward, 0), GP, CODE_SEL, user_inward_at);
    struct trap t = in_ring3(user_flags, 0);
    check("ring 3: IRET changes neither IF nor IOPL", t.vector << 16 | (t.value & 0x3200), 0x80 << 16);
    /* Beyond the limit of the code. */
    if (!under_tcg()) {
        to.ip = 0x10000;
        to.cs = BASED_CODE;
        check_trap("RET: an offset beyond the limit", CAUGHT(return_far, &to), GP, 0, return_far_at);
        check_trap("IRET: an offset beyond the limit", CAUGHT(return_interrupt, &to), GP, 0, return_interrupt_at);
    }
}

/* Rings 1 and 2 are no more than ring 3 to privileged instructions, and as IOPL says to the others. */
static void ring1(void)
{
    USER_SNIPPETS("ring1_hlt: hlt\n"
                  "ring1_cli: cli; ring1_cli_next: int $0x80\n"
                  "ring1_cr0: mov %cr0, %eax\n");
    extern u8 ring1_hlt[], ring1_cli[], ring1_cli_next[], ring1_cr0[];
    struct far_state state = {(word)ring1_hlt, RING1_TOP, CODE1 | 1, DATA1 | 1, 2, 0};
    check_trap("ring 1: #GP: HLT", caught_far(state), GP, 0, ring1_hlt);
    state.ip = (word)ring1_cr0;
    check_trap("ring 1: #GP: MOV from CR0", caught_far(state), GP, 0, ring1_cr0);
    state.ip = (word)ring1_cli;
    check_trap("ring 1: #GP: CLI with IOPL 0", caught_far(state), GP, 0, ring1_cli);
    state.flags |= 0x1000;
    check_trap("ring 1: CLI with IOPL 1", caught_far(state), 0x80, 0, ring1_cli_next + 2);
}

/* --- SYSENTER and SYSEXIT --- */

USER_SNIPPETS("user_sysenter: mov %esp, %ecx; mov $user_sysenter_next, %edx; user_sysenter_at: sysenter\n"
              "user_sysenter_next: mov %cs, %eax; mov %ss, %ebx; int $0x80\n"
              "user_sysexit: sysexit\n");
extern u8 user_sysenter[], user_sysenter_at[], user_sysenter_next[], user_sysexit[];
SNIPPETS("sysenter_entry: " NOTE "sysexit\n");
extern u8 sysenter_entry[];

static void fast_calls(void)
{
    if (!(cpuid(1, 0).d >> 11 & 1)) {
        say("no SYSENTER\n");
        return;
    }
    static u8 stack[256] __attribute__((aligned(16)));
    wrmsr(0x174, 0);
    check_trap("#GP: SYSENTER without a segment", in_ring3(user_sysenter, 0), GP, 0, user_sysenter_at);
    wrmsr(0x174, CODE_SEL);
    wrmsr(0x175, (word)stack + 128);
    wrmsr(0x176, (word)sysenter_entry);
    struct trap t = in_ring3(user_sysenter, 0);
    check_trap("SYSENTER, SYSEXIT", t, 0x80, 0, user_sysenter_next + 6);
    check("SYSENTER: CS, SS", noted.cs << 16 | noted.ss, CODE_SEL << 16 | DATA_SEL);
    check("SYSENTER: ESP", noted.esp, (word)stack + 128);
    check("SYSENTER: IF is clear", noted.flags & IF, 0);
    check("SYSEXIT: CS, SS", (found.ax & 0xffff) << 16 | (found.bx & 0xffff), (CODE_SEL + 16 + 3) << 16 | (CODE_SEL + 24 + 3));
    check("SYSEXIT: ESP", found.sp, USER_TOP);
    check_trap("ring 3: #GP: SYSEXIT", in_ring3(user_sysexit, 0), GP, 0, user_sysexit);
}

/* --- 16-bit segments --- */

SNIPPETS("in_16_bits: push %ebx; mov %esp, %ebx; push $0x20; pop %ss; mov $0x9000, %esp; ljmp $0x18, $0x8000\n"
         ".code16\n"
         "low_code: mov $0x1234, %ax; mov %sp, %cx; push %ax; sub %sp, %cx; pushl $5; popl %edx; mov $0xffff8ffc, %esp; push %ax\n"
         "mov %esp, %edx; mov $0x10, %ax; mov %ax, %ss; mov %ebx, %esp; ljmpl $8, $back_in_32_bits\n"
         "low_code_end:\n"
         ".code32\n"
         "back_in_32_bits: pop %ebx; mov %ecx, %eax; shl $24, %eax; and $0xffffff, %edx; or %edx, %eax; ret\n");
extern u8 in_16_bits[], low_code[], low_code_end[];

static void small_segments(void)
{
    memcpy((void *)0x8000, low_code, low_code_end - low_code);
    struct trap t = CAUGHT(in_16_bits, 0);
    check("16-bit segments: words are pushed, SP has 16 bits", t.value, 2 << 24 | 0xff8ffa);
}

void run(void)
{
    make_descriptors();
    set_gate(0x80, 3, 0, INTERRUPT32);
    simple();
    if (!left_out("LAR, LSL, VERR, VERW, LDTs"))
        questions();
    small_segments();
    if (left_out("IRET, other rings, far calls, jumps and returns"))
        return;
    interrupt_gates();
    bad_interrupts();
    call_gates();
    bad_calls();
    returns();
    ring1();
    fast_calls();
}
