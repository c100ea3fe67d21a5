/* See virtio.h. */
#include "virtio.h"

static void select_register(u32 slot, u32 reg) { out32(0xcf8, 0x80000000 | slot << 11 | (reg & 0xfc)); }

u32 pci_read(u32 slot, u32 reg)
{
    select_register(slot, reg);
    return in32(0xcfc);
}

void pci_write(u32 slot, u32 reg, u32 value)
{
    select_register(slot, reg);
    out32(0xcfc, value);
}

u16 pci_read16(u32 slot, u32 reg)
{
    select_register(slot, reg);
    return in16(0xcfc + (reg & 2));
}

u8 pci_read8(u32 slot, u32 reg)
{
    select_register(slot, reg);
    return in8(0xcfc + (reg & 3));
}

void pci_write16(u32 slot, u32 reg, u16 value)
{
    select_register(slot, reg);
    out16(0xcfc + (reg & 2), value);
}

u32 pci_find(u16 vendor, u16 device)
{
    for (u32 slot = 0; slot < 32; slot++)
        if (pci_read(slot, 0) == (vendor | (u32)device << 16))
            return slot;
    return PCI_NONE;
}

u32 pci_capability(u32 slot, u8 id, u32 after)
{
    if (!(pci_read16(slot, PCI_STATUS) & 0x10))
        return 0;
    u32 at = pci_read8(slot, after ? after + 1 : 0x34) & 0xfc;
    for (u32 i = 0; at && i < 48; i++) {
        if (pci_read8(slot, at) == id)
            return at;
        at = pci_read8(slot, at + 1) & 0xfc;
    }
    return 0;
}

u64 pci_bar(u32 slot, u32 bar)
{
    u32 low = pci_read(slot, PCI_BAR0 + bar * 4);
    u64 high = (low & 6) == 4 ? pci_read(slot, PCI_BAR0 + bar * 4 + 4) : 0;
    return high << 32 | (low & ~15u);
}

