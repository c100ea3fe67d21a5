/* The ways in which a guest ends a run; the command line says which. With `again`, the machine is reset in every way, and the guest,
   started again each time, looks at what a reset must have undone. */
#include "chips.h"

/* Survives a reset: RAM that the loader does not use. */
static u32 *const count = (u32 *)0x3000000;
#define MAGIC 0x1d9e7000

static void reset_by_keyboard_controller(void)
{
    wait_for(!(in8(0x64) & 2));
    out8(0x64, 0xfe);
}

static void reset_by_cf9(void)
{
    out8(0xcf9, 2);
    out8(0xcf9, 6);
}

static void reset_by_port_92(void) { out8(0x92, in8(0x92) | 1); }

static void triple_fault(void)
{
    struct __attribute__((packed)) {
        u16 limit;
        word base;
    } nothing = {0, 0};
    asm volatile("lidt %0; ud2" ::"m"(nothing));
}

static void power_off(void) { out16(acpi()->pm1_control, acpi()->sleep_type << 10 | 1 << 13); }

static void (*const resets[])(void) = {reset_by_keyboard_controller, reset_by_cf9, reset_by_port_92};

/* Whether all resets are over. */
static bool again(void)
{
    u32 n = (*count & ~0xfffu) == MAGIC ? *count & 0xfff : 0;
    if (n > 0) {
        say("started again, time %u\n", (u64)n);
        check("I/O APIC: masked after the reset", ioapic_read(0x10 + 5 * 2), IOAPIC_MASKED);
        check("local APIC: the timer is masked", apic_read(APIC_LVT_TIMER), LVT_MASKED);
        check("UART: no interrupts", in8(0x3f8 + 1), 0);
        check("ACPI: no events enabled", in16(acpi()->pm1_event + 2), 0);
        check("CMOS memory is kept", cmos_read(0x72), 0x40 + n);
        check("the TSC starts anew, or goes on", rdtsc() > 0, 1);
        check("interrupts are off", flags() & IF, 0);
        check("CR4", read_cr4(), 0x620);
        check("A20 is on", in8(0x92) & 3, 2);
    }
    if (n == COUNT(resets))
        return true;
    *count = MAGIC | (n + 1);
    cmos_write(0x72, 0x41 + n);
    ioapic_route(5, 0x45, 0);
    apic_enable();
    apic_write(APIC_LVT_TIMER, 0x46 | 1 << 17);
    apic_write(APIC_TIMER_INITIAL, 1000);
    out16(acpi()->pm1_event + 2, 0x100);
    out8(0x3f8 + 1, 2);
    /* Where the gate works this code, at an odd MiB, needs it. */
    if (!under_tcg())
        out8(0x92, 0);
    resets[n]();
    return false;
}

void run(void)
{
    if (has_option("triple-fault"))
        triple_fault();
    else if (has_option("power-off"))
        power_off();
    else if (has_option("keyboard-controller"))
        reset_by_keyboard_controller();
    else if (has_option("cf9"))
        reset_by_cf9();
    else if (has_option("port-92"))
        reset_by_port_92();
    else if (has_option("again")) {
        if (again())
            return;
    }
    /* An end may take a moment. */
    delay_us(3000000);
    check("the end", 0, 1);
}
