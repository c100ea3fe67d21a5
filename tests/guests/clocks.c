/* The clocks of a PC measure the same time: TSC, PM timer, PIT, HPET, local APIC timer, real-time clock. Bounds are wide, because a
   host that is busy stops the guest between any two readings; a reading between two others of the reference is always exact. */
#include "chips.h"

/* Reads a clock between two readings of the TSC. */
struct reading {
    u64 before, value, after;
};

static struct reading read(u64 (*clock)(void))
{
    struct reading r, best = {0, 0, 0};
    /* The narrowest of a few. */
    for (u32 i = 0; i < 20; i++) {
        r.before = rdtsc();
        r.value = clock();
        r.after = rdtsc();
        if (!best.after || r.after - r.before < best.after - best.before)
            best = r;
    }
    return best;
}

static u64 pm_clock(void) { return pm_timer_total(); }

static u64 hpet_clock(void) { return *(volatile u64 *)(acpi()->hpet + 0xf0); }

/* Counts down from 65536, in mode 2; `pit_total` makes it count up without end. */
static u64 pit_clock(void)
{
    static u64 total;
    u16 now = -pit_read();
    total += (u16)(now - (u16)total);
    return total;
}

static u64 apic_clock(void) { return 0xffffffff - apic_read(APIC_TIMER_CURRENT); }

/* Ticks of a clock per million TSC ticks, over 30 ms or more. */
static void rate(const char *name, u64 (*clock)(void), u64 hz, u64 tsc_hz)
{
    struct reading a = read(clock), b = a;
    while ((i64)(b.before - a.after) < (i64)(tsc_hz / 30))
        b = read(clock);
    u64 ticks = b.value - a.value;
    /* It ran for less than from a.before to b.after and for more than from a.after to b.before; a tick more or less, and 1 %. */
    u64 most = (b.after - a.before) / (tsc_hz / 10000) * hz / 10000, least = (b.before - a.after) / (tsc_hz / 10000) * hz / 10000;
    bool right = ticks <= most + most / 100 + 2 && ticks + 2 + least / 100 >= least;
    if (!check_true(name, right))
        say("%u ticks, %u to %u expected\n", ticks, least, most);
}

/* A clock never goes back. */
static void monotonic(const char *name, u64 (*clock)(void))
{
    u64 last = clock(), backwards = 0;
    for (u32 i = 0; i < 20000; i++) {
        u64 now = clock();
        backwards += now < last;
        last = now;
    }
    check(name, backwards, 0);
}

static u64 tsc_clock(void) { return rdtsc(); }

static u64 measure_tsc(void)
{
    struct reading a = read(pm_clock), b = a;
    while (b.value - a.value < PM_TIMER_HZ / 20)
        b = read(pm_clock);
    u64 hz = ((a.before + a.after) / 2 - (b.before + b.after) / 2) * -1ull * PM_TIMER_HZ / (b.value - a.value);
    say("TSC: %u kHz\n", hz / 1000);
    return hz;
}

static void hpet(u64 tsc_hz)
{
    u64 base = acpi()->hpet;
    if (!base) {
        say("no HPET\n");
        return;
    }
    volatile u64 *hpet = (void *)(word)base;
    u64 period = hpet[0] >> 32;
    check_true("HPET: its period is at most 100 ns", period > 0 && period <= 100000000);
    hpet[2] = 0;
    u64 stands = hpet[0x1e];
    delay_us(1000);
    check("HPET: stands while it is disabled", hpet[0x1e], stands);
    hpet[0x1e] = 0x123456789;
    check("HPET: can be set then", hpet[0x1e], 0x123456789);
    hpet[0x1e] = 0;
    hpet[2] = 1;
    monotonic("HPET: does not go back", hpet_clock);
    rate("HPET: its rate", hpet_clock, 1000000000000000ull / period, tsc_hz);
}

/* --- HPET interrupts --- */

static volatile u32 interrupts;
static void apic_handler(struct frame *f)
{
    (void)f;
    interrupts++;
    apic_eoi();
}
static void hpet_level_handler(struct frame *f)
{
    interrupts++;
    if (interrupts >= 2)
        *(volatile u64 *)(acpi()->hpet + 0x20) = 1;
    apic_eoi();
    (void)f;
}

/* The line stays up: without the mask the interrupt would come for ever. */
static void sci_handler(struct frame *f)
{
    (void)f;
    interrupts++;
    ioapic_write(0x10 + acpi()->sci * 2, IOAPIC_MASKED);
    apic_eoi();
}

static bool come(u32 n)
{
    enable_interrupts();
    bool all = wait_for(interrupts >= n);
    disable_interrupts();
    return all;
}

