/* Ways between rings and modes, from 64-bit mode: SYSCALL, SYSENTER, far transfers, compatibility mode, segment bases, stacks of
   interrupts, and down to real mode and back. SDM vol. 3A chapters 5, 6.14, 9.9; AMD APM vol. 2 chapter 6 for what differs there. */
#include "chips.h"

#define USER 0x10000000000ull
#define USER_STACK (USER + 0x100ff0)
/* The same pages again, below 4 GiB, for compatibility mode. */
#define LOW_USER 0x80000000ull
#define LOW_STACK (LOW_USER + 0x100ff0)

#define STAR 0xc0000081
#define LSTAR 0xc0000082
#define CSTAR 0xc0000083
#define SFMASK 0xc0000084
#define FS_BASE 0xc0000100
#define GS_BASE 0xc0000101
#define KERNEL_GS_BASE 0xc0000102

extern u8 user_start[];
static word user_address(const void *p) { return USER + ((const u8 *)p - user_start); }
static word low_address(const void *p) { return LOW_USER + ((const u8 *)p - user_start); }

static bool is_amd(void) { return cpuid(0, 0).b == 0x68747541; }

static void map_user(void)
{
    u64 *stack = allocate(PAGE);
    u64 *t = identity_pml4;
    u32 index = 2;
    for (u32 level = 3; level > 0; level--) {
        u64 *next = allocate(PAGE);
        t[index] = (word)next | 7;
        t = next;
        index = 0;
    }
    t[0] = (word)user_start | 5;
    t[0x100] = (word)stack | 7;
    /* 2 GiB: the identity map's large page gives way to the same table. */
    identity_pml4[0] |= 4;
    identity_pdpt[2] |= 4;
    identity_pd[1024] = (word)t | 7;
    write_cr3(read_cr3());
    set_gate(0x80, 3, 0, 14);
}

static struct trap in_ring3(const u8 *code, word argument)
{
    return caught_far(
        (struct far_state){user_address(code), USER_STACK, USER_CODE_SEL, USER_DATA_SEL, 2, argument});
}

static struct trap in_compatibility_mode(const u8 *code)
{
    return caught_far((struct far_state){low_address(code), LOW_STACK, USER_CODE32_SEL, USER_DATA_SEL, 2, 0});
}

/* --- SYSCALL and SYSRET --- */

/* What the kernel's entry finds, as its handler stores it. */
volatile struct {
    word rcx, r11, rsp, rflags, cs, ss;
} found;

SNIPPETS("syscall_entry: mov %rcx, found(%rip); mov %r11, found + 8(%rip); mov %rsp, found + 16(%rip); mov syscall_stack(%rip), %rsp\n"
         "pushfq; pop found + 24(%rip); mov %cs, found + 32(%rip); mov %ss, found + 40(%rip)\n"
         "mov found + 16(%rip), %rsp; mov syscall_flags(%rip), %r11\n"
         "syscall_return: sysretq\n"
         "compat_entry: mov %rcx, found(%rip); mov %r11, found + 8(%rip); mov %rsp, found + 16(%rip)\n"
         "mov %cs, found + 32(%rip); mov syscall_flags(%rip), %r11; sysretl\n"
         ".pushsection .data; .globl syscall_stack, syscall_flags\n syscall_stack: .quad 0; syscall_flags: .quad 0; .popsection\n");
extern u8 syscall_entry[], compat_entry[];
extern word syscall_stack, syscall_flags;

USER_SNIPPETS("user_syscall: mov $0x1111, %r11d; pushq $0x8d7; popf\n"
              "user_syscall_at: syscall\n"
              "user_syscall_next: pushf; pop %rax; mov %cs, %edx; mov %ss, %ecx; int $0x80\n"
              ".code32\n"
              "user_syscall32: syscall\n"
              "user_syscall32_next: mov %cs, %eax; int $0x80\n"
              ".code64\n");
extern u8 user_syscall[], user_syscall_at[], user_syscall_next[], user_syscall32[], user_syscall32_next[];

