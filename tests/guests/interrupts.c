/* Interrupts from the line to the handler: the 8259s, the I/O APIC, the local APIC and its timer, NMI, the shadow of STI, HLT.
   Intel 8259A and 82093AA data sheets; SDM vol. 3A chapter 11 (APIC) and 6.8. */
#include "chips.h"

/* Vectors in the order of their handlers' starts. */
static volatile u8 seen[64];
static volatile u32 count;
static volatile word last_ip;

static void note(struct frame *f)
{
    last_ip = f->ip;
    if (count < sizeof seen)
        seen[count] = f->vector;
    count++;
}

static void pic_handler(struct frame *f)
{
    note(f);
    pic_eoi(f->vector - PIC_VECTOR);
}

static void pic_handler_without_end(struct frame *f) { note(f); }

static void apic_handler(struct frame *f)
{
    note(f);
    apic_eoi();
}

static void handle_all(handler *h, u32 first, u32 last)
{
    for (u32 v = first; v <= last; v++)
        on(v, h);
}

/* Waits with interrupts on until `n` have come; on with them off. */
static bool come(u32 n)
{
    enable_interrupts();
    bool all = wait_for(count >= n);
    disable_interrupts();
    return all;
}

/* What has come, as a number of two hexadecimal digits each. */
static u64 sequence(void)
{
    u64 n = 0;
    for (u32 i = 0; i < count && i < 8; i++)
        n = n << 8 | seen[i];
    return n;
}

static void forget(void) { count = 0; }

/* Interrupt 1, by a byte that the keyboard controller sends to itself. */
static void keyboard_request(void)
{
    while (in8(0x64) & 2)
        ;
    out8(0x64, 0xd2);
    while (in8(0x64) & 2)
        ;
    out8(0x60, 0x55);
}

static void keyboard_init(void)
{
    out8(0x64, 0xae);
    out8(0x64, 0x60);
    while (in8(0x64) & 2)
        ;
    out8(0x60, 0x41);
    while (in8(0x64) & 1)
        in8(0x60);
}

/* --- 8259 --- */

static void pic_and_pit(void)
{
    pic_init();
    handle_all(pic_handler, PIC_VECTOR, PIC_VECTOR + 15);
    pit_start(2, PIT_HZ / 500);
    pic_allow(1 << 0);
    check_true("8259: the timer ticks in mode 2", come(5));
    check("8259: by its vector", seen[0], PIC_VECTOR);
    pic_allow(0);
    let_in();
    forget();
    delay_us(8000);
    let_in();
    check("8259: a masked line is silent", count, 0);
    check("8259: its request waits", pic_irr() & 1, 1);
    pic_allow(1 << 0);
    check_true("8259: until it is unmasked", come(1));

    /* Without an end of interrupt there is no other. */
    on(PIC_VECTOR, pic_handler_without_end);
    forget();
    come(1);
    delay_us(8000);
    let_in();
    check("8259: nothing more before the end of interrupt", count, 1);
    check("8259: in service", pic_isr(), 1);
    pic_eoi(0);
    check("8259: no longer", pic_isr(), 0);
    check_true("8259: then the next", come(2));
    pic_eoi(0);
    on(PIC_VECTOR, pic_handler);

    /* Mode 0: one. */
    pit_start(0, 0);
    pic_init();
    forget();
    pit_start(0, 2000);
    pic_allow(1 << 0);
    come(1);
    delay_us(8000);
    let_in();
    check("8259: mode 0 interrupts once", count, 1);
    pic_allow(0);
    forget();
}

static void nested_keyboard(struct frame *f)
{
    /* The serial port is being served: a keyboard request is more important. */
    note(f);
    keyboard_request();
    let_in();
    note(f);
    uart_quiet();
    pic_eoi(UART_IRQ);
}

static void nested_uart(struct frame *f)
{
    note(f);
    uart_request();
    let_in();
    note(f);
    pic_eoi(1);
}