enum { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_ISR = 3, CAP_DEVICE = 4 };
/* Registers of the common structure. */
enum {
    DEVICE_SELECT = 0, DEVICE_FEATURES = 4, DRIVER_SELECT = 8, DRIVER_FEATURES = 12, CONFIG_VECTOR = 16, STATUS = 20, QUEUE_SELECT = 22,
    QUEUE_SIZE = 24, QUEUE_VECTOR = 26, QUEUE_ENABLE = 28, QUEUE_NOTIFY = 30, QUEUE_DESCRIPTORS = 32, QUEUE_AVAILABLE = 40,
    QUEUE_USED = 48,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
#define VERSION_1 (1ull << 32)

static volatile u16 *reg16(volatile u8 *at) { return (volatile u16 *)at; }
static volatile u32 *reg32(volatile u8 *at) { return (volatile u32 *)at; }

static void write64(volatile u8 *at, u64 value)
{
    *reg32(at) = value;
    *reg32(at + 4) = value >> 32;
}

static bool find_structures(struct virtio *v, u32 *multiplier)
{
    volatile u8 *found[5] = {0};
    for (u32 at = 0; (at = pci_capability(v->slot, 9, at));) {
        u8 type = pci_read8(v->slot, at + 3), bar = pci_read8(v->slot, at + 4);
        if (type < CAP_COMMON || type > CAP_DEVICE || found[type])
            continue;
        found[type] = (u8 *)(word)(pci_bar(v->slot, bar) + pci_read(v->slot, at + 8));
        if (type == CAP_NOTIFY)
            *multiplier = pci_read(v->slot, at + 16);
    }
    v->common = found[CAP_COMMON];
    v->isr = found[CAP_ISR];
    v->device = found[CAP_DEVICE];
    v->notify = reg16(found[CAP_NOTIFY]);
    return v->common && v->isr && v->notify;
}

bool virtio_start(struct virtio *v, u16 type)
{
    u32 multiplier = 0;
    v->slot = pci_find(0x1af4, 0x1040 + type);
    if (v->slot == PCI_NONE || !find_structures(v, &multiplier))
        return false;
    pci_write16(v->slot, PCI_COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    volatile u8 *c = v->common;
    c[STATUS] = 0;
    if (!wait_for(c[STATUS] == 0))
        return false;
    c[STATUS] = ACKNOWLEDGE;
    c[STATUS] = ACKNOWLEDGE | DRIVER;
    *reg32(c + DEVICE_SELECT) = 0;
    v->features = *reg32(c + DEVICE_FEATURES);
    *reg32(c + DEVICE_SELECT) = 1;
    v->features |= (u64)*reg32(c + DEVICE_FEATURES) << 32;
    *reg32(c + DRIVER_SELECT) = 0;
    *reg32(c + DRIVER_FEATURES) = 0;
    *reg32(c + DRIVER_SELECT) = 1;
    *reg32(c + DRIVER_FEATURES) = VERSION_1 >> 32;
    c[STATUS] = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    if (!(c[STATUS] & FEATURES_OK))
        return false;
    *reg16(c + QUEUE_SELECT) = 0;
    v->queue_size = *reg16(c + QUEUE_SIZE);
    if (v->queue_size > 16)
        *reg16(c + QUEUE_SIZE) = v->queue_size = 16;
    v->descriptors = allocate(PAGE);
    v->available = allocate(PAGE);
    v->used_ring = allocate(PAGE);
    v->used = 0;
    write64(c + QUEUE_DESCRIPTORS, (word)v->descriptors);
    write64(c + QUEUE_AVAILABLE, (word)v->available);
    write64(c + QUEUE_USED, (word)v->used_ring);
    v->notify = (void *)((word)v->notify + *reg16(c + QUEUE_NOTIFY) * multiplier);
    v->available[0] = 1; /* no interrupts */
    *reg16(c + QUEUE_ENABLE) = 1;
    c[STATUS] = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    return true;
}

bool virtio_msix(struct virtio *v, u32 vector, u32 apic_id)
{
    u32 at = pci_capability(v->slot, 0x11, 0);
    if (!at)
        return false;
    u32 place = pci_read(v->slot, at + 4);
    volatile u32 *entry = (void *)(word)(pci_bar(v->slot, place & 7) + (place & ~7u));
    entry[0] = 0xfee00000 | apic_id << 12;
    entry[1] = 0;
    entry[2] = vector;
    entry[3] = 0;
    pci_write16(v->slot, at + 2, 0x8000);
    *reg16(v->common + QUEUE_SELECT) = 0;
    *reg16(v->common + QUEUE_VECTOR) = 0;
    v->available[0] = 0;
    return *reg16(v->common + QUEUE_VECTOR) == 0;
}

void virtio_submit(struct virtio *v, const struct buffer *buffers, u32 count)
{
    for (u32 i = 0; i < count; i++)
        v->descriptors[i] = (struct descriptor){(word)buffers[i].at, buffers[i].len,
                                                (i + 1 < count ? 1 : 0) | (buffers[i].device_writes ? 2 : 0), i + 1};
    u16 index = v->available[1];
    v->available[2 + index % v->queue_size] = 0;
    barrier();
    v->available[1] = index + 1;
    asm volatile("mfence" ::: "memory");
    *v->notify = 0;
}

bool virtio_done(const struct virtio *v) { return v->used_ring->index != v->used; }

u32 virtio_take(struct virtio *v)
{
    barrier();
    u32 len = v->used_ring->ring[v->used % v->queue_size].len;
    v->used++;
    return len;
}

u32 virtio_do(struct virtio *v, const struct buffer *buffers, u32 count)
{
    virtio_submit(v, buffers, count);
    return wait_for(virtio_done(v)) ? virtio_take(v) : 0;
}

u8 blk_request(struct virtio *v, u32 type, u64 sector, void *data, u32 len)
{
    static struct {
        u32 type, reserved;
        u64 sector;
    } header;
    static volatile u8 status;
    header.type = type;
    header.sector = sector;
    status = 0xff;
    struct buffer chain[] = {
        {&header, sizeof header, false},
        {data, len, type != BLK_WRITE},
        {(void *)&status, 1, true},
    };
    if (!len)
        chain[1] = chain[2];
    virtio_do(v, chain, len ? 3 : 2);
    return status;
}
