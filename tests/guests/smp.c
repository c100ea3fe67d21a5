/* Several processors: their start, interrupts among them, atomic operations, locks, the order of memory accesses, TLB shootdown,
   code modified by another processor, one time for all. SDM vol. 3A chapters 8 and 10 (MP initialisation). */
#include "chips.h"

#define MAX_CPUS 16
#define TRAMPOLINE 0x8000
/* Where a starting processor finds its stack, and what it calls in 64-bit mode. */
#define MAILBOX 0x7000

static u32 cpus;
static volatile u32 online;

/* What the processors do together: each calls it with its number, and counts itself in `finished`. */
typedef void job(u32 cpu);
static job *volatile current;
static volatile u32 round_, finished;

SNIPPETS(".code16\n"
         "trampoline: cli\n"
         "xor %ax, %ax; mov %ax, %ds\n"
         "lgdtl " "0x7010" "\n"
         "mov %cr0, %eax; or $1, %al; mov %eax, %cr0\n"
         "ljmpl $0x18, $start_32\n"
         "trampoline_end:\n"
         ".code32\n"
         "start_32: mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss\n"
         "mov $start_64, %ebp; jmp to_long_mode\n"
         ".code64\n"
         "start_64: mov $1, %eax; lock xadd %eax, next_cpu(%rip)\n"
         "mov %eax, %edi; inc %eax; shl $14, %eax\n"
         "mov stacks(%rip), %rsp; add %rax, %rsp\n"
         "call ap_main\n"
         ".pushsection .data\n next_cpu: .long 1\n .popsection\n");
extern u8 trampoline[], trampoline_end[], gdt_pointer[];
extern volatile u32 next_cpu;
word stacks;
static u32 apic_ids[MAX_CPUS];
/* Where its state when it starts is noted. */
static struct {
    u64 cr0, efer, tsc, apic_base;
    u32 svr;
} at_start[MAX_CPUS];

static struct {
    volatile u32 pings, nmis;
} per_cpu[MAX_CPUS] __attribute__((aligned(64)));

static u32 me(void)
{
    u32 id = apic_id();
    for (u32 i = 0; i < MAX_CPUS; i++)
        if (apic_ids[i] == id)
            return i;
    return 0;
}

static void load_idt(void)
{
    struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } idt = {4095, (word)gate(0)};
    asm volatile("lidt %0; lgdt gdt_pointer" ::"m"(idt));
}

void ap_main(u32 cpu)
{
    load_idt();
    at_start[cpu].svr = apic_read(APIC_SVR);
    at_start[cpu].apic_base = rdmsr(APIC_BASE_MSR);
    apic_enable();
    apic_ids[cpu] = apic_id();
    __atomic_add_fetch(&online, 1, __ATOMIC_SEQ_CST);
    u32 seen = 0;
    for (;;) {
        while (round_ == seen)
            asm volatile("sti; hlt; cli" ::: "memory");
        seen = round_;
        current(cpu);
        __atomic_add_fetch(&finished, 1, __ATOMIC_SEQ_CST);
    }
}

static void wake(struct frame *f)
{
    (void)f;
    apic_eoi();
}

static void start_job(job *j)
{
    finished = 0;
    current = j;
    barrier();
    round_ = round_ + 1;
    on(0x4f, wake);
    ipi(0, IPI_OTHERS | IPI_FIXED | 0x4f);
}

/* Runs a job on all processors, including this one. */
static void together(job *j)
{
    start_job(j);
    j(0);
    if (!wait_for(finished == cpus - 1)) {
        check("all processors finish", finished, cpus - 1);
        end_run();
    }
}

/* --- start --- */

