/* Hardware task switches: by far jumps and calls, through task gates, by exceptions and interrupts, and back by IRET with NT set; what
   is saved and loaded, which descriptor is busy, and who answers for a fault. SDM vol. 3A chapter 7. */
#include "chips.h"

#define TASK_SEL 0x108
#define FAULT_SEL 0x110
#define GATE_SEL 0x118
#define LDT_SEL 0x120
#define EXTERNAL 1
#define IDT_BIT 2

/* A second task, one that takes what goes wrong in it, and a task of an 80286. */
static struct tss task, fault_task;
static struct {
    u16 link, sp0, ss0, sp1, ss1, sp2, ss2, ip, flags, ax, cx, dx, bx, sp, bp, si, di, es, cs, ss, ds, ldt;
} task16;

/* What a task finds when it runs. */
volatile struct {
    u32 eax, ebx, esp, top, flags, tr, cr0, cr3, ldt, fs, main_descriptor, task_descriptor, count, dr7;
} noted;

/* What a task calls, and where it goes on then. */
void (*hook)(void);
const u8 *way_out;
static void nothing(void) {}

struct __attribute__((packed)) {
    u32 offset;
    u16 selector;
} task_pointer;

SNIPPETS("task_entry: mov %eax, noted; mov %ebx, noted + 4; mov %esp, noted + 8; mov (%esp), %eax; mov %eax, noted + 12\n"
         "pushf; popl noted + 16; str %eax; mov %eax, noted + 20; mov %cr0, %eax; mov %eax, noted + 24; mov %cr3, %eax\n"
         "mov %eax, noted + 28; sldt %eax; mov %eax, noted + 32; mov %fs, %eax; mov %eax, noted + 36\n"
         "mov gdt + 0x104, %eax; mov %eax, noted + 40; mov gdt + 0x10c, %eax; mov %eax, noted + 44; incl noted + 48\n"
         "mov %dr7, %eax; mov %eax, noted + 52\n"
         "call *hook; jmp *way_out\n"
         "out_iret: iretl; out_iret_next: jmp task_entry\n"
         "out_iret_error: add $4, %esp; iretl; jmp task_entry\n"
         "out_jump: ljmp $0x100, $0; jmp task_entry\n"
         "out_trap: int $0x81\n");
extern u8 task_entry[], out_iret[], out_iret_next[], out_iret_error[], out_jump[], out_trap[];

SNIPPETS("call_task: lcall *task_pointer; call_task_next: pushf; pop %eax; ret\n"
         "jump_task: mov $0x11111111, %eax; mov $0x22222222, %ebx; mov $0x33333333, %ebp; mov $0x44444444, %edi\n"
         "jump_task_at: ljmp *task_pointer; jump_task_next: ret\n"
         "undefined: undefined_at: ud2; ret\n"
         "load_absent: mov $0x4008, %eax; load_absent_at: mov %eax, %es; ret\n"
         "interrupt: int $0x82; interrupt_next: ret\n"
         "return_nested: pushf; orl $0x4000, (%esp); popf; return_nested_at: iretl\n"
         "overflow: mov %edx, %esp; overflow_at: push %eax; ret\n"
         "fpu: fninit; ret\n"
         "wait_tick: sti; 1: cmpl $0, noted + 48; je 1b; cli; ret\n");
extern u8 call_task[], call_task_next[], jump_task[], jump_task_at[], jump_task_next[], undefined[], undefined_at[], load_absent[],
    load_absent_at[], interrupt[], interrupt_next[], return_nested[], return_nested_at[], overflow[], overflow_at[], fpu[],
    wait_tick[];
USER_SNIPPETS("user_call: lcall *task_pointer; user_call_next: int $0x80\n"
              "user_undefined: ud2; int $0x80\n"
              "user_interrupt: int $0x82; user_interrupt_next: int $0x80\n");
extern u8 user_call[], user_call_next[], user_undefined[], user_interrupt[], user_interrupt_next[];

static u8 user_stack[1024] __attribute__((aligned(16)));
static struct trap in_ring3(const u8 *code)
{
    return caught_far(
        (struct far_state){(word)code, (word)user_stack + sizeof user_stack, USER_CODE_SEL, USER_DATA_SEL, 2, 0});
}