static void drain(struct frame *f)
{
    note(f);
    in8(0x60);
    pic_eoi(1);
}

static void quiet(struct frame *f)
{
    note(f);
    uart_quiet();
    pic_eoi(UART_IRQ);
}

static void pic_priorities(void)
{
    keyboard_init();
    pic_allow(1 << 1 | 1 << UART_IRQ);
    on(PIC_VECTOR + 1, drain);
    on(PIC_VECTOR + UART_IRQ, quiet);
    forget();
    uart_request();
    keyboard_request();
    u16 irr = pic_irr() & 0x12;
    come(2);
    check("8259: two requests", irr, 0x12);
    check("8259: the lower line first", sequence(), 0x2124);
    forget();
    on(PIC_VECTOR + UART_IRQ, nested_keyboard);
    uart_request();
    come(3);
    if (!left_out("an interrupt right after STI, IN"))
        check("8259: a lower line interrupts the handler of a higher", sequence(), 0x242124);
    forget();
    on(PIC_VECTOR + 1, nested_uart);
    on(PIC_VECTOR + UART_IRQ, quiet);
    keyboard_request();
    come(3);
    in8(0x60);
    check("8259: but not the other way round", sequence(), 0x212124);
    /* Rotation: the line that was served last becomes the least important. */
    forget();
    on(PIC_VECTOR + 1, drain);
    out8(PIC1, 0xc1);
    uart_request();
    keyboard_request();
    come(2);
    check("8259: the lowest priority set to line 1", sequence(), 0x2421);
    out8(PIC1, 0xc7);
    /* A poll acknowledges without the processor. */
    forget();
    uart_request();
    out8(PIC1, 0x0c);
    u8 poll = in8(PIC1);
    uart_quiet();
    pic_eoi(UART_IRQ);
    check("8259: polled", poll, 0x80 | UART_IRQ);
    /* The second controller, through line 2 of the first. */
    cmos_write(0x0b, cmos_read(0x0b) & 0x87);
    cmos_write(0x0a, 0x26);
    cmos_read(0x0c);
    pic_init();
    cmos_write(0x0b, cmos_read(0x0b) | 0x40);
    on(PIC_VECTOR + 8, pic_handler_without_end);
    pic_allow(1 << 8);
    check_true("8259: the clock's periodic interrupt", come(1));
    check("8259: by the second controller", sequence(), 0x28);
    check("8259: in service in both", pic_isr(), 1 << 8 | 1 << 2);
    check("8259: the clock says why", cmos_read(0x0c) & 0xc0, 0xc0);
    pic_eoi(8);
    check("8259: ends in both", pic_isr(), 0);
    forget();
    on(PIC_VECTOR + 8, pic_handler);
    delay_us(4000);
    let_in();
    delay_us(4000);
    let_in();
    check("8259: the clock waits until its flags are read", count <= 1, 1);
    cmos_write(0x0b, cmos_read(0x0b) & 0x87);
    cmos_read(0x0c);
    let_in();
    pic_allow(0);
    forget();
}

/* The edge/level registers: a level request is there as long as the line is up. */
#define ELCR 0x4d0

static u32 wrongly_in_service;
/* Input 7's vector without input 7 in service: a request that was gone when the processor asked. It is not to be ended. */
static void spurious(struct frame *f)
{
    note(f);
    wrongly_in_service += pic_isr() >> 7 & 1;
}