static struct frame last_frame;
static void keep_frame(struct frame *f)
{
    last_frame = *f;
    give_up(f);
}

static void syscalls(void)
{
    struct trap t;
    on(0x80, keep_frame);
    t = in_ring3(user_syscall, 0);
    check_trap("SYSCALL without EFER.SCE", t, UD, 0, (void *)user_address(user_syscall_at));
    wrmsr(EFER, rdmsr(EFER) | EFER_SCE);
    wrmsr(STAR, (u64)(USER_CODE32_SEL) << 48 | (u64)CODE_SEL << 32);
    wrmsr(LSTAR, (word)syscall_entry);
    wrmsr(CSTAR, (word)compat_entry);
    wrmsr(SFMASK, 0x400 | CF | TF);
    syscall_stack = (word)allocate(PAGE) + PAGE;
    syscall_flags = 0x202 | ZF | 0x800;
    t = in_ring3(user_syscall, 0);
    check("SYSCALL: RCX is the return address", found.rcx, user_address(user_syscall_next));
    check("SYSCALL: R11 is RFLAGS", found.r11, 0x8d7);
    check("SYSCALL: RSP is the caller's", found.rsp, USER_STACK);
    /* QEMU loses the arithmetic flags. */
    check("SYSCALL: flags are masked by SFMASK", found.rflags, under_tcg() ? 2 : 0x8d6);
    check("SYSCALL: CS and SS of the kernel", found.cs << 16 | found.ss, CODE_SEL << 16 | DATA_SEL);
    check("SYSRET: comes back", t.vector, 0x80);
    check("SYSRET: flags are R11's", last_frame.ax, syscall_flags);
    check("SYSRET: CS and SS of the user", last_frame.dx << 16 | last_frame.cx, USER_CODE_SEL << 16 | USER_DATA_SEL);
    /* From compatibility mode by CSTAR, which is AMD's; Intel's raises #UD. */
    if (is_amd() && !left_out("SYSCALL in compatibility mode")) {
        t = in_compatibility_mode(user_syscall32);
        check("SYSCALL from compatibility mode: the return address", found.rcx, low_address(user_syscall32_next));
        check("SYSRET to compatibility mode", last_frame.cs << 16 | (last_frame.ax & 0xffff), USER_CODE32_SEL << 16 | USER_CODE32_SEL);
    }
    SNIPPETS("write_lstar: mov %edi, %eax; mov %rdi, %rdx; shr $32, %rdx; mov $0xc0000082, %ecx; write_lstar_at: wrmsr; ret\n");
    extern u8 write_lstar[], write_lstar_at[];
    /* QEMU takes any address. */
    if (!under_tcg())
        check_trap("LSTAR must be canonical", CAUGHT(write_lstar, 1ull << 47), GP, 0, write_lstar_at);
}

/* --- SYSENTER and SYSEXIT: in 64-bit mode Intel's only --- */

USER_SNIPPETS("user_sysenter: sysenter\n"
              ".code32\n"
              "user_sysenter32: sysenter\n"
              ".code64\n");
extern u8 user_sysenter[], user_sysenter32[];

SNIPPETS("sysenter_entry: mov %rsp, found + 16(%rip); mov %cs, found + 32(%rip); mov %ss, found + 40(%rip); int $0x80\n");
extern u8 sysenter_entry[];

static void sysenter(void)
{
    wrmsr(0x174, 0);
    check_trap("SYSENTER with a null selector", in_ring3(user_sysenter, 0), is_amd() ? UD : GP, 0, (void *)user_address(user_sysenter));
    wrmsr(0x174, CODE_SEL);
    wrmsr(0x175, syscall_stack);
    wrmsr(0x176, (word)sysenter_entry);
    struct trap t = in_ring3(user_sysenter, 0);
    if (is_amd()) {
        /* AMD has it in legacy mode only (APM vol. 3). */
        check_trap("SYSENTER in 64-bit mode", t, UD, 0, (void *)user_address(user_sysenter));
        return;
    }
    check("SYSENTER: arrives", t.vector, 0x80);
    check("SYSENTER: the kernel's stack", found.rsp, syscall_stack);
    check("SYSENTER: CS and SS", found.cs << 16 | found.ss, CODE_SEL << 16 | DATA_SEL);
}

