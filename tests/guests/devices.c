/* The board's devices as a driver finds them: PCI, virtio by polling, by MSI-X and by pin, firmware configuration, CMOS memory, the
   serial port, the keyboard controller. */
#include "virtio.h"

static volatile u32 interrupts;
static void apic_handler(struct frame *f)
{
    (void)f;
    interrupts++;
    apic_eoi();
}

/* --- PCI --- */

static void pci(void)
{
    check("PCI: the address register", (out32(0xcf8, 0x80000004), in32(0xcf8)), 0x80000004);
    u32 bridge = pci_read(0, 8) >> 16;
    check("PCI: a host bridge at 0:0.0", bridge, 0x0600);
    u32 devices = 0, empty = 0;
    const u64 ecam = acpi()->ecam;
    for (u32 slot = 0; slot < 32; slot++) {
        u32 id = pci_read(slot, 0);
        if (ecam)
            check_quietly("PCI: ECAM tells the same", *(volatile u32 *)(ecam + (slot << 15)), id);
        if (id == 0xffffffff) {
            empty++;
            check_quietly("PCI: nobody answers", pci_read(slot, 0x3c), 0xffffffff);
            continue;
        }
        devices++;
        say("PCI 0:%x: %x:%x class %x\n", (u64)slot, (u64)(id & 0xffff), (u64)(id >> 16), (u64)(pci_read(slot, 8) >> 8));
        if (pci_read8(slot, 0x0e) & 0x7f)
            continue;
        for (u32 bar = 0; bar < 6; bar++) {
            u32 reg = PCI_BAR0 + bar * 4, old = pci_read(slot, reg);
            u16 command = pci_read16(slot, PCI_COMMAND);
            pci_write16(slot, PCI_COMMAND, 0);
            pci_write(slot, reg, 0xffffffff);
            u32 mask = pci_read(slot, reg);
            pci_write(slot, reg, old);
            pci_write16(slot, PCI_COMMAND, command);
            if (!mask)
                continue;
            u32 size = -(mask & (mask & 1 ? ~3u : ~15u));
            check_quietly("PCI: a BAR's size is a power of two", size & (size - 1), 0);
            check_quietly("PCI: its address is aligned", old & (mask & 1 ? ~3u : ~15u) & (size - 1), 0);
            check_quietly("PCI: it is as before", pci_read(slot, reg), old);
            if ((mask & 7) == 4)
                bar++;
        }
    }
    check_true("PCI: devices", devices >= 2 && empty > 0);
    check_true("PCI: ECAM", ecam != 0);
    /* Accesses to parts of a register. */
    check("PCI: bytes and words of a register",
          pci_read8(0, 0) | pci_read8(0, 1) << 8 | (u32)pci_read16(0, 2) << 16, pci_read(0, 0));
    out32(0xcf8, 0);
    check("PCI: disabled", in32(0xcfc), 0xffffffff);
}

/* --- virtio --- */