static void start(void)
{
    memcpy((void *)TRAMPOLINE, trampoline, trampoline_end - trampoline);
    memcpy((void *)(MAILBOX + 0x10), gdt_pointer, 6);
    stacks = (word)allocate((MAX_CPUS + 1) << 14);
    for (u32 i = 0; i < MAX_CPUS; i++)
        apic_ids[i] = 0xffffffff;
    apic_ids[0] = apic_id();
    online = 1;
    cpus = acpi()->processors;
    check("fw_cfg tells of as many processors as ACPI", fw_cfg_number(FW_CFG_CPUS, 2), cpus);
    check_true("at most 16", cpus <= MAX_CPUS);
    ipi(0, IPI_OTHERS | IPI_INIT);
    delay_us(10000);
    check("INIT starts nobody", online, 1);
    ipi(0, IPI_OTHERS | IPI_STARTUP | TRAMPOLINE >> 12);
    wait_for(online == cpus);
    check("all processors start", online, cpus);
    /* A second start-up message is ignored by those who run. */
    ipi(0, IPI_OTHERS | IPI_STARTUP | TRAMPOLINE >> 12);
    delay_us(2000);
    check("and start once", online, cpus);
    u32 listed = 0, after_reset = 0, application = 0;
    for (u32 i = 0; i < cpus; i++) {
        for (u32 j = 0; j < cpus; j++)
            listed += apic_ids[i] == acpi()->apic_ids[j];
        if (i > 0) {
            after_reset += at_start[i].svr == 0xff;
            application += (at_start[i].apic_base & 0x900) == 0x800;
        }
    }
    check("their APIC IDs are those of the MADT", listed, cpus);
    check("their local APICs are disabled at first", after_reset, cpus - 1);
    check("they are not the boot processor", application, cpus - 1);
    check("this one is", rdmsr(APIC_BASE_MSR) & 0x100, 0x100);
}

/* --- interrupts --- */

static void ping(struct frame *f)
{
    (void)f;
    per_cpu[me()].pings++;
    apic_eoi();
}

static void nmi(struct frame *f)
{
    (void)f;
    per_cpu[me()].nmis++;
}

static u32 total(void)
{
    u32 n = 0;
    for (u32 i = 0; i < cpus; i++)
        n += per_cpu[i].pings;
    return n;
}

static volatile u32 arrived;
static void wait_for_ping(u32 cpu)
{
    if (cpu == 0)
        return;
    u32 before = per_cpu[cpu].pings;
    __atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST);
    while (per_cpu[cpu].pings == before)
        asm volatile("sti; hlt; cli");
}

static void messages(void)
{
    on(0x40, ping);
    on(NMI, nmi);
    ipi(0, IPI_OTHERS | IPI_FIXED | 0x40);
    wait_for(total() == cpus - 1);
    check("an interrupt to all others", total(), cpus - 1);
    check("not to itself", per_cpu[0].pings, 0);
    for (u32 i = 1; i < cpus; i++) {
        u32 before = per_cpu[i].pings;
        ipi(apic_ids[i], IPI_FIXED | 0x40);
        wait_for(per_cpu[i].pings != before);
        check_quietly("an interrupt to one", per_cpu[i].pings - before, 1);
    }
    check("interrupts to each", total(), (cpus - 1) * 2);
    ipi(0, IPI_ALL | IPI_FIXED | 0x40);
    let_in();
    wait_for(total() == (cpus - 1) * 3 + 1);
    check("an interrupt to all", total(), (cpus - 1) * 3 + 1);
    ipi(0, IPI_OTHERS | IPI_NMI);
    u32 nmis = 0;
    for (u32 i = 1; i < cpus; i++)
        nmis += wait_for(per_cpu[i].nmis == 1);
    check("NMI to all others", nmis + per_cpu[0].nmis, cpus - 1);
    /* From HLT. */
    arrived = 0;
    start_job(wait_for_ping);
    wait_for(arrived == cpus - 1);
    u32 early = finished;
    ipi(0, IPI_OTHERS | IPI_FIXED | 0x40);
    wait_for(finished == cpus - 1);
    check("processors halt until an interrupt", finished << 8 | early, (cpus - 1) << 8);
}

/* --- requests that are withdrawn while they are taken --- */

#define ELCR 0x4d0
static volatile u32 taken, spurious, misplaced;
static volatile bool toggling;

static void uart_interrupt(struct frame *f)
{
    (void)f;
    taken++;
    if (!(pic_isr() >> UART_IRQ & 1))
        misplaced++;
    if (!toggling)
        uart_quiet();
    pic_eoi(UART_IRQ);
}

