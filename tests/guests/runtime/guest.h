/* What a guest has from the runtime: output, checks, traps, privileged instructions.
 *
 * A guest defines `run`. It prints a line for each check; when `run` returns, the run ends with status 1 if all
 * were right, else 3 (by the debug-exit port). The same sources make 64-bit and, with -m32, 32-bit guests. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;
/* As wide as a register. */
typedef unsigned long word;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)
#define COUNT(array) (sizeof(array) / sizeof(*(array)))
#define PAGE 4096

/* The guest itself. */
void run(void);

/* --- output and checks --- */

/* %s string, %d and %u decimal, %x hexadecimal (all arguments of numbers are 64 bits wide). */
void say(const char *format, ...);
/* Prints "ok name", or "FAIL name: got X, want Y"; whether they are equal. */
bool check(const char *name, u64 got, u64 want);
/* `check` of a condition. */
#define check_true(name, condition) check(name, !!(condition), 1)
/* For checks inside loops: prints only what is wrong. */
bool check_quietly(const char *name, u64 got, u64 want);
void __attribute__((noreturn)) end_run(void);
/* The command line, without the kernel's name. */
const char *command_line(void);
/* The command line has this word. */
bool has_option(const char *word);
/* The engine emulates kernel code and lacks some of it: what it lacks is left out, and that is said. */
bool left_out(const char *what);
void *memset(void *to, int byte, word len);
void *memcpy(void *to, const void *from, word len);
int memcmp(const void *a, const void *b, word len);
/* Zeroed RAM above the image, from the first GiB; aligned to its size up to a page. */
void *allocate(word len);
/* The same, aligned to `align`. */
void *allocate_aligned(word len, word align);

/* --- traps --- */

struct frame {
#ifdef __x86_64__
    word r15, r14, r13, r12, r11, r10, r9, r8, di, si, bp, bx, dx, cx, ax;
#else
    word gs, fs, es, ds, di, si, bp, sp_unused, bx, dx, cx, ax;
#endif
    word vector, error, ip, cs, flags, sp, ss;
#ifndef __x86_64__
    word v86_es, v86_ds, v86_fs, v86_gs;
#endif
};

/* How a call ended. */
struct trap {
    /* The exception or interrupt that ended it, or NO_TRAP. */
    u32 vector;
    u32 error;
    word ip, cs, flags, sp, ss;
    /* CR2 at a page fault, else 0. */
    word cr2;
    /* RAX then, or the function's result. */
    word value;
};
#define NO_TRAP 0xffffffffu

enum {
    DE = 0, DB = 1, NMI = 2, BP = 3, OF = 4, BR = 5, UD = 6, NM = 7, DF = 8, TS = 10, NP = 11, SS = 12, GP = 13,
    PF = 14, MF = 16, AC = 17, MC = 18, XM = 19,
};

/* Calls a function; an exception that has no handler ends it. Not re-entrant; one processor at a time. */
struct trap caught(const void *function, word argument);
#define CAUGHT(function, argument) caught(function, (word)(argument))

/* Runs code in ring 3 (or elsewhere) until a trap. */
struct far_state {
    word ip, sp, cs, ss, flags, argument;
};
struct trap caught_far(struct far_state state);

typedef void handler(struct frame *);
/* From now on `function` handles the vector; NULL: none. */
void on(u32 vector, handler *function);
/* Ends the running `caught` with this frame; for handlers. */
void give_up(struct frame *frame);
/* Makes the gate of a vector anew: the privilege level of INT n, interrupt stack (0: none), 14 interrupt or 15 trap gate. */
void set_gate(u32 vector, u32 dpl, u32 ist, u32 type);
/* The gate's first 8 bytes. */
u64 *gate(u32 vector);
/* The exception's name and number in checks: `caught` and these. */
void check_trap(const char *name, struct trap t, u32 vector, u32 error, const void *ip);
bool check_trap_quietly(const char *name, struct trap t, u32 vector, u32 error, const void *ip);
bool is_error_vector(u32 vector);

/* --- descriptors --- */

extern u64 gdt[];
#define CODE_SEL 0x08
#define DATA_SEL 0x10
#define USER_DATA_SEL 0x33
#ifdef __x86_64__
#define CODE32_SEL 0x18
#define CODE16_SEL 0x20
#define USER_CODE32_SEL 0x2b
#define USER_CODE_SEL 0x3b
#define FREE_SEL 0x40
#else
#define CODE16_SEL 0x18
#define DATA16_SEL 0x20
#define USER_CODE_SEL 0x2b
#define FREE_SEL 0x38
#endif
#define TSS_SEL 0x100