/* The host fills what is asked for with 0xa5 under the test's machine, at random elsewhere. */
static void rng(void)
{
    struct virtio v;
    if (!check_true("virtio-rng: there, and takes its features", virtio_start(&v, VIRTIO_RNG)))
        return;
    u8 *bytes = allocate(PAGE);
    struct buffer buffer = {bytes, 64, true};
    u32 len = virtio_do(&v, &buffer, 1);
    check_true("virtio-rng: polled", len > 0 && len <= 64);
    u32 set = 0;
    for (u32 i = 0; i < len; i++)
        set |= bytes[i];
    check_true("virtio-rng: bytes", set);
    check("virtio-rng: none beyond", bytes[64], 0);

    interrupts = 0;
    on(0x70, apic_handler);
    check_true("virtio-rng: MSI-X", virtio_msix(&v, 0x70, apic_id()));
    virtio_submit(&v, &buffer, 1);
    enable_interrupts();
    bool came = wait_for(interrupts);
    disable_interrupts();
    check_true("virtio-rng: its message interrupts", came && virtio_done(&v));
    virtio_take(&v);
    /* Masked in the table: the message waits in the pending bits. */
    u32 at = pci_capability(v.slot, 0x11, 0);
    u32 place = pci_read(v.slot, at + 4), pending = pci_read(v.slot, at + 8);
    volatile u32 *entry = (void *)(word)(pci_bar(v.slot, place & 7) + (place & ~7u));
    volatile u32 *bits = (void *)(word)(pci_bar(v.slot, pending & 7) + (pending & ~7u));
    entry[3] = 1;
    interrupts = 0;
    virtio_do(&v, &buffer, 1);
    check("MSI-X: a masked message is pending", wait_for(*bits & 1), 1);
    let_in();
    check("MSI-X: and does not come", interrupts, 0);
    entry[3] = 0;
    enable_interrupts();
    came = wait_for(interrupts);
    disable_interrupts();
    check("MSI-X: until it is unmasked", came, 1);
    check("MSI-X: pending no longer", *bits & 1, 0);
    interrupts = 0;
    v.available[0] = 1;
    virtio_do(&v, &buffer, 1);
    let_in();
    check("virtio-rng: the driver wants no interrupts", interrupts, 0);
    v.available[0] = 0;

    /* The pin, through the 8259s. */
    pci_write16(v.slot, at + 2, 0);
    pic_init();
    apic_write(APIC_LINT0, 0x700);
    u8 irq = pci_read8(v.slot, PCI_INTERRUPT);
    if (!check_true("virtio-rng: an interrupt line", irq > 2 && irq < 16))
        return;
    pic_allow(1 << irq);
    *v.isr;
    virtio_do(&v, &buffer, 1);
    check("virtio-rng: its pin requests", wait_for(pic_irr() >> irq & 1), 1);
    check("PCI: the status register shows it", pci_read16(v.slot, PCI_STATUS) >> 3 & 1, 1);
    pci_write16(v.slot, PCI_COMMAND, COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX);
    check("PCI: the pin is disabled", pic_irr() >> irq & 1, 0);
    pci_write16(v.slot, PCI_COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    check("PCI: and enabled", pic_irr() >> irq & 1, 1);
    check("virtio-rng: ISR tells why", *v.isr & 1, 1);
    check("virtio-rng: and is clear then", *v.isr & 1, 0);
    check("virtio-rng: the pin is quiet again", pic_irr() >> irq & 1, 0);
    /* Not a bus master: the device does nothing. */
    pci_write16(v.slot, PCI_COMMAND, COMMAND_MEMORY);
    virtio_submit(&v, &buffer, 1);
    delay_us(3000);
    check("PCI: without bus mastering there is no DMA", virtio_done(&v), 0);
    pci_write16(v.slot, PCI_COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    v.common[20] = 0;
    pic_allow(0);
    apic_write(APIC_LINT0, LVT_MASKED);
}

/* Sector n of the disk begins with its number; the host looks at what is written to sector 5. */
static void blk(void)
{
    struct virtio v;
    if (!virtio_start(&v, VIRTIO_BLK)) {
        check("virtio-blk: a disk", has_option("disk"), 0);
        return;
    }
    u64 sectors = *(volatile u64 *)v.device;
    u8 *data = allocate(PAGE);
    check("virtio-blk: capacity in sectors", sectors, 2048);
    check("virtio-blk: a read", blk_request(&v, BLK_READ, 3, data, 1024), 0);
    check("virtio-blk: of sectors 3 and 4", *(u32 *)data << 8 | *(u32 *)(data + 512), 0x304);
    memset(data, 0x5a, 512);
    check("virtio-blk: a write", blk_request(&v, BLK_WRITE, 5, data, 512), 0);
    check("virtio-blk: a flush", blk_request(&v, BLK_FLUSH, 0, NULL, 0), 0);
    memset(data, 0, 512);
    check("virtio-blk: read back", blk_request(&v, BLK_READ, 5, data, 512) << 8 | data[511], 0x5a);
    check("virtio-blk: beyond the end", blk_request(&v, BLK_READ, sectors, data, 512), 1);
    check("virtio-blk: across the end", blk_request(&v, BLK_READ, sectors - 1, data, 1024), 1);
    check("virtio-blk: an unknown request", blk_request(&v, 0x777, 0, data, 512), 2);
    check("virtio-blk: its ID", blk_request(&v, BLK_GET_ID, 0, data, 20), 0);
    check("virtio-blk: is what the host set", memcmp(data, "guest-test", 11), 0);
    interrupts = 0;
    on(0x71, apic_handler);
    virtio_msix(&v, 0x71, apic_id());
    enable_interrupts();
    u8 status = blk_request(&v, BLK_READ, 2047, data, 512);
    wait_for(interrupts);
    disable_interrupts();
    check("virtio-blk: the last sector, with an interrupt", status << 16 | interrupts << 12 | *(u16 *)data, 0x17ff);
    v.common[20] = 0;
}

/* --- firmware configuration and CMOS --- */

static void configuration(void)
{
    char signature[4];
    fw_cfg_select(FW_CFG_SIGNATURE);
    fw_cfg_bytes(signature, 4);
    check("fw_cfg: signature", memcmp(signature, "QEMU", 4), 0);
    check("fw_cfg: traditional interface", fw_cfg_number(1, 4) & 1, 1);
    u64 ram = fw_cfg_number(FW_CFG_RAM_SIZE, 8);
    check("fw_cfg: 256 MiB of RAM", ram, 256 << 20);
    check("fw_cfg: as many CPUs as ACPI tells", fw_cfg_number(FW_CFG_CPUS, 2), acpi()->processors);
    fw_cfg_select(FW_CFG_FILES);
    u8 count[4];
    fw_cfg_bytes(count, 4);
    u32 files = count[3] | count[2] << 8, tables = 0;
    for (u32 i = 0; i < files && i < 64; i++) {
        struct {
            u8 size[4], key[2], reserved[2];
            char name[56];
        } file;
        fw_cfg_bytes(&file, sizeof file);
        tables += !memcmp(file.name, "etc/acpi/tables", 16) || !memcmp(file.name, "etc/acpi/rsdp", 14);
    }
    check("fw_cfg: ACPI's files", tables, 2);
    check("fw_cfg: an unknown key reads as 0", fw_cfg_number(0x7fff, 4), 0);
    fw_cfg_select(FW_CFG_SIGNATURE);
    fw_cfg_bytes(signature, 4);
    u8 beyond;
    fw_cfg_bytes(&beyond, 1);
    check("fw_cfg: so does what is beyond the end", beyond, 0);

    check("CMOS: memory below 1 MiB in KiB", cmos_read(0x15) | cmos_read(0x16) << 8, 640);
    u32 above_16m = cmos_read(0x34) | cmos_read(0x35) << 8;
    check("CMOS: memory above 16 MiB in 64 KiB", above_16m, (ram >> 16) - 256);
    u8 old = cmos_read(0x72);
    cmos_write(0x72, ~old);
    check("CMOS: memory", cmos_read(0x72), (u8)~old);
    cmos_write(0x72, old);
    check("CMOS: the battery is good", cmos_read(0x0d) & 0x80, 0x80);
}

/* --- serial port, keyboard controller --- */

static void serial_and_keyboard(void)
{
    const u16 uart = 0x3f8;
    while (!(in8(uart + 5) & 0x40))
        ;
    out8(uart + 2, 0);
    out8(uart + 4, 0x1f);
    out8(uart, 0x42);
    bool ready = wait_for(in8(uart + 5) & 1);
    u8 echo = in8(uart);
    u8 status = in8(uart + 6) >> 4;
    out8(uart + 4, 0x0b);
    out8(uart + 2, 1);
    check("UART: loops back", ready << 8 | echo, 0x142);
    check("UART: modem lines loop back", status, 0xf);
    out8(uart + 7, 0xa6);
    check("UART: scratch register", in8(uart + 7), 0xa6);
    u8 lcr = in8(uart + 3);
    out8(uart + 3, lcr | 0x80);
    out8(uart, 12);
    out8(uart + 1, 0);
    u8 divisor = in8(uart);
    out8(uart, 1);
    out8(uart + 3, lcr);
    check("UART: divisor latch", divisor, 12);

    while (in8(0x64) & 1)
        in8(0x60);
    out8(0x64, 0xaa);
    check("8042: self test", wait_for(in8(0x64) & 1) << 8 | in8(0x60), 0x155);
}

/* --- port 0x92 --- */

static u8 output_port(void)
{
    wait_for(!(in8(0x64) & 2));
    out8(0x64, 0xd0);
    wait_for(in8(0x64) & 1);
    return in8(0x60);
}

static void port_92(void)
{
    check("port 0x92: A20 is on, and no reset", in8(0x92) & 3, 2);
    check("8042: its output port says so", output_port() & 3, 3);
    /* This code runs at an odd MiB, so where the gate works it must stay open. */
    if (under_tcg())
        return;
    out8(0x92, 0);
    check("port 0x92: A20 is off", in8(0x92) & 2, 0);
    check("8042: its output port too", output_port() & 3, 1);
    volatile u32 *low = (u32 *)0x600, *high = (u32 *)0x100600;
    u32 old = *high;
    *low = ~old;
    check("the gate is open all the same", *high, old);
    wait_for(!(in8(0x64) & 2));
    out8(0x64, 0xdf);
    check("8042: switches it on", in8(0x92) & 2, 2);
    wait_for(!(in8(0x64) & 2));
    out8(0x64, 0xd1);
    wait_for(!(in8(0x64) & 2));
    out8(0x60, 0xdd);
    check("8042: and off by the output port", in8(0x92) & 2, 0);
    out8(0x92, 2);
    check("port 0x92: on again", output_port() & 2, 2);
}

void run(void)
{
    apic_enable();
    pci();
    rng();
    blk();
    configuration();
    serial_and_keyboard();
    port_92();
}