static u8 task_stack[4096] __attribute__((aligned(16))), fault_stack[4096] __attribute__((aligned(16)));
#define TASK_TOP ((word)task_stack + sizeof task_stack - 16)
#define FAULT_TOP ((word)fault_stack + sizeof fault_stack - 16)

static void fill(struct tss *t, word top)
{
    memset(t, 0, 104);
    t->link = 0xabcd;
    t->cr3 = read_cr3();
    t->eip = (word)task_entry;
    t->eflags = 2;
    t->eax = 0x5a5a5a5a;
    t->ebx = 0xb0b0b0b0;
    t->esp = top;
    t->cs = CODE_SEL;
    t->ss = t->ds = t->es = t->fs = DATA_SEL;
    t->ss0 = DATA_SEL;
    t->esp0 = (word)fault_stack + 2048;
    t->iomap = 104;
}

static u32 type_of(u64 descriptor) { return descriptor >> 40 & 0xf; }
static u32 type_now(u32 selector) { return type_of(gdt[selector / 8]); }
static u32 type_noted(u32 upper_half) { return upper_half >> 8 & 0xf; }
enum { AVAILABLE = 9, BUSY = 11 };

/* The main task again, whichever runs; the others as new. */
static void start_over(void)
{
    set_tss_descriptor(TSS_SEL, &tss, sizeof tss - 1, AVAILABLE);
    set_tss_descriptor(TASK_SEL, &task, 103, AVAILABLE);
    set_tss_descriptor(FAULT_SEL, &fault_task, 103, AVAILABLE);
    gdt[GATE_SEL / 8] = TASK_SEL << 16 | 0x85ull << 40;
    asm volatile("ltr %w0; lldt %w1; clts" ::"r"(TSS_SEL), "r"(0));
    fill(&task, TASK_TOP);
    fill(&fault_task, FAULT_TOP);
    tss.link = 0;
    tss.cr3 = read_cr3();
    memset((void *)&noted, 0, sizeof noted);
    hook = nothing;
    way_out = out_iret;
    task_pointer.offset = 0xdeadbeef;
    task_pointer.selector = TASK_SEL;
}

static void task_gate(u32 vector, u32 selector, u32 dpl) { *gate(vector) = selector << 16 | (u64)(0x85 | dpl << 5) << 40; }
static void usual_gate(u32 vector) { set_gate(vector, 0, 0, 14); }

static u32 task_register(void)
{
    word tr;
    asm volatile("str %0" : "=r"(tr));
    return tr;
}

/* --- jumps and calls --- */

static void jumps(void)
{
    start_over();
    way_out = out_jump;
    struct trap t = CAUGHT(jump_task, 0);
    check("JMP: there and back", t.vector == NO_TRAP && noted.count == 1, 1);
    check("JMP: registers of the new task", noted.eax == 0x5a5a5a5a && noted.ebx == 0xb0b0b0b0 && noted.esp == TASK_TOP, 1);
    check("JMP: flags", noted.flags & ~(word)0x10, 2);
    check("JMP: TR", noted.tr, TASK_SEL);
    check("JMP: CR0.TS is set", noted.cr0 & CR0_TS, CR0_TS);
    check("JMP: the new task is busy, the old one is not",
          type_noted(noted.main_descriptor) << 8 | type_noted(noted.task_descriptor), AVAILABLE << 8 | BUSY);
    check("JMP: and back", type_now(TSS_SEL) << 8 | type_now(TASK_SEL), BUSY << 8 | AVAILABLE);
    check("JMP: no link", task.link, 0xabcd);
    check("JMP: the old task's EIP", tss.eip, (word)jump_task_next);
    check("JMP: its registers", tss.eax == 0x11111111 && tss.ebx == 0x22222222 && tss.ebp == 0x33333333 && tss.edi == 0x44444444, 1);
    check("JMP: its segments", tss.cs << 16 | tss.ds, CODE_SEL << 16 | DATA_SEL);
    check("JMP: are what it has again", t.value, 0x11111111);
    check("JMP: static fields are not written", tss.cr3 == read_cr3() && task.esp0 == (word)fault_stack + 2048, 1);
    check_trap("JMP: #NM then", CAUGHT(fpu, 0), NM, 0, fpu);

    start_over();
    task_pointer.selector = GATE_SEL;
    way_out = out_jump;
    t = CAUGHT(jump_task, 0);
    check("JMP through a task gate", t.vector == NO_TRAP && noted.tr == TASK_SEL, 1);
    check("the task goes on behind its jump when it runs again", task.eip != (word)task_entry, 1);
    t = CAUGHT(jump_task, 0);
    check("which it does", noted.count, 2);
}

