/* Exceptions from their causes: vector, error code, and RIP at the instruction (faults) or behind it (traps). SDM vol. 3A chapter
   6. Page faults are in paging.c, 32-bit causes in gates32.c. */
#include "chips.h"

#define IDT_BIT 2
#define EXTERNAL 1

/* A snippet `name`, its interesting instruction at `name_at`, the next at `name_next`. The argument is in RDI. */
#define SNIPPET(name, before, instruction)                                                        \
    SNIPPETS(#name ": " before "\n" #name "_at: " instruction "\n" #name "_next: ret\n");         \
    extern u8 name[], name##_at[], name##_next[]

SNIPPET(divide_zero, "xor %edx, %edx; xor %ecx, %ecx", "div %ecx");
SNIPPET(divide_overflow, "mov $-1, %eax; cltd; mov $0x80000000, %eax; mov $-1, %ecx", "idiv %ecx");
SNIPPET(divide_byte, "mov $0x7fff, %eax; mov $1, %ecx", "div %cl");
SNIPPET(icebp, "", ".byte 0xf1");
SNIPPET(breakpoint, "", "int3");
SNIPPET(breakpoint_int, "", ".byte 0xcd, 3");
SNIPPET(software_interrupt, "", "int $0x81");
SNIPPET(undefined, "", "ud2");
SNIPPET(undefined_into, "", ".byte 0xce");
SNIPPET(undefined_lock, "", ".byte 0xf0, 0x89, 0x07");
SNIPPET(undefined_lock_register, "", ".byte 0xf0, 0x01, 0xc0");
SNIPPET(undefined_cs, "", ".byte 0x8e, 0xc8");
SNIPPET(undefined_cr, "", ".byte 0x0f, 0x20, 0xc8");
SNIPPET(undefined_reg_form, "", ".byte 0x0f, 0x01, 0xd6");
SNIPPET(no_device_x87, "", "fninit");
SNIPPET(no_device_sse, "", "movaps %xmm0, %xmm0");
SNIPPET(no_device_wait, "", "fwait");
SNIPPET(no_sse, "", "addps %xmm0, %xmm0");
SNIPPET(load_ds, "", "mov %edi, %ds");
SNIPPET(load_ss, "", "mov %edi, %ss");
SNIPPET(load_tr, "", "ltr %di");
SNIPPET(load_ldt, "", "lldt %di");
SNIPPET(non_canonical_jump, "push %rdi", "ret");
SNIPPET(non_canonical_stack, "mov %rsp, %rax; mov %rdi, %rsp", "push %rax");
SNIPPET(write_cr0_, "", "mov %rdi, %cr0");
SNIPPET(write_cr4_, "", "mov %rdi, %cr4");
SNIPPET(write_dr7, "", "mov %rdi, %dr7");
SNIPPET(write_dr6_, "", "mov %rdi, %dr6");
SNIPPET(read_dr4, "", "mov %dr4, %rax");
SNIPPET(write_msr, "mov %edi, %ecx; mov $-1, %eax; mov $-1, %edx", "wrmsr");
SNIPPET(read_msr, "mov %edi, %ecx", "rdmsr");
SNIPPET(xsetbv_, "xor %ecx, %ecx; mov %edi, %eax; xor %edx, %edx", "xsetbv");
SNIPPET(misaligned, "", "movaps 1(%rdi), %xmm0");
SNIPPET(fxsave_misaligned, "", "fxsave 8(%rdi)");
SNIPPET(cmpxchg16b_misaligned, "xor %ecx, %ecx", ".byte 0x48, 0x0f, 0xc7, 0x4f, 0x08");
SNIPPET(far_call, "push $0; push %rdi; push $0; lea 1f(%rip), %rax; mov %eax, (%rsp); mov %di, 4(%rsp)", "ljmp *(%rsp); 1:");
SNIPPET(null_code, "push %rdi; push $0", "lretq");
SNIPPET(x87_error, "fninit; pushq $0x37b; fldcw (%rsp); pop %rax; fld1; fldz; fdivrp", "fwait");
SNIPPET(sse_error, "push $0x1d80; ldmxcsr (%rsp); pop %rax; xorps %xmm0, %xmm0; pcmpeqd %xmm1, %xmm1; pslld $25, %xmm1; psrld $2, %xmm1",
        "divps %xmm0, %xmm1");
SNIPPET(mxcsr_reserved, "push $0x10000", "ldmxcsr (%rsp)");
SNIPPET(single_step, "pushf; orl $0x100, (%rsp); popf", "nop");
SNIPPET(in_port, "mov $0x80, %edx", "in %dx, %al");
SNIPPET(too_long, "", ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90,0x90");

static void usual_mxcsr(void)
{
    u32 usual = 0x1f80;
    asm volatile("ldmxcsr %0" ::"m"(usual));
}

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
        {"#DE: division by zero", divide_zero, divide_zero_at, 0, DE, 0, 0, 0},
        {"#DE: overflow of IDIV", divide_overflow, divide_overflow_at, 0, DE, 0, 0, 0},
        {"#DE: overflow of an 8-bit DIV", divide_byte, divide_byte_at, 0, DE, 0, 0, 0},
        {"#DB: INT1 is a trap", icebp, icebp_next, 0, DB, 0, 1, 1},
        {"#BP: INT3 is a trap", breakpoint, breakpoint_next, 0, BP, 0, 0, 1},
        {"INT 3", breakpoint_int, breakpoint_int_next, 0, BP, 0, 0, 1},
        {"INT n", software_interrupt, software_interrupt_next, 0, 0x81, 0, 0, 1},
        {"#UD: UD2", undefined, undefined_at, 0, UD, 0, 0, 0},
        {"#UD: INTO in 64-bit mode", undefined_into, undefined_into_at, 0, UD, 0, 0, 0},
        {"#UD: LOCK MOV", undefined_lock, undefined_lock_at, 0, UD, 0, 1, 0},
        {"#UD: LOCK with a register", undefined_lock_register, undefined_lock_register_at, 0, UD, 0, 0, 0},
        {"#UD: MOV to CS", undefined_cs, undefined_cs_at, 0, UD, 0, 0, 0},
        {"#UD: CR1", undefined_cr, undefined_cr_at, 0, UD, 0, 0, 0},
        {"#UD: an undefined form", undefined_reg_form, undefined_reg_form_at, 0, UD, 0, 0, 1},
        {"#UD: DR4 with CR4.DE", read_dr4, read_dr4_at, 0, UD, 0, 0, 0},
        {"#GP: a selector beyond the GDT", load_ds, load_ds_at, 0x4008, GP, 0x4008, 0, 0},
        {"#GP: a data segment of ring 0 with RPL 3", load_ds, load_ds_at, 0x13, GP, 0x10, 0, 0},
        {"#GP: a system segment as data", load_ds, load_ds_at, TSS_SEL, GP, TSS_SEL, 0, 0},
        {"#NP: an absent data segment", load_ds, load_ds_at, FREE_SEL, NP, FREE_SEL, 0, 0},
        {"#SS: an absent stack segment", load_ss, load_ss_at, FREE_SEL, SS, FREE_SEL, 0, 0},
        {"#GP: a read-only stack segment", load_ss, load_ss_at, FREE_SEL + 8, GP, FREE_SEL + 8, 0, 0},
        {"#GP: code as a stack segment", load_ss, load_ss_at, CODE_SEL, GP, CODE_SEL, 0, 0},
        {"#GP: a stack segment of ring 3", load_ss, load_ss_at, USER_DATA_SEL, GP, USER_DATA_SEL & ~3, 0, 0},
        {"no exception: a null stack segment in ring 0", load_ss, NULL, 0, NO_TRAP, 0, 0, 0},
        {"#GP: a busy TSS", load_tr, load_tr_at, TSS_SEL, GP, TSS_SEL, 0, 0},
        {"#GP: null as TSS", load_tr, load_tr_at, 0, GP, 0, 1, 0},
        {"#NP: an absent TSS", load_tr, load_tr_at, FREE_SEL + 0x20, NP, FREE_SEL + 0x20, 0, 0},
        {"#GP: a TSS as LDT", load_ldt, load_ldt_at, FREE_SEL + 0x20, GP, FREE_SEL + 0x20, 0, 0},
        {"no exception: null as LDT", load_ldt, NULL, 0, NO_TRAP, 0, 0, 0},
        {"#GP: a selector of the LDT, which is not there", load_ds, load_ds_at, 0x0c, GP, 0x0c, 0, 0},
        {"#GP: a jump to data", far_call, far_call_at, DATA_SEL, GP, DATA_SEL, 0, 1},
        {"#GP: a jump to null", far_call, far_call_at, 0, GP, 0, 0, 1},
        {"#NP: a jump to absent code", far_call, far_call_at, FREE_SEL + 0x10, NP, FREE_SEL + 0x10, 0, 1},
        {"#GP: a jump to code of ring 3", far_call, far_call_at, USER_CODE_SEL, GP, USER_CODE_SEL & ~3, 0, 1},
        {"#GP: a jump to a code segment that is long and 32-bit", far_call, far_call_at, FREE_SEL + 0x18, GP, FREE_SEL + 0x18, 1, 1},
        {"#GP: a far return to null", null_code, null_code_at, 0, GP, 0, 0, 1},
        {"#GP: a return to a non-canonical address", non_canonical_jump, non_canonical_jump_at, 1ull << 47, GP, 0, 1, 1},
        {"#SS: a non-canonical stack", non_canonical_stack, non_canonical_stack_at, 1ull << 63, SS, 0, 1, 1},
        {"#GP: PG without PE", write_cr0_, write_cr0__at, CR0_PG | 0x32, GP, 0, 1, 1},
        {"#GP: NW without CD", write_cr0_, write_cr0__at, 0x80010033 | 1 << 29, GP, 0, 1, 1},
        {"#GP: upper half of CR0", write_cr0_, write_cr0__at, 0x180010033, GP, 0, 1, 1},
        {"#GP: reserved bits of CR4", write_cr4_, write_cr4__at, 0x620 | 1ull << 40, GP, 0, 1, 1},
        {"#GP: no PAE in 64-bit mode", write_cr4_, write_cr4__at, 0x600, GP, 0, 1, 1},
        {"#GP: upper half of DR7", write_dr7, write_dr7_at, 1ull << 32, GP, 0, 1, 1},
        {"#GP: upper half of DR6", write_dr6_, write_dr6__at, 1ull << 32, GP, 0, 1, 1},
        {"#GP: reserved bits of EFER", write_msr, write_msr_at, EFER, GP, 0, 1, 1},
        {"#GP: a non-canonical base", write_msr, NULL, 0xc0000100, NO_TRAP, 0, 0, 1},
        {"#GP: an unknown MSR, read", read_msr, read_msr_at, 0x1234567, GP, 0, 1, 1},
        {"#GP: an unknown MSR, written", write_msr, write_msr_at, 0x1234567, GP, 0, 1, 1},
        {"#GP: SSE, misaligned", misaligned, misaligned_at, (word)&tss, GP, 0, 1, 1},
        {"#GP: FXSAVE, misaligned", fxsave_misaligned, fxsave_misaligned_at, (word)gdt, GP, 0, 0, 1},
        {"#GP: CMPXCHG16B, misaligned", cmpxchg16b_misaligned, cmpxchg16b_misaligned_at, (word)gdt, GP, 0, 0, 1},
        {"#GP: reserved bits of MXCSR", mxcsr_reserved, mxcsr_reserved_at, 0, GP, 0, 1, 1},
        {"#GP: an instruction of 16 bytes", too_long, too_long_at, 0, GP, 0, 0, 1},
        {"#MF: WAIT finds a pending x87 error", x87_error, x87_error_at, 0, MF, 0, 0, 1},
        {"#XM: SSE division by zero", sse_error, sse_error_at, 0, XM, 0, 1, 1},
        {"#DB: single step is a trap", single_step, single_step_next, 0, DB, 0, 0, 1},
    };
    static const u64 descriptors[] = {
        0x00cf13000000ffff, /* absent data */
        0x00cf91000000ffff, /* read-only data */
        0x00af1b000000ffff, /* absent code */
        0x00ef9b000000ffff, /* long and 32-bit code */
        0x0000090000000067, /* absent TSS */
        0,
    };
    memcpy(&gdt[FREE_SEL / 8], descriptors, sizeof descriptors);
    write_cr4(read_cr4() | CR4_DE);
    /* A bad stack needs another one. */
    static u8 spare_stack[4096] __attribute__((aligned(16)));
    tss.ist[0] = (word)spare_stack + sizeof spare_stack;
    set_gate(SS, 0, 1, 14);
    asm volatile("fninit");
    for (u32 i = 0; i < COUNT(cases); i++) {
        if (cases[i].not_in_tcg && under_tcg())
            continue;
        if (cases[i].not_when_limited && left_out(cases[i].name))
            continue;
        struct trap t = CAUGHT(cases[i].code, cases[i].argument);
        asm volatile("fninit; mov %0, %%ds; mov %0, %%ss" ::"r"(DATA_SEL));
        check_trap(cases[i].name, t, cases[i].vector, cases[i].error, cases[i].ip);
        if (cases[i].vector == XM)
            usual_mxcsr();
    }
    write_cr4(read_cr4() & ~(word)CR4_DE);
    wrmsr(0xc0000100, 0);
}

