/* The runtime's part in C; see guest.h. */
#include "guest.h"

#define SERIAL 0x3f8
#define DEBUG_EXIT 0xf4

extern word catch_sp;
extern u32 boot_info;
extern u8 image_end[];
word call_caught(const void *function, word argument);
void go(const struct far_state *);
void rt_resume(void) __attribute__((noreturn));

struct tss tss;
#ifdef __x86_64__
static u64 idt[256][2];
#else
static u64 idt[256];
#endif
static handler *handlers[256];
static struct trap last;
static u32 failures, passes;
static u8 kernel_stack[16384] __attribute__((aligned(16)));

/* --- output --- */

static void put(char c)
{
    while (!(in8(SERIAL + 5) & 0x20))
        ;
    out8(SERIAL, c);
}

static void put_number(u64 n, u32 radix)
{
    char text[24];
    u32 len = 0;
    do {
        u32 digit;
        if (radix == 16) {
            digit = n & 15;
            n >>= 4;
        } else {
            /* Long division by halves, so that 32-bit guests need no library. */
            u32 high = n >> 32, low = n, carry = high % 10;
            u64 quotient = (u64)(high / 10) << 32;
            for (int bit = 31; bit >= 0; bit--) {
                carry = carry << 1 | (low >> bit & 1);
                if (carry >= 10) {
                    carry -= 10;
                    quotient |= 1ull << bit;
                }
            }
            digit = carry;
            n = quotient;
        }
        text[len++] = "0123456789abcdef"[digit];
    } while (n);
    while (len)
        put(text[--len]);
}

void say(const char *format, ...)
{
    __builtin_va_list list;
    __builtin_va_start(list, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            for (const char *s = __builtin_va_arg(list, const char *); *s; s++)
                put(*s);
            break;
        case 'd': {
            i64 n = __builtin_va_arg(list, i64);
            if (n < 0)
                put('-');
            put_number(n < 0 ? -n : n, 10);
            break;
        }
        case 'u':
            put_number(__builtin_va_arg(list, u64), 10);
            break;
        default:
            put_number(__builtin_va_arg(list, u64), 16);
        }
    }
    __builtin_va_end(list);
}

bool check_quietly(const char *name, u64 got, u64 want)
{
    if (got != want) {
        failures++;
        say("FAIL %s: got %x, want %x\n", name, got, want);
    }
    return got == want;
}

bool check(const char *name, u64 got, u64 want)
{
    bool right = check_quietly(name, got, want);
    if (right) {
        passes++;
        say("ok %s\n", name);
    }
    return right;
}

void end_run(void)
{
    say("%u passed, %u failed\n", (u64)passes, (u64)failures);
    for (;;)
        out8(DEBUG_EXIT, failures ? 1 : 0);
}

/* --- memory --- */

void *memset(void *to, int byte, word len)
{
    void *d = to;
    asm volatile("rep stosb" : "+D"(d), "+c"(len) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, word len)
{
    void *d = to;
    asm volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(len)::"memory");
    return to;
}