static void pic_withdrawn(void)
{
    pic_init();
    on(PIC_VECTOR + 7, spurious);
    on(PIC_VECTOR + UART_IRQ, quiet);
    out8(ELCR, in8(ELCR) | 1 << UART_IRQ);
    pic_allow(1 << UART_IRQ);
    forget();
    uart_request();
    u16 up = pic_irr() >> UART_IRQ & 1;
    uart_quiet();
    u16 down = pic_irr() >> UART_IRQ & 1;
    check("8259: a level request goes with its line", up << 1 | down, 2);
    let_in();
    /* Nothing, or what the data sheet calls the default IR7. */
    check("8259: a request withdrawn is no interrupt but a spurious one", count == 0 || sequence() == 0x27, 1);
    check("8259: which is not in service", wrongly_in_service << 16 | pic_isr(), 0);
    forget();
    uart_request();
    pic_allow(0);
    let_in();
    uart_quiet();
    check("8259: nor is one that is masked in time", count == 0 || sequence() == 0x27, 1);
    check("8259: not in service either", wrongly_in_service << 16 | pic_isr(), 0);
    out8(PIC1, 0x0c);
    check("8259: polled in vain", in8(PIC1) & 0x80, 0);
    check("8259: nothing in service by that", pic_isr(), 0);
    pic_allow(1 << UART_IRQ);
    forget();
    uart_request();
    come(1);
    check("8259: the next request is an interrupt as ever", sequence(), 0x24);
    out8(ELCR, in8(ELCR) & ~(1 << UART_IRQ));
    on(PIC_VECTOR + 7, pic_handler);
    pic_allow(0);
    /* A request in the second controller that is masked there. */
    cmos_write(0x0a, 0x26);
    cmos_write(0x0b, cmos_read(0x0b) | 0x40);
    cmos_read(0x0c);
    on(PIC_VECTOR + 7, spurious);
    on(PIC_VECTOR + 15, spurious);
    forget();
    pic_allow(1 << 8);
    bool asks = wait_for(pic_irr() >> 8 & 1);
    cmos_write(0x0b, cmos_read(0x0b) & 0x87);
    u16 cascaded = pic_irr() >> 2 & 1;
    pic_allow(0);
    let_in();
    check("8259: the second controller asks the first", asks << 1 | cascaded, 3);
    /* QEMU keeps the request. */
    if (!under_tcg())
        check("8259: no more when it is masked", pic_irr() >> 2 & 1, 0);
    check("8259: no interrupt but a spurious one", count == 0 || sequence() == 0x27 || sequence() == 0x2f, 1);
    check("8259: none of them in service", wrongly_in_service << 16 | (pic_isr() & ~4), 0);
    cmos_read(0x0c);
    pic_init();
    handle_all(pic_handler, PIC_VECTOR, PIC_VECTOR + 15);
    forget();
}

/* --- the processor --- */

SNIPPETS("shadow_sti: sti; shadow_first: nop; shadow_second: cli; ret\n"
         "shadow_none: sti; cli; ret\n"
         "shadow_ss: mov %ss, %eax; sti; nop_before: mov %eax, %ss; ss_first: nop; ss_second: cli; ret\n"
         "shadow_if_set: sti; sti; again_second: nop; cli; ret\n"
         "halt: sti; hlt; after_halt: cli; ret\n");
extern u8 shadow_sti[], shadow_first[], shadow_second[], shadow_none[], halt[], after_halt[], shadow_if_set[],
    again_second[];

static void call(const u8 *code) { asm volatile("call *%0" ::"r"(code) : "rax", "memory", "cc"); }

static void shadow(void)
{
    if (left_out("interrupts between one instruction and the next"))
        return;
    on(PIC_VECTOR + UART_IRQ, quiet);
    pic_allow(1 << UART_IRQ);
    forget();
    uart_request();
    call(shadow_none);
    u32 none = count;
    call(shadow_sti);
    check("STI, CLI lets nothing in", none, 0);
    check("STI and another instruction does", count, 1);
    check("after that instruction", last_ip, (word)shadow_second);
    forget();
    uart_request();
    call(shadow_if_set);
    check("the shadow is of the STI that sets IF", last_ip, (word)again_second);
    forget();
    uart_request();
    /* POPF and IRET have no shadow. */
    word f = flags();
    asm volatile("push %0; popf; after_popf: nop; cli" ::"r"(f | IF) : "memory", "cc");
    extern u8 after_popf[];
    check("POPF has no shadow", last_ip, (word)after_popf);
    pic_allow(0);
    forget();
}