static void calls(void)
{
    for (u32 i = 0; i < 2; i++) {
        start_over();
        task_pointer.selector = i ? GATE_SEL : TASK_SEL;
        struct trap t = CAUGHT(call_task, 0);
        check(i ? "CALL through a task gate: there and back" : "CALL: there and back", t.vector == NO_TRAP && noted.count == 1, 1);
        check("CALL: NT in the new task", noted.flags & NT, NT);
        check("CALL: both are busy", type_noted(noted.main_descriptor) << 8 | type_noted(noted.task_descriptor), BUSY << 8 | BUSY);
        check("CALL: the link", task.link, TSS_SEL);
        check("CALL: the old task's EIP", tss.eip, (word)call_task_next);
        check("IRET: one is free again", type_now(TSS_SEL) << 8 | type_now(TASK_SEL), BUSY << 8 | AVAILABLE);
        check("IRET: TR", task_register(), TSS_SEL);
        check("IRET: NT is clear in both", (t.value & NT) << 16 | (task.eflags & NT), 0);
        check("IRET: the task's EIP is behind it", task.eip, (word)out_iret_next);
        CAUGHT(call_task, 0);
        check("CALL: where it goes on the next time", noted.count, 2);
    }
    /* Nested: the second calls the third. */
    start_over();
    SNIPPETS("call_fault_task: lcall $0x110, $0; jmp out_iret\n");
    extern u8 call_fault_task[];
    task.eip = (word)call_fault_task;
    struct trap t = CAUGHT(call_task, 0);
    check("nested calls", t.vector == NO_TRAP && noted.tr == FAULT_SEL, 1);
    check("their links", fault_task.link << 16 | task.link, TASK_SEL << 16 | TSS_SEL);
    check("nobody else is busy after all", type_now(TSS_SEL) << 8 | type_now(TASK_SEL) << 4 | type_now(FAULT_SEL),
          BUSY << 8 | AVAILABLE << 4 | AVAILABLE);
}

static void from_ring3(void)
{
    start_over();
    check_trap("ring 3: a TSS of ring 0", in_ring3(user_call), GP, TASK_SEL, user_call);
    task_pointer.selector = GATE_SEL;
    check_trap("ring 3: a task gate of ring 0", in_ring3(user_call), GP, GATE_SEL, user_call);
    gdt[GATE_SEL / 8] |= 0x60ull << 40;
    struct trap t = in_ring3(user_call);
    check("ring 3: a task gate of ring 3 with a TSS of ring 0", t.vector << 16 | noted.count, 0x80 << 16 | 1);
    check("ring 3: it comes back", t.cs, USER_CODE_SEL);
    check("ring 3: behind the call", t.ip, (word)user_call_next + 2);
    start_over();
    gdt[TASK_SEL / 8] |= 0x60ull << 40;
    t = in_ring3(user_call);
    check("ring 3: a TSS of ring 3", t.vector << 16 | noted.count, 0x80 << 16 | 1);
}

/* --- what cannot be switched to --- */