/* --- segment bases --- */

SNIPPETS("read_fs: mov %fs:(%rdi), %rax; ret\n"
         "read_gs: mov %gs:(%rdi), %rax; ret\n"
         "swap: swapgs; ret\n"
         "rdfs: rdfsbase %rax; ret\n"
         "wrfs: wrfsbase %rdi; ret\n"
         "rdgs: rdgsbase %rax; ret\n"
         "wrgs32: wrgsbase %edi; ret\n"
         "load_fs: mov %edi, %fs; ret\n"
         "lea_fs: .byte 0x64; lea (%rdi), %rax; ret\n");
extern u8 read_fs[], read_gs[], swap[], rdfs[], wrfs[], rdgs[], wrgs32[], load_fs[], lea_fs[];

static void bases(void)
{
    u64 *data = allocate(PAGE);
    data[0] = 0x1111;
    data[1] = 0x2222;
    wrmsr(FS_BASE, (word)data);
    check("FS: its base", CAUGHT(read_fs, 8).value, 0x2222);
    check("LEA knows no base", CAUGHT(lea_fs, 8).value, 8);
    wrmsr(GS_BASE, (word)data + 8);
    wrmsr(KERNEL_GS_BASE, (word)data);
    check("GS: its base", CAUGHT(read_gs, 0).value, 0x2222);
    CAUGHT(swap, 0);
    check("SWAPGS", CAUGHT(read_gs, 0).value, 0x1111);
    check("SWAPGS: the MSRs show it", rdmsr(GS_BASE) == (word)data && rdmsr(KERNEL_GS_BASE) == (word)data + 8, 1);
    wrmsr(FS_BASE, 0xffff800000000000);
    check("FS: a base in the upper half", CAUGHT(read_fs, (word)data - 0xffff800000000000).value, 0x1111);
    /* A selector loads a 32-bit base; a null one clears it (AMD: where CPUID says so). */
    gdt[FREE_SEL / 8] = 0x00cf93000000ffff | ((u64)(word)data & 0xffffff) << 16 | ((u64)(word)data >> 24 & 0xff) << 56;
    CAUGHT(load_fs, FREE_SEL);
    check("FS: a selector loads the base of its descriptor", rdmsr(FS_BASE), (word)data);
    CAUGHT(load_fs, 0);
    check("FS: null clears it", rdmsr(FS_BASE), 0);
    if (!(cpuid(7, 0).b & 1)) {
        say("no FSGSBASE\n");
        return;
    }
    if (!left_out("that CR4 can forbid RDFSBASE"))
        check_trap("RDFSBASE without CR4.FSGSBASE", CAUGHT(rdfs, 0), UD, 0, rdfs);
    write_cr4(read_cr4() | CR4_FSGSBASE);
    CAUGHT(wrfs, (word)data);
    check("WRFSBASE, RDFSBASE", CAUGHT(rdfs, 0).value, (word)data);
    check("FS: reads there", CAUGHT(read_fs, 0).value, 0x1111);
    CAUGHT(wrgs32, 0x123456789);
    check("WRGSBASE of 32 bits", CAUGHT(rdgs, 0).value, 0x23456789);
    if (!under_tcg())
        check_trap("WRFSBASE must be canonical", CAUGHT(wrfs, 1ull << 47), GP, 0, wrfs);
    write_cr4(read_cr4() & ~(word)CR4_FSGSBASE);
    wrmsr(FS_BASE, 0);
    wrmsr(GS_BASE, 0);
}

/* --- far transfers --- */