static void halting(void)
{
    /* HLT ends with the interrupt; the handler returns behind it. */
    pit_start(0, 3000);
    pic_allow(1 << 0);
    let_in();
    forget();
    pit_start(0, 3000);
    call(halt);
    check("HLT waits for the interrupt", count, 1);
    check("which returns behind it", last_ip, (word)after_halt);
    pic_allow(0);
    forget();
}

/* --- I/O APIC --- */

static void level_handler(struct frame *f)
{
    note(f);
    /* The line stays up for the first two. */
    if (count >= 3)
        uart_quiet();
    apic_eoi();
}

static u32 remote_irr_inside, tmr_inside;
static void level_handler_inspects(struct frame *f)
{
    note(f);
    remote_irr_inside = ioapic_read(0x10 + UART_IRQ * 2) & IOAPIC_REMOTE_IRR;
    tmr_inside = apic_bit(APIC_TMR, f->vector);
    uart_quiet();
    apic_eoi();
}

static void io_apic(void)
{
    handle_all(apic_handler, 0x30, 0xfe);
    apic_enable();
    check("I/O APIC: its pins", ioapic_read(1) >> 16 & 0xff, 23);
    check("I/O APIC: entries are masked at reset", ioapic_read(0x10 + 20 * 2) & IOAPIC_MASKED, IOAPIC_MASKED);
    ioapic_write(0x10 + 20 * 2, 0xffffffff);
    /* QEMU keeps the reserved bits. */
    u32 kept = ioapic_read(0x10 + 20 * 2) & (under_tcg() ? 0x1f000 : 0xfffff000);
    check("I/O APIC: status and reserved bits cannot be written", kept, 0x1a000);
    ioapic_write(0x10 + 20 * 2, IOAPIC_MASKED);

    u32 pin = acpi()->pit_gsi;
    pit_start(2, PIT_HZ / 500);
    ioapic_route(pin, 0x40, apic_id());
    forget();
    check_true("I/O APIC: the timer's edges", come(4));
    check("I/O APIC: by the vector", seen[3], 0x40);
    ioapic_route(pin, 0x40 | IOAPIC_MASKED, apic_id());
    let_in();
    forget();
    delay_us(6000);
    let_in();
    check("I/O APIC: a masked pin is silent", count, 0);
    ioapic_route(pin, 0x41, 0x7e);
    delay_us(6000);
    let_in();
    check("I/O APIC: an interrupt for nobody", count, 0);
    ioapic_route(pin, IOAPIC_MASKED, 0);
    pit_start(0, 1);

    /* An edge. */
    forget();
    ioapic_route(UART_IRQ, 0x44, apic_id());
    uart_request();
    let_in();
    u32 edges = count;
    let_in();
    u32 more = count;
    uart_quiet();
    check("I/O APIC: an edge interrupts", edges, 1);
    check("I/O APIC: once, although the line stays up", more, 1);
    /* A level. */
    ioapic_route(UART_IRQ, 0x44 | IOAPIC_LEVEL, apic_id());
    on(0x44, level_handler);
    forget();
    uart_request();
    come(3);
    let_in();
    check("I/O APIC: a level interrupts again after each end", count, 3);
    on(0x44, level_handler_inspects);
    forget();
    uart_request();
    come(1);
    check("I/O APIC: remote IRR while in service", remote_irr_inside, IOAPIC_REMOTE_IRR);
    check("local APIC: TMR then", tmr_inside, 1);
    let_in();
    check("I/O APIC: no longer", ioapic_read(0x10 + UART_IRQ * 2) & IOAPIC_REMOTE_IRR, 0);
    /* Masked while the level is up; unmasked later. */
    forget();
    ioapic_route(UART_IRQ, 0x44 | IOAPIC_LEVEL | IOAPIC_MASKED, apic_id());
    uart_request();
    let_in();
    u32 masked = count;
    ioapic_write(0x10 + UART_IRQ * 2, 0x44 | IOAPIC_LEVEL);
    let_in();
    check("I/O APIC: a level is masked", masked, 0);
    if (!left_out("that the end of an interrupt is told at once"))
        check("I/O APIC: and comes when unmasked", count, 1);
    /* An edge that came while the pin was masked is lost. */
    ioapic_route(UART_IRQ, 0x44 | IOAPIC_MASKED, apic_id());
    on(0x44, apic_handler);
    forget();
    uart_request();
    uart_quiet();
    ioapic_write(0x10 + UART_IRQ * 2, 0x44);
    let_in();
    check("I/O APIC: a masked edge that is over is lost", count, 0);
    ioapic_route(UART_IRQ, IOAPIC_MASKED, 0);
}