/* CR0 and CR4 decide what the floating-point instructions do. */
static void no_device(void)
{
    word cr0 = read_cr0(), cr4 = read_cr4();
    write_cr0(cr0 | CR0_TS);
    check_trap("#NM: TS and x87", CAUGHT(no_device_x87, 0), NM, 0, no_device_x87_at);
    check_trap("#NM: TS and SSE", CAUGHT(no_device_sse, 0), NM, 0, no_device_sse_at);
    check_trap("#NM: TS, MP and WAIT", CAUGHT(no_device_wait, 0), NM, 0, no_device_wait_at);
    write_cr0((cr0 | CR0_TS) & ~(word)CR0_MP);
    check("TS without MP: WAIT", CAUGHT(no_device_wait, 0).vector, NO_TRAP);
    asm volatile("clts");
    check("CLTS", read_cr0() & CR0_TS, 0);
    write_cr0(cr0 | CR0_EM);
    check_trap("#NM: EM and x87", CAUGHT(no_device_x87, 0), NM, 0, no_device_x87_at);
    check_trap("#UD: EM and SSE", CAUGHT(no_sse, 0), UD, 0, no_sse_at);
    write_cr0(cr0);
    write_cr4(cr4 & ~0x200ul);
    check_trap("#UD: SSE without OSFXSR", CAUGHT(no_sse, 0), UD, 0, no_sse_at);
    write_cr4(cr4 & ~0x400ul);
    /* QEMU raises no SIMD exceptions. */
    if (!under_tcg())
        check_trap("#UD: an SSE error without OSXMMEXCPT", CAUGHT(sse_error, 0), UD, 0, sse_error_at);
    write_cr4(cr4);
    usual_mxcsr();
    if (!(cpuid(1, 0).c >> 26 & 1)) {
        say("no XSAVE\n");
        return;
    }
    write_cr4(cr4 & ~(word)CR4_OSXSAVE);
    check_trap("#UD: XSETBV without OSXSAVE", CAUGHT(xsetbv_, 1), UD, 0, xsetbv__at);
    check("CPUID tells OSXSAVE", cpuid(1, 0).c >> 27 & 1, 0);
    write_cr4(cr4 | CR4_OSXSAVE);
    check("CPUID tells OSXSAVE", cpuid(1, 0).c >> 27 & 1, 1);
    check_trap("#GP: XCR0 without x87", CAUGHT(xsetbv_, 2), GP, 0, xsetbv__at);
    check_trap("#GP: XCR0 with AVX without SSE", CAUGHT(xsetbv_, 5), GP, 0, xsetbv__at);
    check("XCR0", CAUGHT(xsetbv_, 3).vector, NO_TRAP);
    write_cr4(cr4);
}