SNIPPETS("far_call64: push %rbx; lcall *far_pointer(%rip); pop %rbx; ret\n"
         "far_target: mov 4(%rsp), %eax; lretl\n"
         /* To 32-bit code of ring 0 and back. */
         "through_compat: push %rbx; mov %rsp, %rbx; lea 1f(%rip), %rax; push $0x18; push %rax; lretq\n"
         ".code32\n"
         "1: mov %esp, %edx; mov $0x12345678, %eax; inc %eax; .byte 0x40\n" /* INC EAX, a REX prefix in 64-bit mode */
         "ljmp $8, $2f\n"
         ".code64\n"
         "2: mov %rbx, %rsp; pop %rbx; ret\n"
         ".pushsection .data; .globl far_pointer; far_pointer: .quad 0; .word 0; .popsection\n"
         "gate_target: mov %rsp, %rax; mov %cs, %edx; mov %ss, %ecx; lretq\n");
extern u8 far_call64[], far_target[], through_compat[], gate_target[];
extern struct __attribute__((packed)) {
    u32 offset;
    u16 selector;
    u32 rest;
} far_pointer;

USER_SNIPPETS("user_gate: mov %rsp, %rbx; lcall *user_pointer(%rip); user_gate_next: int $0x80\n"
              "user_pointer: .long 0; .word 0x40 | 3\n"
              "user_far: lcall *1f(%rip); int $0x80; 1: .long 0; .word 8\n"
              ".code32\n"
              "user_in_compat: mov $1, %eax; .byte 0x40; mov %cs, %edx; int $0x80\n"
              ".code64\n");
extern u8 user_gate[], user_gate_next[], user_far[], user_in_compat[];

static void far_transfers(void)
{
    far_pointer.offset = (word)far_target;
    far_pointer.selector = CODE_SEL;
    struct trap t = CAUGHT(far_call64, 0);
    check("far call and return", t.vector == NO_TRAP && t.value == CODE_SEL, 1);
    t = CAUGHT(through_compat, 0);
    check("through compatibility mode: 0x40 is INC EAX there", t.value, 0x1234567a);
    t = in_compatibility_mode(user_in_compat);
    check("ring 3, compatibility mode", t.vector << 16 | last_frame.ax, 0x80 << 16 | 2);
    check("its code segment", last_frame.dx & 0xffff, USER_CODE32_SEL);
    /* A call gate of 16 bytes, with another ring's stack. */
    u64 entry = (word)gate_target;
    gdt[FREE_SEL / 8] = (entry & 0xffff) | CODE_SEL << 16 | 0xecull << 40 | (entry >> 16 & 0xffff) << 48;
    gdt[FREE_SEL / 8 + 1] = entry >> 32;
    t = in_ring3(user_gate, 0);
    check_trap("call gate: there and back", t, 0x80, 0, (void *)(user_address(user_gate_next) + 2));
    check("call gate: the stack of ring 0, with SS, RSP, CS, RIP", last_frame.ax, tss.rsp[0] - 32);
    check("call gate: CS, and a null SS of ring 0", last_frame.dx << 16 | last_frame.cx, CODE_SEL << 16);
    check("call gate: the caller's stack again", last_frame.sp == last_frame.bx, 1);
    gdt[FREE_SEL / 8] &= ~(0x60ull << 40);
    check_trap("call gate of ring 0", in_ring3(user_gate, 0), GP, FREE_SEL, NULL);
    gdt[FREE_SEL / 8] |= 0x60ull << 40;
    gdt[FREE_SEL / 8 + 1] = 0xfull << 40;
    check_trap("call gate with a type in its upper half", in_ring3(user_gate, 0), GP, FREE_SEL, NULL);
    check_trap("far call to ring 0", in_ring3(user_far, 0), GP, CODE_SEL, NULL);
}

/* --- stacks of interrupts --- */

static word handler_sp;
static void note_stack(struct frame *f)
{
    last_frame = *f;
    handler_sp = (word)f;
}