/* --- local APIC --- */

static u32 ppr_inside;
static void nesting(struct frame *f)
{
    note(f);
    u32 v = f->vector;
    if (v == 0x51) {
        /* 0x55 is of the same class, 0x61 of a higher one. */
        ipi(0, IPI_SELF | IPI_FIXED | 0x55);
        ipi(0, IPI_SELF | IPI_FIXED | 0x61);
        let_in();
        check("local APIC: 0x61 has ended", apic_bit(APIC_ISR, 0x61), 0);
        check("local APIC: 0x51 is in service", apic_bit(APIC_ISR, 0x51), 1);
        check("local APIC: 0x55 waits", apic_bit(APIC_IRR, 0x55), 1);
    }
    if (v == 0x61)
        ppr_inside = apic_read(APIC_PPR);
    apic_eoi();
    note(f);
}

static void nested(void)
{
    forget();
    on(0x51, nesting);
    on(0x55, nesting);
    on(0x61, nesting);
    ipi(0, IPI_SELF | IPI_FIXED | 0x51);
    come(6);
    check("local APIC: nested handlers", sequence(), 0x516161515555);
    check("PPR is the class in service", ppr_inside, 0x60);
}

static void local_apic(void)
{
    apic_enable();
    check("local APIC: version", apic_read(APIC_VERSION) & 0xf0, 0x10);
    handle_all(apic_handler, 0x30, 0xfe);
    forget();
    ipi(0, IPI_SELF | IPI_FIXED | 0x51);
    check("local APIC: an interrupt to itself waits in IRR", apic_bit(APIC_IRR, 0x51), 1);
    let_in();
    check("local APIC: and comes", sequence(), 0x51);
    check("local APIC: IRR is clear then", apic_bit(APIC_IRR, 0x51), 0);
    forget();
    ipi(0, IPI_SELF | IPI_FIXED | 0x51);
    ipi(0, IPI_SELF | IPI_FIXED | 0x72);
    ipi(0, IPI_SELF | IPI_FIXED | 0x51);
    ipi(apic_id(), IPI_FIXED | 0x63);
    come(3);
    let_in();
    check("local APIC: the highest vector first, equal ones as one", sequence(), 0x726351);

    forget();
    apic_write(APIC_TPR, 0x50);
    ipi(0, IPI_SELF | IPI_FIXED | 0x51);
    let_in();
    check("TPR holds back its own class", count, 0);
    check("PPR shows it", apic_read(APIC_PPR), 0x50);
    ipi(0, IPI_SELF | IPI_FIXED | 0x61);
    let_in();
    check("and not a higher one", sequence(), 0x61);
    check("CR8 is the class of TPR", read_cr8(), 5);
    write_cr8(4);
    let_in();
    check("CR8 lowers it", sequence(), 0x6151);
    check("TPR shows CR8", apic_read(APIC_TPR), 0x40);
    write_cr8(15);
    ipi(0, IPI_SELF | IPI_FIXED | 0xef);
    let_in();
    check("CR8 = 15 holds back all but 0xf0 and above", count, 2);
    write_cr8(0);
    let_in();
    check("until it is lowered", sequence(), 0x6151ef);
    SNIPPETS("load_cr8: mov %rdi, %cr8; ret\n");
    extern u8 load_cr8[];
    /* QEMU ignores them. */
    if (!under_tcg())
        check_trap("reserved bits of CR8", CAUGHT(load_cr8, 16), GP, 0, load_cr8);

    if (!left_out("what is in service: ISR, PPR, priorities"))
        nested();
    handle_all(apic_handler, 0x30, 0xfe);

    /* Logical destinations. */
    apic_write(APIC_DFR, 0xffffffff);
    apic_write(APIC_LDR, 0x04000000);
    forget();
    ipi(0x04, IPI_LOGICAL | IPI_FIXED | 0x52);
    ipi(0x08, IPI_LOGICAL | IPI_FIXED | 0x53);
    ipi(0x0c, IPI_LOGICAL | IPI_LOWEST | 0x54);
    ipi(0xff, IPI_FIXED | 0x56);
    ipi(0, IPI_ALL | IPI_FIXED | 0x57);
    ipi(0, IPI_OTHERS | IPI_FIXED | 0x58);
    come(4);
    check("local APIC: logical, lowest priority, broadcast, shorthand", sequence(), 0x57565452);

    /* Disabled by software: nothing comes, the LVT is masked. */
    apic_write(APIC_LVT_TIMER, 0x40);
    apic_write(APIC_SVR, 0xff);
    /* QEMU masks it only later. */
    if (!under_tcg())
        check("local APIC: disabled, the LVT is masked", apic_read(APIC_LVT_TIMER) & LVT_MASKED, LVT_MASKED);
    forget();
    ipi(0, IPI_SELF | IPI_FIXED | 0x51);
    let_in();
    check("local APIC: disabled, nothing comes", count, 0);
    apic_enable();
    let_in();
    forget();
}