int memcmp(const void *a, const void *b, word len)
{
    const u8 *x = a, *y = b;
    for (word i = 0; i < len; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

void *allocate_aligned(word len, word align)
{
    static word next;
    if (!next)
        next = (word)image_end + 0x100000;
    next = (next + align - 1) & -align;
    void *p = (void *)next;
    next += len;
    return memset(p, 0, len);
}

void *allocate(word len) { return allocate_aligned(len, len < PAGE ? 64 : PAGE); }

/* --- traps --- */

u64 *gate(u32 vector)
{
#ifdef __x86_64__
    return idt[vector];
#else
    return &idt[vector];
#endif
}

void set_gate(u32 vector, u32 dpl, u32 ist, u32 type)
{
    u64 entry = (word)trap_entries + vector * 16;
    *gate(vector) = (entry & 0xffff) | CODE_SEL << 16 | (u64)(0x80 | dpl << 5 | type) << 40 | (u64)ist << 32 |
                    (entry >> 16 & 0xffff) << 48;
#ifdef __x86_64__
    idt[vector][1] = entry >> 32;
#endif
}

void on(u32 vector, handler *function) { handlers[vector] = function; }

bool is_error_vector(u32 vector) { return vector == DF || (vector >= TS && vector <= PF) || vector == AC; }

void give_up(struct frame *f)
{
    last.vector = f->vector;
    last.error = f->error;
    last.ip = f->ip;
    last.cs = f->cs;
    last.flags = f->flags;
    last.value = f->ax;
#ifdef __x86_64__
    bool has_stack = true;
#else
    bool has_stack = f->cs & 3 || f->flags & VM;
#endif
    last.sp = has_stack ? f->sp : 0;
    last.ss = has_stack ? f->ss : 0;
    last.cr2 = f->vector == PF ? read_cr2() : 0;
    rt_resume();
}

void on_trap(struct frame *f)
{
    if (handlers[f->vector]) {
        handlers[f->vector](f);
        return;
    }
    if (catch_sp)
        give_up(f);
    say("FAIL unexpected trap %u, error %x, at %x:%x, flags %x, cr2 %x\n", (u64)f->vector, (u64)f->error, (u64)f->cs,
        (u64)f->ip, (u64)f->flags, (u64)read_cr2());
    failures++;
    end_run();
}

struct trap caught(const void *function, word argument)
{
    memset(&last, 0, sizeof last);
    last.vector = NO_TRAP;
    word value = call_caught(function, argument);
    if (last.vector == NO_TRAP)
        last.value = value;
    return last;
}

struct trap caught_far(struct far_state state) { return CAUGHT(go, &state); }

static bool check_trap_parts(const char *name, struct trap t, u32 vector, u32 error, const void *ip)
{
    bool same = t.vector == vector && (!is_error_vector(vector) || t.error == error) && (!ip || t.ip == (word)ip);
    if (!same) {
        failures++;
        say("FAIL %s: got vector %d error %x at %x, want %d %x at %x\n", name, (i64)(int)t.vector, (u64)t.error,
            (u64)t.ip, (i64)(int)vector, (u64)error, (u64)(word)ip);
    }
    return same;
}

void check_trap(const char *name, struct trap t, u32 vector, u32 error, const void *ip)
{
    if (check_trap_parts(name, t, vector, error, ip)) {
        passes++;
        say("ok %s\n", name);
    }
}

bool check_trap_quietly(const char *name, struct trap t, u32 vector, u32 error, const void *ip)
{
    return check_trap_parts(name, t, vector, error, ip);
}

/* --- descriptors and start --- */

void set_tss_descriptor(u32 selector, const void *base, u32 limit, u32 type)
{
    u64 b = (word)base;
    u64 *d = &gdt[selector / 8];
    d[0] = (limit & 0xffff) | (b & 0xffffff) << 16 | (u64)(0x80 | type) << 40 | (u64)(limit >> 16 & 15) << 48 |
           (b >> 24 & 0xff) << 56;
#ifdef __x86_64__
    d[1] = b >> 32;
#endif
}

const char *command_line(void)
{
    const u32 *info = (const u32 *)(word)boot_info;
    if (!(info[0] & 4))
        return "";
    const char *text = (const char *)(word)info[4];
    while (*text && *text != ' ')
        text++;
    return *text ? text + 1 : text;
}

bool has_option(const char *option)
{
    for (const char *text = command_line(); *text; text++) {
        const char *rest = text;
        for (const char *o = option; *o && *o == *rest; o++)
            rest++;
        word len = rest - text;
        bool whole = !option[len] && (!*rest || *rest == ' ');
        if (whole && (text == command_line() || text[-1] == ' '))
            return true;
    }
    return false;
}

bool left_out(const char *what)
{
    if (!has_option("limited"))
        return false;
    say("left out: %s\n", what);
    return true;
}

void rt_start(void)
{
    struct __attribute__((packed)) {
        u16 limit;
        word base;
    } pointer = {sizeof idt - 1, (word)idt};

    out8(SERIAL + 1, 0);
    out8(SERIAL + 3, 3);
    out8(SERIAL + 2, 1);
    /* Firmware may have left the 8259s on. */
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    for (u32 vector = 0; vector < 256; vector++)
        set_gate(vector, 0, 0, 14);
    asm volatile("lidt %0" ::"m"(pointer));
#ifdef __x86_64__
    tss.rsp[0] = (word)kernel_stack + sizeof kernel_stack;
    const u32 type = 9;
#else
    tss.esp0 = (word)kernel_stack + sizeof kernel_stack;
    tss.ss0 = DATA_SEL;
    const u32 type = 9;
#endif
    tss.iomap = __builtin_offsetof(struct tss, io_permissions);
    memset(tss.io_permissions, 0xff, sizeof tss.io_permissions);
    set_tss_descriptor(TSS_SEL, &tss, sizeof tss - 1, type);
    asm volatile("ltr %w0" ::"r"(TSS_SEL));
    run();
    end_run();
}
