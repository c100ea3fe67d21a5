/* See chips.h. */
#include "chips.h"

/* --- 8259 --- */

void pic_init(void)
{
    out8(PIC1, 0x11);
    out8(PIC2, 0x11);
    out8(PIC1 + 1, PIC_VECTOR);
    out8(PIC2 + 1, PIC_VECTOR + 8);
    out8(PIC1 + 1, 4);
    out8(PIC2 + 1, 2);
    out8(PIC1 + 1, 1);
    out8(PIC2 + 1, 1);
    pic_allow(0);
}

void pic_allow(u16 lines)
{
    if (lines & 0xff00)
        lines |= 4;
    out8(PIC1 + 1, ~lines);
    out8(PIC2 + 1, ~lines >> 8);
}

void pic_eoi(u32 irq)
{
    if (irq >= 8)
        out8(PIC2, 0x20);
    out8(PIC1, 0x20);
}

static u16 pic_register(u8 command)
{
    out8(PIC1, command);
    out8(PIC2, command);
    return in8(PIC1) | in8(PIC2) << 8;
}

u16 pic_irr(void) { return pic_register(0x0a); }
u16 pic_isr(void) { return pic_register(0x0b); }

/* --- 8254 --- */

void pit_start(u32 mode, u32 count)
{
    out8(0x43, 0x30 | mode << 1);
    out8(0x40, count);
    out8(0x40, count >> 8);
}

u32 pit_read(void)
{
    out8(0x43, 0);
    u32 low = in8(0x40);
    return low | in8(0x40) << 8;
}

/* --- 16550 --- */

#define UART 0x3f8

void uart_request(void)
{
    while (!(in8(UART + 5) & 0x40))
        ;
    out8(UART + 4, 0x0b);
    out8(UART + 1, 2);
}

void uart_quiet(void)
{
    out8(UART + 1, 0);
    in8(UART + 2);
}

/* --- clock --- */

u8 cmos_read(u8 index)
{
    out8(0x70, index);
    return in8(0x71);
}

void cmos_write(u8 index, u8 value)
{
    out8(0x70, index);
    out8(0x71, value);
}

/* --- ACPI --- */

struct __attribute__((packed)) table {
    char signature[4];
    u32 len;
    u8 revision, checksum;
    char oem[6], oem_table[8];
    u32 oem_revision, creator, creator_revision;
    u8 body[];
};

static u16 get16(const u8 *p) { return p[0] | p[1] << 8; }
static u32 get32(const u8 *p) { return get16(p) | (u32)get16(p + 2) << 16; }
static u64 get64(const u8 *p) { return get32(p) | (u64)get32(p + 4) << 32; }

static u8 sum(const void *p, u32 len)
{
    u8 total = 0;
    for (u32 i = 0; i < len; i++)
        total += ((const u8 *)p)[i];
    return total;
}

static const u8 *find_rsdp(void)
{
    for (word p = 0xe0000; p < 0x100000; p += 16)
        if (!memcmp((void *)p, "RSD PTR ", 8) && !sum((void *)p, 20))
            return (void *)p;
    return NULL;
}

static const struct table *find_table(const u8 *rsdp, const char *signature)
{
    bool wide = rsdp[15] >= 2 && get64(rsdp + 24);
    const struct table *root = (void *)(word)(wide ? get64(rsdp + 24) : get32(rsdp + 16));
    u32 size = wide ? 8 : 4;
    for (u32 at = 0; at + size <= root->len - sizeof *root; at += size) {
        const struct table *t = (void *)(word)(wide ? get64(root->body + at) : get32(root->body + at));
        if (!memcmp(t->signature, signature, 4)) {
            check_quietly("the checksum of a table", sum(t, t->len), 0);
            return t;
        }
    }
    return NULL;
}

static void read_madt(struct acpi *a, const struct table *madt)
{
    a->local_apic = get32(madt->body);
    for (const u8 *e = madt->body + 8; e < (const u8 *)madt + madt->len; e += e[1]) {
        if (e[0] == 0 && (get32(e + 4) & 1) && a->processors < sizeof a->apic_ids)
            a->apic_ids[a->processors++] = e[3];
        else if (e[0] == 1 && get32(e + 8) == 0)
            a->ioapic = get32(e + 4);
        else if (e[0] == 2 && e[2] == 0 && e[3] == 0)
            a->pit_gsi = get32(e + 4);
    }
}