SNIPPETS("odd_stack: mov %rsp, %rax; lea -5(%rsp), %rsp; mov %rsp, odd_rsp(%rip); int3; mov %rax, %rsp; ret\n"
         ".pushsection .data; .globl odd_rsp; odd_rsp: .quad 0; .popsection\n"
         "nested_task: pushf; orl $0x4000, (%rsp); popf; pushf; pop %rax; nested_task_at: iretq\n"
         "iret_to_null: mov %rsp, %rcx; pushq $0; push %rcx; pushf; push $8; lea 1f(%rip), %rax; push %rax; iretq; 1: mov %ss, %eax; ret\n"
         "iret_rf: mov %rsp, %rcx; pushq $0x10; push %rcx; pushf; orl $0x10000, (%rsp); push $8; lea 1f(%rip), %rax; push %rax; iretq; 1: pushf; pop %rax; ret\n");
extern u8 odd_stack[], nested_task[], nested_task_at[], iret_to_null[], iret_rf[];
extern word odd_rsp;
USER_SNIPPETS("user_loop: nop; int3; int $0x80\n");
extern u8 user_loop[];

static u8 ist_stack[4096] __attribute__((aligned(16)));

static void stacks(void)
{
    on(BP, note_stack);
    CAUGHT(odd_stack, 0);
    check("the stack is aligned to 16 bytes first", handler_sp + sizeof(struct frame), odd_rsp & ~15ul);
    check("the frame has the stack as it was", last_frame.sp, odd_rsp);
    check("and SS, in every ring", last_frame.ss, DATA_SEL);
    tss.ist[2] = (word)ist_stack + sizeof ist_stack - 3;
    set_gate(BP, 3, 3, 14);
    CAUGHT(odd_stack, 0);
    check("IST: from ring 0 as well", handler_sp + sizeof(struct frame), ((word)ist_stack + sizeof ist_stack - 3) & ~15ul);
    set_gate(BP, 3, 0, 14);
    struct trap t = in_ring3(user_loop, 0);
    check("from ring 3: the stack of ring 0", handler_sp + sizeof(struct frame), tss.rsp[0]);
    check("and back to ring 3", t.vector << 8 | t.cs, 0x80 << 8 | USER_CODE_SEL);
    /* Interrupt gates clear IF, trap gates do not. */
    on(0x80, keep_frame);
    check_trap("IRET with NT is #GP in 64-bit mode", CAUGHT(nested_task, 0), GP, 0, nested_task_at);
    set_flags(2);
    check("IRET to a null SS in ring 0", CAUGHT(iret_to_null, 0).value & 0xffff, 0);
    asm volatile("mov %0, %%ss" ::"r"(DATA_SEL));
    check("RF is gone after one instruction", CAUGHT(iret_rf, 0).value & RF, 0);
    on(BP, NULL);
    set_gate(BP, 0, 0, 14);
}

/* --- real mode and back --- */