/* Input 7's vector without input 7 in service, of either 8259: the request was gone when the processor asked. */
static void spurious_interrupt(struct frame *f)
{
    u32 irq = f->vector - PIC_VECTOR;
    spurious++;
    if (pic_isr() >> irq & 1)
        misplaced++;
    if (irq > 7)
        pic_eoi(2);
}

static void toggle(u32 cpu)
{
    if (cpu == 0) {
        while (toggling)
            let_in();
    } else if (cpu == 1) {
        u32 rounds = has_option("limited") ? 40 : 300;
        for (u32 i = 0; i < rounds; i++) {
            u32 before = taken;
            uart_request();
            /* At various moments, and every fourth time after it is taken. */
            for (u32 j = 0; i % 4 ? j < i * 8 : taken == before && j < 1000000; j++)
                barrier();
            uart_quiet();
        }
        toggling = false;
    }
}

static void withdrawn(void)
{
    if (cpus < 2)
        return;
    pic_init();
    on(PIC_VECTOR + UART_IRQ, uart_interrupt);
    on(PIC_VECTOR + 7, spurious_interrupt);
    on(PIC_VECTOR + 15, spurious_interrupt);
    out8(ELCR, in8(ELCR) | 1 << UART_IRQ);
    apic_write(APIC_LINT0, 0x700);
    pic_allow(1 << UART_IRQ);
    toggling = true;
    together(toggle);
    say("requests withdrawn by another processor: %u interrupts, %u spurious ones\n", (u64)taken, (u64)spurious);
    check("8259: in service if and only if it is not spurious", misplaced, 0);
    check("8259: nothing left in service", pic_isr(), 0);
    u32 before = taken;
    uart_request();
    enable_interrupts();
    wait_for(taken != before);
    disable_interrupts();
    check_true("8259: and it still interrupts", taken != before);
    pic_allow(0);
    let_in();
    apic_write(APIC_LINT0, LVT_MASKED);
    out8(ELCR, in8(ELCR) & ~(1 << UART_IRQ));
}

/* --- atomic operations and locks --- */

#define TIMES 10000
static volatile u64 counter, exchanged, plain;
static volatile u32 ticket, serving;
static u64 straddling[32] __attribute__((aligned(4096)));

