/* The board's chips and tables, for guests. Addresses that a PC may choose are taken from its tables. */
#pragma once
#include "guest.h"

#ifdef __x86_64__
/* The first 4 GiB, mapped to themselves. */
extern u64 identity_pml4[512], identity_pdpt[512], identity_pd[2048];
/* Where a processor goes on in 64-bit mode: 32-bit protected mode with this GDT jumps here with the address in EBP. */
extern u8 to_long_mode[];
#endif

/* --- 8259 interrupt controllers --- */

#define PIC1 0x20
#define PIC2 0xa0
#define PIC_VECTOR 0x20
/* Vectors from PIC_VECTOR on, everything masked. */
void pic_init(void);
/* Masks all lines but those whose bits are set. */
void pic_allow(u16 lines);
void pic_eoi(u32 irq);
/* Requested, and in service: both controllers. */
u16 pic_irr(void);
u16 pic_isr(void);

/* --- 8254 timer: 1193182 Hz --- */

#define PIT_HZ 1193182
/* Channel 0 in this mode with this count (0: 65536). */
void pit_start(u32 mode, u32 count);
u32 pit_read(void);

/* --- 16550 as a source of interrupts --- */

/* Requests interrupt 4 (because the transmitter is empty) until `uart_quiet`. Nothing must be printed meanwhile. */
void uart_request(void);
void uart_quiet(void);
#define UART_IRQ 4

/* --- clock and CMOS memory --- */

u8 cmos_read(u8 index);
void cmos_write(u8 index, u8 value);

/* --- ACPI --- */

struct acpi {
    u32 pm1_event, pm1_control, pm_timer, sci;
    u32 sleep_type;
    u64 hpet;
    u64 ecam;
    u32 ioapic, local_apic;
    /* Enabled local APICs in the MADT, and the global interrupt of ISA IRQ 0. */
    u32 processors, pit_gsi;
    u8 apic_ids[64];
    bool wide_pm_timer;
};
/* Reads the tables, whose checksums must be right. */
const struct acpi *acpi(void);
u32 pm_timer_read(void);
#define PM_TIMER_HZ 3579545
/* Waits by the PM timer. */
void delay_us(u32 us);
/* Its value so far, without wrapping; to be called at least every 4 seconds. */
u64 pm_timer_total(void);

/* --- I/O APIC and local APIC --- */

u32 ioapic_read(u32 index);
void ioapic_write(u32 index, u32 value);
#define IOAPIC_MASKED (1 << 16)
#define IOAPIC_LEVEL (1 << 15)
#define IOAPIC_REMOTE_IRR (1 << 14)
/* Redirection of a pin: vector and flags, to one local APIC. */
void ioapic_route(u32 pin, u32 low, u32 apic_id);

/* Registers by their offset in the page. */
enum {
    APIC_ID = 0x20, APIC_VERSION = 0x30, APIC_TPR = 0x80, APIC_PPR = 0xa0, APIC_EOI = 0xb0, APIC_LDR = 0xd0, APIC_DFR = 0xe0,
    APIC_SVR = 0xf0, APIC_ISR = 0x100, APIC_TMR = 0x180, APIC_IRR = 0x200, APIC_ESR = 0x280, APIC_ICR = 0x300,
    APIC_ICR_HIGH = 0x310, APIC_LVT_TIMER = 0x320, APIC_LINT0 = 0x350, APIC_LINT1 = 0x360, APIC_LVT_ERROR = 0x370,
    APIC_TIMER_INITIAL = 0x380, APIC_TIMER_CURRENT = 0x390, APIC_TIMER_DIVIDE = 0x3e0,
};
#define APIC_BASE_MSR 0x1b
#define TSC_DEADLINE_MSR 0x6e0
#define LVT_MASKED (1 << 16)
u32 apic_read(u32 reg);
void apic_write(u32 reg, u32 value);
/* Software-enables it, with spurious vector 0xff, everything in the LVT masked. */
void apic_enable(void);
/* Uses MSRs from now on (for `apic_read` and the like on all processors). */
void x2apic_enable(void);
u32 apic_id(void);
static inline void apic_eoi(void) { apic_write(APIC_EOI, 0); }
/* The vector's bit in ISR, TMR or IRR. */
bool apic_bit(u32 reg, u32 vector);
/* Sends; `low` has the vector, delivery mode and shorthand. Waits until it is sent. */
void ipi(u32 apic_id, u32 low);
enum {
    IPI_FIXED = 0x4000, IPI_LOWEST = 0x4100, IPI_NMI = 0x4400, IPI_INIT = 0x4500, IPI_STARTUP = 0x4600, IPI_LOGICAL = 1 << 11,
    IPI_SELF = 1 << 18, IPI_ALL = 2 << 18, IPI_OTHERS = 3 << 18,
};

/* --- firmware configuration --- */

#define FW_CFG_SIGNATURE 0
#define FW_CFG_RAM_SIZE 3
#define FW_CFG_CPUS 5
#define FW_CFG_FILES 0x19
void fw_cfg_select(u16 key);
void fw_cfg_bytes(void *to, u32 len);
u64 fw_cfg_number(u16 key, u32 len);
