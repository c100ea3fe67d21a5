/* PCI, and virtio over it: one queue per device, polled or with an MSI-X vector. PCI Local Bus 3.0; virtio 1.2, chapters 2 and 4.1. */
#pragma once
#include "chips.h"

/* --- PCI configuration: bus 0, by mechanism 1 --- */

u32 pci_read(u32 slot, u32 reg);
void pci_write(u32 slot, u32 reg, u32 value);
u16 pci_read16(u32 slot, u32 reg);
u8 pci_read8(u32 slot, u32 reg);
void pci_write16(u32 slot, u32 reg, u16 value);
#define PCI_NONE 32
/* The slot of the device with this ID, or PCI_NONE. */
u32 pci_find(u16 vendor, u16 device);
/* The next capability with this ID behind `after` (0: the first), or 0. */
u32 pci_capability(u32 slot, u8 id, u32 after);
/* The address in a memory BAR. */
u64 pci_bar(u32 slot, u32 bar);
enum { PCI_COMMAND = 4, PCI_STATUS = 6, PCI_BAR0 = 0x10, PCI_INTERRUPT = 0x3c };
enum { COMMAND_IO = 1, COMMAND_MEMORY = 2, COMMAND_MASTER = 4, COMMAND_NO_INTX = 0x400 };

/* --- virtio --- */

#define VIRTIO_BLK 2
#define VIRTIO_RNG 4

struct buffer {
    const void *at;
    u32 len;
    bool device_writes;
};

struct virtio {
    u32 slot;
    volatile u8 *common, *isr, *device;
    volatile u16 *notify;
    u64 features;
    u16 queue_size, used;
    struct __attribute__((packed)) descriptor {
        u64 address;
        u32 len;
        u16 flags, next;
    } * descriptors;
    volatile u16 *available;
    struct __attribute__((packed)) used_ring {
        u16 flags, index;
        struct {
            u32 id, len;
        } ring[];
    } volatile *used_ring;
};

/* Finds a device of this type and sets up queue 0 without interrupts. */
bool virtio_start(struct virtio *v, u16 type);
/* Uses MSI-X vector 0 of the device for the queue: this interrupt vector, to this local APIC. */
bool virtio_msix(struct virtio *v, u32 vector, u32 apic_id);
/* Gives it one chain of buffers. */
void virtio_submit(struct virtio *v, const struct buffer *buffers, u32 count);
/* A chain has come back since the last `virtio_take`. */
bool virtio_done(const struct virtio *v);
/* Its length as the device tells it. */
u32 virtio_take(struct virtio *v);
/* Submits and waits. */
u32 virtio_do(struct virtio *v, const struct buffer *buffers, u32 count);

/* A request to a disk; the status, 0xff if there is none. */
enum { BLK_READ = 0, BLK_WRITE = 1, BLK_FLUSH = 4, BLK_GET_ID = 8 };
u8 blk_request(struct virtio *v, u32 type, u64 sector, void *data, u32 len);