static void add(u32 cpu)
{
    (void)cpu;
    /* Across two cache lines; the page after next is another matter. */
    volatile u64 *split = (volatile u64 *)((u8 *)straddling + 60);
    for (u32 i = 0; i < TIMES; i++) {
        asm volatile("lock incq %0" : "+m"(counter));
        u64 old = exchanged, new;
        do
            new = old + 3;
        while (!__atomic_compare_exchange_n(&exchanged, &old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        if (i % 16 == 0)
            asm volatile("lock addq $1, %0" : "+m"(*split));
    }
}

static void locked(u32 cpu)
{
    (void)cpu;
    for (u32 i = 0; i < TIMES / 40; i++) {
        u32 mine = __atomic_fetch_add(&ticket, 1, __ATOMIC_SEQ_CST);
        while (serving != mine)
            pause();
        plain = plain + 1;
        barrier();
        serving = mine + 1;
    }
}

static u8 pages[2 * PAGE] __attribute__((aligned(4096)));
static void across_pages(u32 cpu)
{
    (void)cpu;
    volatile u32 *p = (volatile u32 *)(pages + PAGE - 2);
    for (u32 i = 0; i < 500; i++)
        asm volatile("lock incl %0" : "+m"(*p));
}

static void atomics(void)
{
    together(add);
    check("LOCK INC of all", counter, (u64)TIMES * cpus);
    check("compare and exchange of all", exchanged, (u64)TIMES * 3 * cpus);
    check("LOCK ADD across cache lines", *(u64 *)((u8 *)straddling + 60), (u64)TIMES / 16 * cpus);
    /* A KVM that emulates kernel code does a locked access across pages as two plain ones. */
    if (!left_out("that a locked access across pages is atomic")) {
        together(across_pages);
        check("LOCK INC across pages", *(u32 *)(pages + PAGE - 2), 500 * cpus);
    }
    together(locked);
    check("a ticket lock", plain, (u64)TIMES / 40 * cpus);
}

/* --- the order of accesses --- */

static volatile u64 data[8] __attribute__((aligned(64))), flag[8] __attribute__((aligned(64)));
static volatile u32 violations, both_zero;
static volatile u32 turn[2] __attribute__((aligned(64)));

/* Processor 0 writes data, then the flag; the others must not see the flag without the data. */
static void message_passing(u32 cpu)
{
    if (cpu == 0) {
        for (u64 i = 1; i <= 5000; i++) {
            data[0] = i;
            barrier();
            flag[0] = i;
        }
        return;
    }
    u64 seen;
    u64 begin = rdtsc();
    do {
        seen = flag[0];
        barrier();
        if (data[0] < seen)
            __atomic_add_fetch(&violations, 1, __ATOMIC_SEQ_CST);
    } while (seen < 5000 && rdtsc() - begin < PATIENCE);
}

/* Dekker's pattern with fences: two processors cannot both read the old value. */
static void store_buffering(u32 cpu)
{
    if (cpu > 1)
        return;
    for (u32 i = 1; i <= 500; i++) {
        data[cpu] = i;
        asm volatile("mfence" ::: "memory");
        u64 other = data[1 - cpu];
        turn[cpu] = other < i;
        __atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST);
        while (arrived / 2 < i)
            pause();
        if (cpu == 0 && turn[0] && turn[1])
            both_zero++;
        __atomic_add_fetch(&serving, 1, __ATOMIC_SEQ_CST);
        while (serving / 2 < i)
            pause();
    }
}

static void order(void)
{
    if (cpus < 2)
        return;
    data[0] = flag[0] = 0;
    together(message_passing);
    check("writes are seen in their order", violations, 0);
    data[0] = data[1] = 0;
    arrived = serving = 0;
    together(store_buffering);
    check("MFENCE orders a write before a read", both_zero, 0);
}

/* --- TLB shootdown --- */

#define SHARED 0x8000000000ull
static volatile u64 *shared_entry;
static volatile u32 stale, acknowledged;
static u8 *frames[2];

static void shoot(struct frame *f)
{
    (void)f;
    invlpg((void *)SHARED);
    __atomic_add_fetch(&acknowledged, 1, __ATOMIC_SEQ_CST);
    apic_eoi();
}

static volatile bool shooting;
static volatile u32 looks;

/* Reads the shared page all the time. While it shows one frame, the other's contents must not be seen. */
static void look(u32 cpu)
{
    if (cpu == 0) {
        for (u32 i = 0; i < 100; i++) {
            u8 *frame = frames[i & 1];
            *shared_entry = (word)frame | 3;
            invlpg((void *)SHARED);
            acknowledged = 0;
            ipi(0, IPI_OTHERS | IPI_FIXED | 0x41);
            if (!wait_for(acknowledged == cpus - 1)) {
                stale += 1000;
                break;
            }
            /* Nobody uses the other frame any more. */
            *frames[~i & 1] = 0xee;
            barrier();
            u32 before = looks;
            if (cpus > 1)
                wait_for(looks != before);
            *frames[~i & 1] = 0x11;
        }
        shooting = false;
        return;
    }
    while (shooting) {
        disable_interrupts();
        u8 value = *(volatile u8 *)SHARED;
        if (value == 0xee)
            __atomic_add_fetch(&stale, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&looks, 1, __ATOMIC_SEQ_CST);
        enable_interrupts();
        pause();
    }
    disable_interrupts();
}

static void shootdown(void)
{
    u64 *t = identity_pml4;
    u32 index = 1;
    for (u32 level = 0; level < 3; level++) {
        u64 *next = allocate(PAGE);
        t[index] = (word)next | 3;
        t = next;
        index = 0;
    }
    shared_entry = t;
    frames[0] = allocate(PAGE);
    frames[1] = allocate(PAGE);
    *frames[0] = *frames[1] = 0x11;
    *shared_entry = (word)frames[1] | 3;
    on(0x41, shoot);
    shooting = true;
    together(look);
    check("after INVLPG everywhere nobody sees the old page", stale, 0);
}

/* --- code --- */

static u8 *code;
static volatile u32 wrong_code, calls;
static volatile bool calling;

/* Processor 0 changes the immediate of `mov $n, %eax; ret`, aligned, as it is executed: any of the values is right. After
   a handshake only the new one is. */
static void modify(u32 cpu)
{
    if (cpu == 0) {
        for (u32 i = 1; i <= 1000; i++) {
            *(volatile u32 *)(code + 4) = i;
            u32 before = calls;
            if (cpus > 1 && i % 16 == 0)
                wait_for(calls - before > cpus * 2);
        }
        calling = false;
        return;
    }
    u32 last = 0;
    while (calling) {
        u32 (*function)(void) = (void *)(code + 3);
        u32 got = function();
        /* Never back, never beyond what was written. */
        if (got < last || got > 1000)
            __atomic_add_fetch(&wrong_code, 1, __ATOMIC_SEQ_CST);
        last = got;
        __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    }
    cpuid(0, 0);
    u32 (*function)(void) = (void *)(code + 3);
    if (function() != 1000)
        __atomic_add_fetch(&wrong_code, 1, __ATOMIC_SEQ_CST);
}

static void cross_modifying_code(void)
{
    code = allocate(PAGE);
    code[3] = 0xb8;
    code[8] = 0xc3;
    calling = true;
    together(modify);
    check("code that another processor modifies", wrong_code, 0);
}

/* --- time --- */

static volatile u64 latest;
static volatile u32 backwards;

static void clock_race(u32 cpu)
{
    (void)cpu;
    for (u32 i = 0; i < 3000; i++) {
        /* What was read before, by anybody, is not later than what is read now. */
        u64 seen = latest;
        u64 now = rdtsc();
        if ((i64)(now - seen) < 0)
            __atomic_add_fetch(&backwards, 1, __ATOMIC_SEQ_CST);
        while (now > seen && !__atomic_compare_exchange_n(&latest, &seen, now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            ;
    }
}

static volatile u32 timers;
static void tick(struct frame *f)
{
    (void)f;
    __atomic_add_fetch(&timers, 1, __ATOMIC_SEQ_CST);
    apic_eoi();
}
static void own_timer(u32 cpu)
{
    (void)cpu;
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    apic_write(APIC_LVT_TIMER, 0x42);
    apic_write(APIC_TIMER_INITIAL, 200000);
    while (apic_read(APIC_TIMER_CURRENT))
        pause();
    let_in();
}

static void time(void)
{
    together(clock_race);
    check("the TSCs are one: time does not go back between processors", backwards, 0);
    on(0x42, tick);
    together(own_timer);
    enable_interrupts();
    wait_for(timers == cpus);
    disable_interrupts();
    check("every processor has its timer", timers, cpus);
}

/* --- a processor sent back --- */

static void restart(void)
{
    if (cpus < 2)
        return;
    u32 n = online;
    next_cpu = 1;
    apic_ids[1] = 0xffffffff;
    u32 id = acpi()->apic_ids[1] == apic_ids[0] ? acpi()->apic_ids[0] : acpi()->apic_ids[1];
    for (u32 i = 1; i < cpus; i++)
        if (apic_ids[i] == id)
            apic_ids[i] = 0xfffffffe;
    ipi(id, IPI_INIT);
    delay_us(1000);
    ipi(id, IPI_STARTUP | TRAMPOLINE >> 12);
    wait_for(online == n + 1);
    check("INIT stops a processor, which can be started again", online, n + 1);
    check("it is the same", apic_ids[1], id);
}

void run(void)
{
    apic_enable();
    start();
    messages();
    withdrawn();
    atomics();
    order();
    shootdown();
    /* QEMU drops its translation of the old code before the write, so that another processor may translate the old code again. */
    if (!under_tcg())
        cross_modifying_code();
    time();
    restart();
}