static void refused(void)
{
    start_over();
    task_pointer.selector = TSS_SEL;
    check_trap("JMP: #GP: a busy TSS", CAUGHT(jump_task, 0), GP, TSS_SEL, jump_task_at);
    check_trap("CALL: #GP: a busy TSS", CAUGHT(call_task, 0), GP, TSS_SEL, call_task);
    start_over();
    gdt[TASK_SEL / 8] &= ~(0x80ull << 40);
    check_trap("#NP: an absent TSS", CAUGHT(jump_task, 0), NP, TASK_SEL, jump_task_at);
    task_pointer.selector = GATE_SEL;
    check_trap("#NP: through a gate", CAUGHT(jump_task, 0), NP, TASK_SEL, jump_task_at);
    start_over();
    task_pointer.selector = GATE_SEL;
    gdt[GATE_SEL / 8] &= ~(0x80ull << 40);
    check_trap("#NP: an absent task gate", CAUGHT(jump_task, 0), NP, GATE_SEL, jump_task_at);
    static const struct {
        const char *name;
        u16 selector, error;
    } targets[] = {
        {"#GP: a task gate to null", 0, 0},
        {"#GP: a task gate to data", DATA_SEL, DATA_SEL},
        {"#GP: a task gate beyond the GDT", 0x4000, 0x4000},
        {"#GP: a task gate to the running task", TSS_SEL, TSS_SEL},
        /* QEMU says #TS. */
        {"#GP: a task gate to the LDT", TASK_SEL | 4, TASK_SEL | 4},
    };
    for (u32 i = 0; i < COUNT(targets) - under_tcg(); i++) {
        start_over();
        gdt[GATE_SEL / 8] = targets[i].selector << 16 | 0x85ull << 40;
        task_pointer.selector = GATE_SEL;
        check_trap(targets[i].name, CAUGHT(jump_task, 0), GP, targets[i].error, jump_task_at);
    }
    start_over();
    set_tss_descriptor(TASK_SEL, &task, 102, AVAILABLE);
    check_trap("#TS: a limit that is too small", CAUGHT(jump_task, 0), TS, TASK_SEL, jump_task_at);
    check("nothing has changed", task_register() << 16 | type_now(TSS_SEL), TSS_SEL << 16 | BUSY);
    /* Back to a task that does not wait. */
    start_over();
    tss.link = TASK_SEL;
    check_trap("IRET: #TS: a task that is not busy", CAUGHT(return_nested, 0), TS, TASK_SEL, return_nested_at);
    tss.link = 0;
    check_trap("IRET: #TS: none at all", CAUGHT(return_nested, 0), TS, 0, return_nested_at);
    tss.link = DATA_SEL;
    check_trap("IRET: #TS: data", CAUGHT(return_nested, 0), TS, DATA_SEL, return_nested_at);
}

/* The new task's own faults, which come when it runs: taken by a third task. */
static void bad_tasks(void)
{
    enum { ABSENT_DATA = FREE_SEL, ABSENT_CODE = FREE_SEL + 8, EXECUTE_ONLY = FREE_SEL + 16, SMALL_CODE = FREE_SEL + 24 };
    gdt[ABSENT_DATA / 8] = 0x00cf13000000ffff;
    gdt[ABSENT_CODE / 8] = 0x00cf1b000000ffff;
    gdt[EXECUTE_ONLY / 8] = 0x00cf99000000ffff;
    gdt[SMALL_CODE / 8] = 0x00409b000000ffff;
    static const struct {
        const char *name;
        u32 offset;
        u16 value;
        u32 vector, error;
        bool not_in_tcg;
    } cases[] = {
#define FIELD(name) __builtin_offsetof(struct tss, name)
        {"#TS: CS is data", FIELD(cs), DATA_SEL, TS, DATA_SEL, 0},
        {"#TS: CS is null", FIELD(cs), 0, TS, 0, 0},
        {"#TS: CS is of ring 3, its RPL not", FIELD(cs), USER_CODE_SEL & ~3, TS, USER_CODE_SEL & ~3, 0},
        {"#NP: CS is absent", FIELD(cs), ABSENT_CODE, NP, ABSENT_CODE, 0},
        {"#TS: SS is null", FIELD(ss), 0, TS, 0, 0},
        {"#TS: SS is of ring 3", FIELD(ss), USER_DATA_SEL, TS, USER_DATA_SEL & ~3, 0},
        {"#TS: SS is code", FIELD(ss), CODE_SEL, TS, CODE_SEL, 0},
        {"#SS: SS is absent", FIELD(ss), ABSENT_DATA, SS, ABSENT_DATA, 1},
        {"#TS: DS cannot be read", FIELD(ds), EXECUTE_ONLY, TS, EXECUTE_ONLY, 0},
        {"#TS: GS is a TSS", FIELD(gs), TSS_SEL, TS, TSS_SEL, 0},
        {"#NP: ES is absent", FIELD(es), ABSENT_DATA, NP, ABSENT_DATA, 0},
        {"#TS: the LDT is data", FIELD(ldt), DATA_SEL, TS, DATA_SEL, 0},
        {"#TS: the LDT is in the LDT", FIELD(ldt), 0xc, TS, 0xc, 0},
        /* QEMU forgets the limit. */
        {"#GP: EIP is beyond CS", FIELD(cs), SMALL_CODE, GP, 0, 1},
    };
    for (u32 i = 0; i < COUNT(cases); i++) {
        if (cases[i].not_in_tcg && under_tcg())
            continue;
        start_over();
        memcpy((u8 *)&task + cases[i].offset, &cases[i].value, 2);
        way_out = out_trap;
        task_gate(cases[i].vector, FAULT_SEL, 0);
        struct trap t = CAUGHT(jump_task, 0);
        usual_gate(cases[i].vector);
        bool right = check_quietly(cases[i].name, t.vector, 0x81);
        right &= check_quietly("the error code", noted.top, cases[i].error);
        right &= check_quietly("it is the new task's fault", noted.tr << 16 | fault_task.link, FAULT_SEL << 16 | TASK_SEL);
        /* In QEMU where the old task was. */
        if (!under_tcg())
            right &= check_quietly("at its first instruction", task.eip, (word)task_entry);
        check(cases[i].name, right, 1);
    }
}