/* --- debug registers --- */

static word read_dr6(void)
{
    word v;
    asm volatile("mov %%dr6, %0" : "=r"(v));
    return v;
}
static void set_dr(word dr0, word dr7) { asm volatile("mov %2, %%dr6; mov %0, %%dr0; mov %1, %%dr7" ::"r"(dr0), "r"(dr7), "r"(0xffff0ff0ul)); }

static u64 watched[2];
SNIPPET(write_watched, "", "movl $1, watched");
SNIPPET(read_watched, "", "mov watched + 4, %eax");
SNIPPET(move_watched, "lea watched(%rip), %rdi; mov $3, %ecx; xor %eax, %eax", "rep stosl");
SNIPPET(plain, "nop", "nop");
SNIPPET(read_debug, "", "mov %dr0, %rax");
SNIPPET(step_into_trap, "pushf; orl $0x100, (%rsp); popf", "ud2");

static void general_detect(void)
{
    set_dr(0, 0x2400);
    struct trap t = CAUGHT(read_debug, 0);
    check_trap("#DB: general detect is a fault", t, DB, 0, read_debug_at);
    check("DR6: BD", read_dr6() & 0x2000, 0x2000);
    word dr7;
    asm volatile("mov %%dr7, %0" : "=r"(dr7));
    check("GD is clear then", dr7 & 0x2000, 0);
    set_dr(0, 0x400);
}