struct __attribute__((packed)) tss {
#ifdef __x86_64__
    u32 reserved0;
    u64 rsp[3];
    u64 reserved1;
    u64 ist[7];
    u64 reserved2;
    u16 reserved3;
    u16 iomap;
#else
    u32 link, esp0, ss0, esp1, ss1, esp2, ss2, cr3, eip, eflags, eax, ecx, edx, ebx, esp, ebp, esi, edi;
    u32 es, cs, ss, ds, fs, gs, ldt;
    u16 trap, iomap;
#endif
    u8 io_permissions[8193];
};
/* The boot processor's. */
extern struct tss tss;
extern u8 trap_entries[];
void set_tss_descriptor(u32 selector, const void *base, u32 limit, u32 type);

/* --- instructions --- */

/* Code outside of the function that names it; in USER_SNIPPETS on pages of its own, which ring 3 may be given. */
#define SNIPPETS(code) asm(".pushsection .text.snippets, \"ax\"\n" code ".popsection")
#define USER_SNIPPETS(code) asm(".pushsection .user, \"ax\"\n" code ".popsection")

#define barrier() asm volatile("" ::: "memory")

static inline void out8(u16 port, u8 v) { asm volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static inline void out16(u16 port, u16 v) { asm volatile("outw %0, %1" ::"a"(v), "Nd"(port)); }
static inline void out32(u16 port, u32 v) { asm volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }
static inline u8 in8(u16 port)
{
    u8 v;
    asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u16 in16(u16 port)
{
    u16 v;
    asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u32 in32(u16 port)
{
    u32 v;
    asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

#define CONTROL_REGISTER(n)                                                                       \
    static inline word read_cr##n(void)                                                           \
    {                                                                                             \
        word v;                                                                                   \
        asm volatile("mov %%cr" #n ", %0" : "=r"(v)::"memory");                                   \
        return v;                                                                                 \
    }                                                                                             \
    static inline void write_cr##n(word v) { asm volatile("mov %0, %%cr" #n ::"r"(v) : "memory"); }
CONTROL_REGISTER(0)
CONTROL_REGISTER(2)
CONTROL_REGISTER(3)
CONTROL_REGISTER(4)
#ifdef __x86_64__
CONTROL_REGISTER(8)
#endif

enum {
    CR0_PE = 1, CR0_MP = 2, CR0_EM = 4, CR0_TS = 8, CR0_NE = 32, CR0_WP = 1 << 16, CR0_AM = 1 << 18,
    CR4_VME = 1, CR4_TSD = 4, CR4_DE = 8, CR4_PSE = 16, CR4_PAE = 32, CR4_PGE = 128, CR4_UMIP = 1 << 11,
    CR4_FSGSBASE = 1 << 16, CR4_OSXSAVE = 1 << 18, CR4_SMEP = 1 << 20, CR4_SMAP = 1 << 21,
};
#define CR0_PG 0x80000000u
enum {
    CF = 1, ZF = 64, TF = 0x100, IF = 0x200, IOPL3 = 0x3000, NT = 0x4000, RF = 0x10000, VM = 0x20000, AC_FLAG = 0x40000,
};

static inline u64 rdmsr(u32 msr)
{
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (u64)high << 32 | low;
}
static inline void wrmsr(u32 msr, u64 v)
{
    asm volatile("wrmsr" ::"c"(msr), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}
#define EFER 0xc0000080
#define EFER_SCE 1
#define EFER_LMA (1 << 10)
#define EFER_NXE (1 << 11)

static inline u64 rdtsc(void)
{
    u32 low, high;
    asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}
struct cpuid {
    u32 a, b, c, d;
};
static inline struct cpuid cpuid(u32 leaf, u32 subleaf)
{
    struct cpuid r;
    asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
    return r;
}
/* The guest runs under QEMU's TCG, which serves to check the guests themselves. What it is known to do wrong is
   noted where it shows. */
static inline bool under_tcg(void)
{
    return cpuid(0x40000000, 0).b == 0x54474354;
}
static inline void invlpg(const volatile void *p) { asm volatile("invlpg (%0)" ::"r"(p) : "memory"); }
static inline void pause(void) { asm volatile("pause" ::: "memory"); }
static inline void enable_interrupts(void) { asm volatile("sti" ::: "memory"); }
static inline void disable_interrupts(void) { asm volatile("cli" ::: "memory"); }
/* Lets interrupts in for a moment, without waiting for any. The port is there for engines that look for interrupts only
   when they leave the guest, and for what happens then. */
static inline void let_in(void)
{
    asm volatile("sti; nop; inb $0x80, %%al; inb $0x80, %%al; inb $0x80, %%al; cli" ::: "eax", "memory");
}
static inline word flags(void)
{
    word v;
    asm volatile("pushf; pop %0" : "=r"(v)::"memory");
    return v;
}
static inline void set_flags(word v) { asm volatile("push %0; popf" ::"r"(v) : "memory", "cc"); }

/* Spins until the condition holds, interrupts as they are; false after a long time of nothing. */
#define PATIENCE (1ull << 36)
#define wait_for(condition)                                                                       \
    ({                                                                                            \
        u64 start_ = rdtsc();                                                                     \
        while (!(condition) && rdtsc() - start_ < PATIENCE)                                       \
            pause();                                                                              \
        !!(condition);                                                                            \
    })