/* --- exceptions and interrupts --- */

static void skip_2(void) { tss.eip += 2; }
static void end_of_interrupt(void) { pic_eoi(0); }

static void events(void)
{
    start_over();
    task_gate(UD, TASK_SEL, 0);
    hook = skip_2;
    struct trap t = CAUGHT(undefined, 0);
    check("an exception's task comes back where it says", t.vector == NO_TRAP && noted.count == 1, 1);
    check("the instruction that failed", tss.eip, (word)undefined_at + 2);
    check("NT, and the link", (noted.flags & NT) << 16 | task.link, NT << 16 | TSS_SEL);
    /* QEMU knows nothing of RF. */
    if (!under_tcg())
        check("RF is in the saved flags of a fault", tss.eflags & RF, RF);
    check("no error code", noted.esp, TASK_TOP);
    t = CAUGHT(undefined, 0);
    check("the same task again", noted.count, 2);
    usual_gate(UD);

    start_over();
    task_gate(GP, TASK_SEL, 0);
    hook = skip_2;
    way_out = out_iret_error;
    t = CAUGHT(load_absent, 0);
    check("an exception with an error code", t.vector == NO_TRAP && noted.top == 0x4008, 1);
    check("which is on the new task's stack", noted.esp, TASK_TOP - 4);
    usual_gate(GP);

    start_over();
    task_gate(0x82, TASK_SEL, 0);
    t = CAUGHT(interrupt, 0);
    check("INT n by a task", t.vector == NO_TRAP && noted.count == 1 && tss.eip == (word)interrupt_next, 1);
    check("IF is the new task's", noted.flags & IF, 0);
    check_trap("ring 3: INT n through a task gate of ring 0", in_ring3(user_interrupt), GP, 0x82 << 3 | IDT_BIT, user_interrupt);
    task_gate(0x82, TASK_SEL, 3);
    t = in_ring3(user_interrupt);
    check("ring 3: through one of ring 3", t.vector << 16 | noted.count, 0x80 << 16 | 2);
    gdt[TASK_SEL / 8] |= 2ull << 40;
    check_trap("INT n: #GP: the task is busy", CAUGHT(interrupt, 0), GP, TASK_SEL, interrupt);
    task_gate(UD, TASK_SEL, 0);
    /* QEMU does not tell external events apart. */
    check_trap("#UD: #GP: the task is busy", CAUGHT(undefined, 0), GP, TASK_SEL | (under_tcg() ? 0 : EXTERNAL), undefined_at);
    usual_gate(UD);
    usual_gate(0x82);

    start_over();
    pic_init();
    task_gate(PIC_VECTOR, TASK_SEL, 0);
    hook = end_of_interrupt;
    pit_start(0, 2000);
    pic_allow(1 << 0);
    t = CAUGHT(wait_tick, 0);
    pic_allow(0);
    check("an external interrupt by a task", t.vector == NO_TRAP && noted.tr == TASK_SEL, 1);
    check("IF is in the saved flags", tss.eflags & IF, IF);
    usual_gate(PIC_VECTOR);
}