static void debug(void)
{
    struct trap t;
    /* Length 4 at watched: writes, then also reads. */
    set_dr((word)watched, 0x000d0401 & ~0ul);
    t = CAUGHT(write_watched, 0);
    check_trap("#DB: a watched write is a trap", t, DB, 0, write_watched_next);
    check("DR6: which", read_dr6() & 0xf, 1);
    set_dr((word)watched, 0x000d0401);
    check("a read is not watched", CAUGHT(read_watched, 0).vector, NO_TRAP);
    set_dr((word)watched + 4, 0x000f0401);
    check_trap("#DB: a watched read", CAUGHT(read_watched, 0), DB, 0, read_watched_next);
    set_dr((word)watched + 6, 0x00010401);
    check("one byte is watched, of which nothing is written", CAUGHT(write_watched, 0).vector, NO_TRAP);
    set_dr((word)watched + 4, 0x000d0401);
    t = CAUGHT(move_watched, 0);
    check_trap("#DB: inside REP STOS, between two steps", t, DB, 0, move_watched_at);
    /* QEMU knows nothing of RF, nor of general detect. */
    if (!under_tcg())
        check("RF is set then", t.flags & RF, RF);
    /* Code. */
    set_dr((word)plain_at, 0x00000401);
    t = CAUGHT(plain, 0);
    check_trap("#DB: a breakpoint is a fault", t, DB, 0, plain_at);
    check("DR6: which", read_dr6() & 0xf, 1);
    check("RF is not set for the handler of a breakpoint", t.flags & RF, 0);
    set_dr((word)plain_at, 0x00000400);
    check("a breakpoint that is off", CAUGHT(plain, 0).vector, NO_TRAP);
    if (!under_tcg())
        general_detect();
    /* Single step: the exception comes first, its handler starts without TF. */
    t = CAUGHT(step_into_trap, 0);
    check_trap("#UD under TF", t, UD, 0, step_into_trap_at);
    check("TF is in the saved flags", t.flags & TF, TF);
    if (!under_tcg())
        check("RF is set in a fault's", t.flags & RF, RF);
    t = CAUGHT(single_step, 0);
    check("DR6: BS", read_dr6() & 0x4000, 0x4000);
    set_dr(0, 0x400);
}