SNIPPETS("down: push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
         "mov %rsp, saved_rsp(%rip)\n"
         "lea 1f(%rip), %rax; push $0x18; push %rax; lretq\n"
         ".code32\n"
         "1: mov $0x10, %eax; mov %eax, %ds; mov %cr0, %eax; and $0x7fffffff, %eax; mov %eax, %cr0\n" /* paging off: protected mode */
         "mov $0xc0000080, %ecx; rdmsr; mov %eax, efer_inside; and $~0x100, %eax; wrmsr\n"
         "mov %cr4, %eax; push %eax; xor %eax, %eax; mov %eax, %cr4; pop %eax\n"
         "lidt real_idt; ljmp $0x48, $0x8000\n"
         ".code16\n"
         "real_part: mov $0x50, %ax; mov %ax, %ds; mov %ax, %es; mov %ax, %ss; mov %ax, %fs; mov %ax, %gs\n"
         "mov %cr0, %eax; and $~1, %eax; mov %eax, %cr0\n"
         "ljmp $0x800, $real_mode - real_part\n"
         "real_mode: mov $0x700, %ax; mov %ax, %ss; mov $0x1000, %sp\n"
         "mov $0x900, %ax; mov %ax, %ds; mov %ax, %es\n"
         "movl $0x11223344, 0\n"                    /* at 0x9000 */
         "mov $0xffff, %ax; mov %ax, %es; movb %es:0x20, %al; mov %al, 4\n" /* 0x100010, with A20 on */
         "xor %ax, %ax; mov %ax, %es\n"
         "movw $interrupt_21 - real_part, %es:0x84; movw $0x800, %es:0x86\n"
         "mov $5, %cx; int $0x21; mov %cx, 6\n"
         "pushw $0x1234; pushf; popw 8; popw 10\n"
         "movl $0x12345, %eax; mov %eax, 12\n"      /* 32-bit registers in real mode */
         "movw $divide_0 - real_part, %es:0; movw $0x800, %es:2; xor %cx, %cx; xor %dx, %dx; mov $7, %ax\n"
         "real_divide: div %cx; mov %ax, 16\n"
         /* Big real mode: a limit of 4 GiB, kept from protected mode. */
         "xor %ebx, %ebx; mov %cr0, %eax; or $1, %al; mov %eax, %cr0; mov $0x10, %bx; mov %bx, %fs; and $~1, %al; mov %eax, %cr0\n"
         "xor %bx, %bx; mov %bx, %fs; mov $0x100000, %ebx; mov %fs:(%ebx), %eax; mov %eax, 20\n"
         /* Back. */
         "mov %cr0, %eax; or $1, %al; mov %eax, %cr0; ljmpl $0x18, $up\n"
         "interrupt_21: add $37, %cx; iret\n"
         "divide_0: pop %ax; mov %ax, 18; add $2, %ax; push %ax; mov $0x99, %ax; iret\n"
         "real_part_end:\n"
         ".code32\n"
         "up: mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss; mov $again_64, %ebp; jmp to_long_mode\n"
         ".code64\n"
         "again_64: mov saved_rsp(%rip), %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"
         ".pushsection .data; .balign 8; saved_rsp: .quad 0; efer_inside: .long 0; real_idt: .word 0x3ff; .long 0; .globl efer_inside; .popsection\n");
extern u8 down[], real_part[], real_part_end[], real_divide[];
extern u32 efer_inside;

static void real_mode(void)
{
    struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } idt;
    asm volatile("sidt %0" : "=m"(idt));
    u64 efer = rdmsr(EFER);
    word cr4 = read_cr4();
    memcpy((void *)0x8000, real_part, real_part_end - real_part);
    memset((void *)0x9000, 0, 64);
    gdt[0x48 / 8] = 0x00009b000000ffff; /* 16-bit code at 0 */
    gdt[0x50 / 8] = 0x000093000000ffff; /* 16-bit data */
    u8 *results = (u8 *)0x9000;
    u32 at_1m = *(volatile u32 *)0x100000;
    asm volatile("call *%0" ::"r"(down) : "rax", "rcx", "rdx", "rbx", "memory", "cc");
    asm volatile("lidt %0" ::"m"(idt));
    /* The runtime's usual state again. */
    wrmsr(EFER, efer);
    write_cr4(cr4);
    barrier();
#define RESULT16(at) (*(volatile u16 *)(results + (at)))
#define RESULT32(at) (*(volatile u32 *)(results + (at)))
    check("LMA goes with paging", efer_inside & (EFER_LMA | 0x100), 0x100);
    check("real mode: writes", RESULT32(0), 0x11223344);
    check("real mode: above 1 MiB with A20 on", results[4], *(volatile u8 *)0x100010);
    check("real mode: an interrupt through the table at 0", RESULT16(6), 42);
    check("real mode: flags", RESULT16(8) & 0xf002, 2);
    check("real mode: the stack", RESULT16(10), 0x1234);
    check("real mode: 32-bit registers", RESULT32(12), 0x12345);
    check("real mode: #DE is a fault", RESULT16(18), real_divide - real_part);
    check("real mode: its handler returns", RESULT16(16), 0x99);
    check("real mode with a limit of 4 GiB", RESULT32(20), at_1m);
    check("64-bit mode again", rdmsr(EFER) & EFER_LMA, EFER_LMA);
}

void run(void)
{
    map_user();
    if (!left_out("ring 3: INT is an undefined instruction there")) {
        syscalls();
        sysenter();
    }
    bases();
    if (!left_out("ring 3 and far calls")) {
        far_transfers();
        stacks();
    }
    real_mode();
}