/* The first element of the package \_S5. */
static u32 read_sleep_type(const struct table *dsdt)
{
    const u8 *end = (const u8 *)dsdt + dsdt->len;
    for (const u8 *p = dsdt->body; p + 12 < end; p++)
        if (!memcmp(p, "_S5_\x12", 5)) {
            p += 5;
            p += (*p >> 6) + 2;
            return *p == 0x0a ? p[1] : *p;
        }
    return 0xff;
}

const struct acpi *acpi(void)
{
    static struct acpi a;
    static bool known;
    if (known)
        return &a;
    known = true;
    const u8 *rsdp = find_rsdp();
    if (!rsdp) {
        check("the ACPI root pointer", 0, 1);
        end_run();
    }
    const struct table *fadt = find_table(rsdp, "FACP"), *madt = find_table(rsdp, "APIC"),
                       *hpet = find_table(rsdp, "HPET"), *mcfg = find_table(rsdp, "MCFG");
    const u8 *f = (const u8 *)fadt;
    a.sci = get16(f + 46);
    a.pm1_event = get32(f + 56);
    a.pm1_control = get32(f + 64);
    a.pm_timer = get32(f + 76);
    a.wide_pm_timer = get32(f + 112) >> 8 & 1;
    a.sleep_type = read_sleep_type((void *)(word)get32(f + 40));
    read_madt(&a, madt);
    a.hpet = hpet ? get64(hpet->body + 8) : 0;
    a.ecam = mcfg ? get64(mcfg->body + 8) : 0;
    return &a;
}

u32 pm_timer_read(void) { return in32(acpi()->pm_timer); }

u64 pm_timer_total(void)
{
    static u64 total;
    u32 mask = acpi()->wide_pm_timer ? 0xffffffff : 0xffffff;
    total += (pm_timer_read() - (u32)total) & mask;
    return total;
}

void delay_us(u32 us)
{
    u64 end = pm_timer_total() + (u64)us * 4;
    while (pm_timer_total() < end)
        ;
}

/* --- APICs --- */

static volatile u32 *ioapic(void) { return (void *)(word)acpi()->ioapic; }

u32 ioapic_read(u32 index)
{
    ioapic()[0] = index;
    return ioapic()[4];
}

void ioapic_write(u32 index, u32 value)
{
    ioapic()[0] = index;
    ioapic()[4] = value;
}

void ioapic_route(u32 pin, u32 low, u32 apic_id)
{
    ioapic_write(0x10 + pin * 2, IOAPIC_MASKED);
    ioapic_write(0x11 + pin * 2, apic_id << 24);
    ioapic_write(0x10 + pin * 2, low);
}

static bool x2apic;

u32 apic_read(u32 reg)
{
    if (x2apic)
        return rdmsr(0x800 + reg / 16);
    return *(volatile u32 *)(0xfee00000ul + reg);
}

void apic_write(u32 reg, u32 value)
{
    if (x2apic)
        wrmsr(0x800 + reg / 16, value);
    else
        *(volatile u32 *)(0xfee00000ul + reg) = value;
}

u32 apic_id(void) { return x2apic ? rdmsr(0x802) : apic_read(APIC_ID) >> 24; }

void apic_enable(void)
{
    apic_write(APIC_SVR, 0x1ff);
    apic_write(APIC_LVT_TIMER, LVT_MASKED);
    apic_write(APIC_LINT0, LVT_MASKED);
    apic_write(APIC_LINT1, LVT_MASKED);
    apic_write(APIC_LVT_ERROR, LVT_MASKED);
    apic_write(APIC_TPR, 0);
}

void x2apic_enable(void)
{
    wrmsr(APIC_BASE_MSR, rdmsr(APIC_BASE_MSR) | 0xc00);
    x2apic = true;
}

bool apic_bit(u32 reg, u32 vector) { return apic_read(reg + vector / 32 * 16) >> vector % 32 & 1; }

void ipi(u32 apic_id, u32 low)
{
    if (x2apic) {
        barrier();
        wrmsr(0x830, (u64)apic_id << 32 | low);
        return;
    }
    apic_write(APIC_ICR_HIGH, apic_id << 24);
    apic_write(APIC_ICR, low);
    while (apic_read(APIC_ICR) & 1 << 12)
        pause();
}

/* --- firmware configuration --- */

void fw_cfg_select(u16 key) { out16(0x510, key); }

void fw_cfg_bytes(void *to, u32 len)
{
    for (u32 i = 0; i < len; i++)
        ((u8 *)to)[i] = in8(0x511);
}

u64 fw_cfg_number(u16 key, u32 len)
{
    u64 n = 0;
    fw_cfg_select(key);
    fw_cfg_bytes(&n, len);
    return n;
}