/* The reason why there are task gates: no stack is left. */
static void double_faults(void)
{
    start_over();
    task_gate(DF, FAULT_SEL, 0);
    way_out = out_trap;
    u32 ss0 = tss.ss0;
    tss.ss0 = 0;
    struct trap t = in_ring3(user_undefined);
    tss.ss0 = ss0;
    check("no stack for ring 0: a double fault, by a task", t.vector << 16 | noted.tr, 0x81 << 16 | FAULT_SEL);
    check("its error code", noted.top, 0);
    check("in ring 3", tss.cs << 16 | (tss.eip == (word)user_undefined), USER_CODE_SEL << 16 | 1);
    usual_gate(DF);
}

/* --- address spaces, LDTs, debug --- */

#define TEST 0x80000000u
/* The page that TEST is in this address space. */
static volatile u8 there;
static void look(void) { there = *(volatile u8 *)TEST; }

static void address_spaces(void)
{
    u32 *one = allocate(PAGE), *two = allocate(PAGE), *table_one = allocate(PAGE), *table_two = allocate(PAGE);
    u8 *page_one = allocate(PAGE), *page_two = allocate(PAGE);
    for (u32 i = 0; i < 1024; i++)
        one[i] = two[i] = i << 22 | 0x87;
    one[TEST >> 22] = (word)table_one | 7;
    two[TEST >> 22] = (word)table_two | 7;
    table_one[0] = (word)page_one | 7;
    table_two[0] = (word)page_two | 7;
    *page_one = 1;
    *page_two = 2;
    write_cr4(read_cr4() | CR4_PSE);
    write_cr3((word)one);
    write_cr0(read_cr0() | CR0_PG);
    start_over();
    task.cr3 = (word)two;
    hook = look;
    look();
    u8 before = there;
    struct trap t = CAUGHT(call_task, 0);
    u8 inside = there;
    look();
    check("CR3: each task has its address space", t.vector == NO_TRAP && before == 1 && inside == 2 && there == 1, 1);
    check("CR3: of the task", noted.cr3, (word)two);
    check("CR3: of the first again", read_cr3(), (word)one);

    /* A stack that runs into an absent page, in ring 0. */
    start_over();
    task_gate(DF, FAULT_SEL, 0);
    way_out = out_trap;
    t = CAUGHT(overflow, TEST + 2 * PAGE);
    check("a stack overflow in ring 0: a double fault, by a task", t.vector << 16 | noted.tr, 0x81 << 16 | FAULT_SEL);
    check("where it was", tss.eip == (word)overflow_at && tss.esp == TEST + 2 * PAGE, 1);
    check("CR2", read_cr2() & ~0xfffu, TEST + PAGE);
    usual_gate(DF);
    write_cr0(read_cr0() & ~CR0_PG);
    start_over();
}

static void local_tables(void)
{
    start_over();
    static u64 ldt[2];
    ldt[1] = 0x00cf93000000ffff;
    set_tss_descriptor(LDT_SEL, ldt, sizeof ldt - 1, 2);
    task.ldt = LDT_SEL;
    task.fs = 0xc;
    struct trap t = CAUGHT(call_task, 0);
    check("LDT: the new task's", t.vector == NO_TRAP && noted.ldt == LDT_SEL && noted.fs == 0xc, 1);
    word now;
    asm volatile("sldt %0" : "=r"(now));
    check("LDT: the first task has none", now, 0);
}