/* --- its timer --- */

static void write_no_deadline(void) { wrmsr(TSC_DEADLINE_MSR, 0); }
static void leave_deadline_mode(void) { apic_write(APIC_LVT_TIMER, 0x62); }

/* Disarms a deadline in time, and waits until it is over. On a busy host this may take several attempts. */
static void disarm(void (*how)(void))
{
    u64 deadline, ahead = 100000;
    do {
        apic_write(APIC_LVT_TIMER, 0x62 | 2 << 17);
        asm volatile("mfence" ::: "memory");
        ahead *= 2;
        deadline = rdtsc() + ahead;
        wrmsr(TSC_DEADLINE_MSR, deadline);
        how();
    } while (rdtsc() >= deadline);
    let_in();
    forget();
    wait_for(rdtsc() > deadline);
    let_in();
}

static void timer(void)
{
    apic_enable();
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    forget();
    apic_write(APIC_LVT_TIMER, 0x60);
    apic_write(APIC_TIMER_INITIAL, 100000);
    check_true("timer: one shot", come(1));
    check("timer: its vector", seen[0], 0x60);
    check("timer: stands at 0", apic_read(APIC_TIMER_CURRENT), 0);
    delay_us(3000);
    let_in();
    check("timer: once", count, 1);
    /* It counts down. */
    apic_write(APIC_LVT_TIMER, 0x60 | LVT_MASKED);
    apic_write(APIC_TIMER_INITIAL, 0xffffffff);
    u32 first = apic_read(APIC_TIMER_CURRENT);
    delay_us(1000);
    u32 second = apic_read(APIC_TIMER_CURRENT);
    apic_write(APIC_TIMER_INITIAL, 0);
    check_true("timer: counts down", second < first);
    check("timer: initial count 0 stops it", apic_read(APIC_TIMER_CURRENT), 0);
    /* Divided by 128 it is slower: far less than 128 times, whatever the load of the host. */
    apic_write(APIC_TIMER_DIVIDE, 0xa);
    apic_write(APIC_TIMER_INITIAL, 0xffffffff);
    u64 tsc = rdtsc();
    first = apic_read(APIC_TIMER_CURRENT);
    delay_us(2000);
    second = apic_read(APIC_TIMER_CURRENT);
    tsc = rdtsc() - tsc;
    check_true("timer: divided by 128", first - second < tsc / 16 && first != second);
    apic_write(APIC_TIMER_INITIAL, 0);
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    /* Masked: it runs, and nothing comes. */
    forget();
    apic_write(APIC_TIMER_INITIAL, 1000);
    wait_for(apic_read(APIC_TIMER_CURRENT) == 0);
    let_in();
    check("timer: masked", count, 0);
    check("timer: and does not wait", apic_bit(APIC_IRR, 0x60), 0);
    apic_write(APIC_LVT_TIMER, 0x61 | 1 << 17);
    apic_write(APIC_TIMER_INITIAL, 100000);
    check_true("timer: periodic", come(5));
    check("timer: its vector", seen[4], 0x61);
    apic_write(APIC_TIMER_INITIAL, 0);
    let_in();
    forget();
    delay_us(2000);
    let_in();
    check("timer: stopped", count, 0);

    if (!(cpuid(1, 0).c >> 24 & 1)) {
        say("no TSC deadline\n");
        return;
    }
    apic_write(APIC_LVT_TIMER, 0x62 | 2 << 17);
    barrier();
    asm volatile("mfence" ::: "memory");
    apic_write(APIC_TIMER_INITIAL, 1000);
    check("deadline: no initial count", apic_read(APIC_TIMER_CURRENT), 0);
    u64 deadline = rdtsc() + 400000;
    wrmsr(TSC_DEADLINE_MSR, deadline);
    check_true("deadline: comes", come(1));
    check_true("deadline: not too early", rdtsc() >= deadline);
    check("deadline: its vector", seen[0], 0x62);
    check("deadline: disarmed", rdmsr(TSC_DEADLINE_MSR), 0);
    forget();
    wrmsr(TSC_DEADLINE_MSR, 1);
    check_true("deadline: one that is over comes at once", come(1));
    forget();
    disarm(write_no_deadline);
    check("deadline: taken back", count, 0);
    disarm(leave_deadline_mode);
    check("deadline: another mode disarms it", count, 0);
    wrmsr(TSC_DEADLINE_MSR, rdtsc() + 200000);
    check("deadline: the MSR is 0 in other modes", rdmsr(TSC_DEADLINE_MSR), 0);
    /* From HLT. */
    apic_write(APIC_LVT_TIMER, 0x62 | 2 << 17);
    asm volatile("mfence" ::: "memory");
    wrmsr(TSC_DEADLINE_MSR, rdtsc() + 400000);
    call(halt);
    check("deadline: ends HLT", sequence(), 0x62);
    apic_write(APIC_LVT_TIMER, LVT_MASKED);
    forget();
}