/* --- ring 3 --- */

#define USER 0x10000000000ull
#define USER_STACK (USER + 0x100ff0)

#define USER_SNIPPET(name, before, instruction)                                                   \
    USER_SNIPPETS(#name ": " before "\n" #name "_at: " instruction "\n" #name "_next: int $0x80\n"); \
    extern u8 name[], name##_at[], name##_next[]

USER_SNIPPET(user_cli, "", "cli");
USER_SNIPPET(user_sti, "", "sti");
USER_SNIPPET(user_hlt, "", "hlt");
USER_SNIPPET(user_in, "mov $0x80, %edx", "in %dx, %al");
USER_SNIPPET(user_in32, "mov $0x9e, %edx", "in %dx, %eax");
USER_SNIPPET(user_lgdt, "", "lgdt (%rsp)");
USER_SNIPPET(user_cr3, "", "mov %cr3, %rax");
USER_SNIPPET(user_dr, "", "mov %dr7, %rax");
USER_SNIPPET(user_msr, "", "rdmsr");
USER_SNIPPET(user_invlpg, "", "invlpg (%rsp)");
USER_SNIPPET(user_wbinvd, "", "wbinvd");
USER_SNIPPET(user_swapgs, "", "swapgs");
USER_SNIPPET(user_int, "", "int $0x21");
USER_SNIPPET(user_int3, "", "int3");
USER_SNIPPET(user_icebp, "", ".byte 0xf1");
USER_SNIPPET(user_sysret, "", "sysretq");
USER_SNIPPET(user_clts, "", "clts");
USER_SNIPPET(user_cr8, "", "mov %cr8, %rax");
USER_SNIPPET(user_align, "", "mov 1(%rsp), %eax");
USER_SNIPPET(user_align_ok, "", "mov 4(%rsp), %eax");
USER_SNIPPET(user_popf, "push $0x3202; popf; pushf; pop %rax", "nop");
USER_SNIPPET(user_rdtsc, "", "rdtsc");
USER_SNIPPET(user_sgdt, "sub $16, %rsp", "sgdt (%rsp)");
USER_SNIPPET(user_smsw, "", "smsw %eax");
USER_SNIPPET(user_ss, "mov $0x13, %eax", "mov %eax, %ss");
USER_SNIPPET(user_null_ss, "xor %eax, %eax", "mov %eax, %ss");
USER_SNIPPET(user_iret, "push $0x10; push $0; pushf; push $8; push $0", "iretq");
USER_SNIPPET(user_divide, "xor %ecx, %ecx", "div %ecx");

static word user_address(const void *p)
{
    extern u8 user_start[];
    return USER + ((const u8 *)p - user_start);
}

static struct trap in_ring3(const u8 *code, word flags_)
{
    return caught_far(
        (struct far_state){user_address(code), USER_STACK, USER_CODE_SEL, USER_DATA_SEL, 2 | flags_, 0});
}

static void map_user(void)
{
    extern u8 user_start[];
    u64 *t = identity_pml4;
    u32 index = 2;
    for (u32 level = 3; level > 0; level--) {
        u64 *next = allocate(PAGE);
        t[index] = (word)next | 7;
        t = next;
        index = 0;
    }
    t[0] = (word)user_start | 5;
    t[0x100] = (word)allocate(PAGE) | 7;
    set_gate(0x80, 3, 0, 14);
}

static void ring3(void)
{
    static const struct {
        const char *name;
        const u8 *code, *ip;
        word flags;
        u32 vector, error;
    } cases[] = {
        {"ring 3, #GP: CLI", user_cli, user_cli_at, 0, GP, 0},
        {"ring 3, #GP: STI", user_sti, user_sti_at, 0, GP, 0},
        {"ring 3, IOPL 3: CLI", user_cli, user_cli_next + 2, IOPL3, 0x80, 0},
        {"ring 3, #GP: HLT", user_hlt, user_hlt_at, 0, GP, 0},
        {"ring 3, #GP: HLT, whatever IOPL", user_hlt, user_hlt_at, IOPL3, GP, 0},
        {"ring 3, #GP: IN", user_in, user_in_at, 0, GP, 0},
        {"ring 3, IOPL 3: IN", user_in, user_in_next + 2, IOPL3, 0x80, 0},
        {"ring 3, #GP: LGDT", user_lgdt, user_lgdt_at, 0, GP, 0},
        {"ring 3, #GP: CR3", user_cr3, user_cr3_at, 0, GP, 0},
        {"ring 3, #GP: CR8", user_cr8, user_cr8_at, 0, GP, 0},
        {"ring 3, #GP: DR7", user_dr, user_dr_at, 0, GP, 0},
        {"ring 3, #GP: RDMSR", user_msr, user_msr_at, 0, GP, 0},
        {"ring 3, #GP: INVLPG", user_invlpg, user_invlpg_at, 0, GP, 0},
        {"ring 3, #GP: WBINVD", user_wbinvd, user_wbinvd_at, 0, GP, 0},
        {"ring 3, #GP: SWAPGS", user_swapgs, user_swapgs_at, 0, GP, 0},
        {"ring 3, #GP: CLTS", user_clts, user_clts_at, 0, GP, 0},
        {"ring 3, #GP: SYSRET", user_sysret, user_sysret_at, 0, GP, 0},
        {"ring 3, #GP: INT through a gate of ring 0", user_int, user_int_at, 0, GP, 0x21 << 3 | IDT_BIT},
        {"ring 3, #GP: INT3 through a gate of ring 0", user_int3, user_int3_at, 0, GP, BP << 3 | IDT_BIT},
        {"ring 3, INT1 needs no right", user_icebp, user_icebp_next, 0, DB, 0},
        {"ring 3, #GP: a stack segment of ring 0", user_ss, user_ss_at, 0, GP, 0x10},
        {"ring 3, #GP: a null stack segment", user_null_ss, user_null_ss_at, 0, GP, 0},
        {"ring 3, #GP: IRET to ring 0", user_iret, user_iret_at, 0, GP, 8},
        {"ring 3, #DE", user_divide, user_divide_at, 0, DE, 0},
        {"ring 3, #AC: a misaligned access", user_align, user_align_at, AC_FLAG, AC, 0},
        {"ring 3, AC: an aligned one", user_align_ok, user_align_ok_next + 2, AC_FLAG, 0x80, 0},
        {"ring 3, a misaligned access without AC", user_align, user_align_next + 2, 0, 0x80, 0},
        {"ring 3, RDTSC", user_rdtsc, user_rdtsc_next + 2, 0, 0x80, 0},
        {"ring 3, SGDT", user_sgdt, user_sgdt_next + 2, 0, 0x80, 0},
    };
    map_user();
    wrmsr(EFER, rdmsr(EFER) | EFER_SCE);
    write_cr0(read_cr0() | CR0_AM);
    for (u32 i = 0; i < COUNT(cases); i++) {
        /* QEMU knows neither #AC nor INT1. */
        if (under_tcg() && (cases[i].vector == AC || cases[i].vector == DB))
            continue;
        struct trap t = in_ring3(cases[i].code, cases[i].flags);
        u32 error = cases[i].error;
        /* QEMU counts 16 bytes for a gate. */
        if (under_tcg() && error & IDT_BIT)
            error = (error & ~7u) * 2 | IDT_BIT;
        check_trap(cases[i].name, t, cases[i].vector, error, (void *)user_address(cases[i].ip));
        check_quietly("from ring 3", t.cs, USER_CODE_SEL);
        check_quietly("its stack segment", t.ss, USER_DATA_SEL);
    }
    write_cr0(read_cr0() & ~(word)CR0_AM);
    struct trap t = in_ring3(user_align, AC_FLAG);
    check_trap("ring 3, AC without AM", t, 0x80, 0, (void *)user_address(user_align_next + 2));
    t = in_ring3(user_popf, 0);
    check("ring 3, POPF changes neither IF nor IOPL", t.value & (IF | IOPL3), 0);
    write_cr4(read_cr4() | CR4_TSD);
    check_trap("ring 3, #GP: RDTSC with TSD", in_ring3(user_rdtsc, 0), GP, 0, (void *)user_address(user_rdtsc_at));
    write_cr4(read_cr4() & ~(word)CR4_TSD);
    /* The bitmap of ports in the TSS. */
    tss.io_permissions[0x80 / 8] &= ~1;
    check("ring 3, a port that the TSS allows", in_ring3(user_in, 0).vector, 0x80);
    tss.io_permissions[0x9e / 8] = 0x3f;
    check_trap("ring 3, #GP: 4 ports of which 2 are allowed", in_ring3(user_in32, 0), GP, 0, (void *)user_address(user_in32_at));
    tss.io_permissions[0xa0 / 8] = 0xfc;
    check("ring 3, all 4 are", in_ring3(user_in32, 0).vector, 0x80);
    if (cpuid(7, 0).c >> 2 & 1) {
        write_cr4(read_cr4() | CR4_UMIP);
        check_trap("ring 3, #GP: SGDT with UMIP", in_ring3(user_sgdt, 0), GP, 0, (void *)user_address(user_sgdt_at));
        check_trap("ring 3, #GP: SMSW with UMIP", in_ring3(user_smsw, 0), GP, 0, (void *)user_address(user_smsw_at));
        write_cr4(read_cr4() & ~(word)CR4_UMIP);
    }
}

/* --- priorities --- */

SNIPPET(lock_undefined_page, "mov $0x8000000000, %rdi", ".byte 0xf0, 0x89, 0x07");
SNIPPET(no_device_page, "mov $0x8000000000, %rdi", "flds (%rdi)");
SNIPPET(divide_absent, "mov $0x8000000000, %rdi; xor %edx, %edx", "divl (%rdi)");

static void priorities(void)
{
    if (!under_tcg())
        check_trap("#UD before #PF", CAUGHT(lock_undefined_page, 0), UD, 0, lock_undefined_page_at);
    write_cr0(read_cr0() | CR0_TS);
    check_trap("#NM before #PF", CAUGHT(no_device_page, 0), NM, 0, no_device_page_at);
    check_trap("#UD before #NM", CAUGHT(undefined, 0), UD, 0, undefined_at);
    asm volatile("clts");
    check_trap("#PF before #DE", CAUGHT(divide_absent, 0), PF, 0, divide_absent_at);
    set_dr((word)undefined_at, 0x00000401);
    check_trap("a breakpoint before #UD", CAUGHT(undefined, 0), DB, 0, undefined_at);
    set_dr(0, 0x400);
}

void run(void)
{
    simple();
    if (!left_out("x87 and SSE"))
        no_device();
    if (!left_out("debug registers"))
        debug();
    if (!left_out("ring 3: INT is an undefined instruction there"))
        ring3();
    if (!left_out("priorities"))
        priorities();
}