static void hpet_interrupts(void)
{
    u64 base = acpi()->hpet;
    if (!base)
        return;
    volatile u64 *hpet = (void *)(word)base, *timer = hpet + 0x20;
    u64 period = hpet[0] >> 32, ms = 1000000000000ull / period;
    u32 pins = timer[0] >> 32, pin = 0;
    while (pin < 24 && !(pins >> pin & 1))
        pin++;
    on(0x50, apic_handler);
    /* One shot, edge. */
    hpet[2] = 0;
    hpet[0x1e] = 0;
    timer[0] = pin << 9 | 4;
    timer[1] = ms;
    ioapic_route(pin, 0x50, apic_id());
    interrupts = 0;
    hpet[2] = 1;
    check_true("HPET: one shot", come(1));
    /* Periodic. */
    if (timer[0] & 16) {
        hpet[2] = 0;
        hpet[0x1e] = 0;
        timer[0] = pin << 9 | 4 | 8 | 64;
        timer[1] = ms;
        timer[1] = ms;
        interrupts = 0;
        hpet[2] = 1;
        check_true("HPET: periodic", come(4));
        timer[0] = pin << 9;
    }
    /* Level. */
    let_in();
    hpet[2] = 0;
    hpet[0x1e] = 0;
    on(0x50, hpet_level_handler);
    ioapic_route(pin, 0x50 | IOAPIC_LEVEL, apic_id());
    timer[0] = pin << 9 | 2 | 4;
    timer[1] = ms;
    interrupts = 0;
    hpet[2] = 1;
    check_true("HPET: a level, until its status is cleared", come(2));
    let_in();
    check("HPET: and no longer", interrupts, 2);
    timer[0] = pin << 9;
    ioapic_route(pin, IOAPIC_MASKED, 0);
}

/* --- real-time clock --- */

static u8 from_bcd(u8 v) { return cmos_read(0x0b) & 4 ? v : (v >> 4) * 10 + (v & 15); }

static void real_time_clock(u64 tsc_hz)
{
    u8 month = from_bcd(cmos_read(8)), day = from_bcd(cmos_read(7)), hour = from_bcd(cmos_read(4) & 0x7f);
    check_true("RTC: a date and a time", month >= 1 && month <= 12 && day >= 1 && day <= 31 && hour <= 24);
    /* From before a second's begin to after the next one's. */
    u8 first = cmos_read(0), second;
    u64 start;
    do
        start = rdtsc();
    while ((second = cmos_read(0)) == first);
    wait_for(cmos_read(0) != second);
    check_true("RTC: a second takes a second", rdtsc() - start >= tsc_hz / 100 * 99);
    /* Setting it. */
    cmos_write(0x0b, cmos_read(0x0b) | 0x80);
    cmos_write(2, 0x34);
    cmos_write(4, 0x12);
    cmos_write(0x0b, cmos_read(0x0b) & ~0x80);
    check("RTC: can be set", cmos_read(4) << 8 | cmos_read(2), 0x1234);
}

/* --- PM timer's overflow: the SCI --- */

static void sci(void)
{
    const struct acpi *a = acpi();
    /* The timer's highest bit changes every 2.3 s: its status bit tells. */
    out16(a->pm1_event, 0x01);
    out16(a->pm1_event + 2, 0x01);
    out16(a->pm1_control, in16(a->pm1_control) | 1);
    on(0x53, sci_handler);
    ioapic_route(a->sci, 0x53 | IOAPIC_LEVEL, apic_id());
    interrupts = 0;
    enable_interrupts();
    bool came = wait_for(interrupts);
    disable_interrupts();
    check_true("SCI: the PM timer's", came);
    check("SCI: its status", in16(a->pm1_event) & 1, 1);
    out16(a->pm1_event + 2, 0);
    out16(a->pm1_event, 1);
    check("SCI: cleared", in16(a->pm1_event) & 1, 0);
}

void run(void)
{
    apic_enable();
    u64 tsc_hz = measure_tsc();
    check_true("TSC: more than 100 MHz", tsc_hz > 100000000);
    if (cpuid(0x80000000, 0).a >= 0x80000007 && !under_tcg())
        check("TSC: invariant", cpuid(0x80000007, 0).d >> 8 & 1, 1);
    monotonic("TSC: does not go back", tsc_clock);
    monotonic("PM timer: does not go back", pm_clock);
    rate("PM timer: its rate, later", pm_clock, PM_TIMER_HZ, tsc_hz);
    pit_start(2, 0);
    pit_clock();
    rate("PIT: its rate", pit_clock, PIT_HZ, tsc_hz);
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    apic_write(APIC_LVT_TIMER, LVT_MASKED | 0x40);
    apic_write(APIC_TIMER_INITIAL, 0xffffffff);
    monotonic("local APIC timer: counts down", apic_clock);
    apic_write(APIC_TIMER_INITIAL, 0);
    hpet(tsc_hz);
    hpet_interrupts();
    real_time_clock(tsc_hz);
    sci();
    /* The TSC can be written, where that is allowed. */
    u64 now = rdtsc();
    wrmsr(0x10, now + (1ull << 40));
    /* QEMU ignores it. */
    if (!under_tcg() && !left_out("setting the TSC"))
        check_true("TSC: set forward", rdtsc() - now >= 1ull << 40);
    rate("PM timer: and the TSC goes on as before", pm_clock, PM_TIMER_HZ, tsc_hz);
}