/* --- NMI --- */

static volatile u32 nmi_depth, nmi_deepest;
static void nmi_handler(struct frame *f)
{
    note(f);
    nmi_depth++;
    if (nmi_depth > nmi_deepest)
        nmi_deepest = nmi_depth;
    if (count == 1) {
        ipi(apic_id(), IPI_NMI);
        for (volatile u32 i = 0; i < 1000; i++)
            ;
    }
    nmi_depth--;
}

static void nmi(void)
{
    apic_enable();
    on(NMI, nmi_handler);
    forget();
    nmi_deepest = 0;
    ipi(apic_id(), IPI_NMI);
    wait_for(count >= 2);
    check("NMI: comes although IF is clear, and a second one after the first", count, 2);
    check("NMI: not inside it", nmi_deepest, 1);
    on(NMI, NULL);
    forget();
}

/* --- LINT0: the 8259s through the local APIC --- */

static void virtual_wire(void)
{
    handle_all(pic_handler, PIC_VECTOR, PIC_VECTOR + 15);
    apic_enable();
    pit_start(2, PIT_HZ / 500);
    pic_allow(1 << 0);
    forget();
    delay_us(4000);
    let_in();
    check("LINT0 masked: the 8259s are cut off", count, 0);
    apic_write(APIC_LINT0, 0x700);
    check_true("LINT0 as ExtINT", come(2));
    check("gives the 8259's vector", seen[0], PIC_VECTOR);
    pic_allow(0);
    let_in();
    forget();
    apic_write(APIC_LINT0, LVT_MASKED);
}