static word read_dr6(void)
{
    word v;
    asm volatile("mov %%dr6, %0" : "=r"(v));
    return v;
}

static void debugging(void)
{
    start_over();
    asm volatile("mov %0, %%dr6" ::"r"(0xffff0ff0));
    task.trap = 1;
    struct trap t = CAUGHT(jump_task, 0);
    /* QEMU does not know it. */
    if (!under_tcg()) {
        check_trap("T: a debug trap before the first instruction", t, DB, 0, task_entry);
        check("T: DR6 says so", read_dr6() & 0xe00f, 0x8000);
        check("T: in the new task", task_register(), TASK_SEL);
    }
    start_over();
    /* Breakpoints at an address that is never executed: one local, one global. */
    asm volatile("mov %0, %%dr0; mov %0, %%dr1; mov %1, %%dr7" ::"r"(0xfffffff0), "r"(0x409));
    CAUGHT(call_task, 0);
    check("DR7: local breakpoints end with the task", noted.dr7 & 0xff, 8);
    asm volatile("mov %0, %%dr7" ::"r"(0x400));
}

/* --- other kinds of tasks --- */

SNIPPETS("task16_entry: mov %ax, noted; mov %sp, noted + 8; pushf; popl noted + 16; str %eax; mov %eax, noted + 20\n"
         "mov $0x7777, %ax; iretl\n");
extern u8 task16_entry[];

static void old_tasks(void)
{
    static u8 stack[256] __attribute__((aligned(16)));
    start_over();
    u32 code = (word)task16_entry, data = (word)stack;
    /* 32-bit code and a 16-bit stack where 16 bits reach them. */
    gdt[FREE_SEL / 8] = 0x00409b000000ffff | (u64)(code & 0xffffff) << 16 | (u64)(code >> 24) << 56;
    gdt[FREE_SEL / 8 + 1] = 0x000093000000ffff | (u64)(data & 0xffffff) << 16 | (u64)(data >> 24) << 56;
    memset(&task16, 0, sizeof task16);
    task16.flags = 2;
    task16.ax = 0x1234;
    task16.sp = 0xf0;
    task16.cs = FREE_SEL;
    task16.ss = FREE_SEL + 8;
    task16.ds = task16.es = DATA_SEL;
    set_tss_descriptor(TASK_SEL, &task16, 43, 1);
    struct trap t = CAUGHT(call_task, 0);
    check("80286: there and back", t.vector == NO_TRAP && noted.tr == TASK_SEL, 1);
    check("80286: registers of 16 bits", (noted.eax & 0xffff) << 16 | (noted.esp & 0xffff), 0x123400f0);
    check("80286: NT, and the link", (noted.flags & NT) << 16 | task16.link, NT << 16 | TSS_SEL);
    check("80286: they are saved in 16 bits", task16.ax << 16 | task16.sp, 0x777700f0);
    check("80286: free again", type_now(TASK_SEL), 1);
    start_over();
    set_tss_descriptor(TASK_SEL, &task16, 42, 1);
    check_trap("80286: #TS: a limit that is too small", CAUGHT(jump_task, 0), TS, TASK_SEL, jump_task_at);
}

static void virtual_8086_task(void)
{
    start_over();
    u8 *code = (u8 *)0x8000;
    code[0] = 0x90;
    code[1] = 0x0f;
    code[2] = 0x0b;
    task.eip = 0;
    task.eflags = VM | 2;
    task.cs = 0x800;
    task.ss = task.ds = task.es = 0xa00;
    task.esp = 0xff0;
    struct trap t = CAUGHT(jump_task, 0);
    check("a task in virtual-8086 mode", t.vector << 16 | t.ip, UD << 16 | 1);
    check("its CS and SS", t.cs << 16 | t.ss, 0x800 << 16 | 0xa00);
    check("VM", t.flags & VM, VM);
    start_over();
}

void run(void)
{
    if (left_out("task switches"))
        return;
    set_gate(0x80, 3, 0, 14);
    jumps();
    calls();
    from_ring3();
    refused();
    bad_tasks();
    events();
    double_faults();
    address_spaces();
    local_tables();
    debugging();
    old_tasks();
    virtual_8086_task();
}