/* --- x2APIC --- */

static void x2apic_mode(void)
{
    if (!(cpuid(1, 0).c >> 21 & 1)) {
        say("no x2APIC\n");
        return;
    }
    SNIPPETS("write_msr: mov %rdi, %rax; mov %rdi, %rdx; shr $32, %rdx; mov write_msr_number(%rip), %ecx; write_msr_at: wrmsr; ret\n"
             "read_msr: mov %edi, %ecx; read_msr_at: rdmsr; ret\n"
             "write_msr_number: .long 0\n");
    extern u8 write_msr[], write_msr_at[], read_msr[], read_msr_at[];
    extern u32 write_msr_number;
    u32 id = apic_id();
    check_trap("x2APIC: no MSRs before it is on", CAUGHT(read_msr, 0x802), GP, 0, read_msr_at);
    apic_write(APIC_TPR, 0x20);
    u64 base = rdmsr(APIC_BASE_MSR);
    check("APIC base: enabled, and of the boot processor", base & 0xfffffd00, 0xfee00900);
    x2apic_enable();
    check("x2APIC: ID", rdmsr(0x802), id);
    check("x2APIC: TPR is kept", apic_read(APIC_TPR), 0x20);
    check("x2APIC: logical ID follows from the ID", rdmsr(0x80d), (id >> 4) << 16 | 1 << (id & 15));
    apic_write(APIC_TPR, 0);
    apic_enable();
    forget();
    ipi(0, IPI_SELF | IPI_FIXED | 0x51);
    wrmsr(0x83f, 0x63);
    come(2);
    check("x2APIC: interrupts to itself, by ICR and by SELF IPI", sequence(), 0x6351);
    forget();
    ipi(id, IPI_FIXED | 0x52);
    ipi((id >> 4) << 16 | 1 << (id & 15), IPI_LOGICAL | IPI_FIXED | 0x53);
    ipi(0xffffffff, IPI_FIXED | 0x54);
    come(3);
    check("x2APIC: physical, logical, broadcast", sequence(), 0x545352);
    check_trap("x2APIC: DFR is gone", CAUGHT(read_msr, 0x80e), GP, 0, read_msr_at);
    check_trap("x2APIC: EOI cannot be read", CAUGHT(read_msr, 0x80b), GP, 0, read_msr_at);
    bool lax = left_out("reserved bits of EOI and TPR in x2APIC mode");
    write_msr_number = 0x80b;
    if (!lax)
        check_trap("x2APIC: EOI of anything but 0", CAUGHT(write_msr, 1), GP, 0, write_msr_at);
    write_msr_number = 0x802;
    check_trap("x2APIC: the ID cannot be written", CAUGHT(write_msr, 0), GP, 0, write_msr_at);
    write_msr_number = 0x808;
    if (!lax)
        check_trap("x2APIC: reserved bits of TPR", CAUGHT(write_msr, 0x100), GP, 0, write_msr_at);
    write_msr_number = APIC_BASE_MSR;
    check_trap("x2APIC: no way to xAPIC mode", CAUGHT(write_msr, base), GP, 0, write_msr_at);
    check("x2APIC: still on", rdmsr(APIC_BASE_MSR) & 0xc00, 0xc00);
    /* The timer as before. */
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    forget();
    apic_write(APIC_LVT_TIMER, 0x60);
    apic_write(APIC_TIMER_INITIAL, 100000);
    check_true("x2APIC: timer", come(1));
}

void run(void)
{
    pic_and_pit();
    pic_priorities();
    pic_withdrawn();
    shadow();
    halting();
    io_apic();
    local_apic();
    timer();
    nmi();
    virtual_wire();
    x2apic_mode();
}
