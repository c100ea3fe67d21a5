//! The devices that every PC has: serial port, interrupt controllers, timers, clock, power management, resets.
//!
//! Each chip's registers are a plain type in a file of their own, without locks and without a clock
//! (`uart16550`, `pic8259`, ...); the device that joins them to interrupt lines, timers and buses is in
//! another (`uart`, `pic`, ...). The conventional ports, addresses and interrupt lines are constants beside
//! each device; wiring is the board's business.
//!
//! A device drives its lines while it holds its own lock, so that levels arrive in order. Locks are therefore
//! taken in one direction only: device, then interrupt router, then interrupt controller, then CPU. A sink
//! must not call back into the device that drives it.

mod acpi_pm;
mod acpi_registers;
mod alarm;
mod calendar;
mod debug_ports;
mod fw_cfg;
mod hpet;
mod hpet_registers;
mod i8042;
mod i8042_registers;
mod ioapic;
mod ioapic82093;
mod mc146818;
mod pic;
mod pic8259;
mod pit;
mod pit8254;
mod rate;
mod reset_control;
mod rtc;
mod split;
mod uart;
mod uart16550;

#[cfg(test)]
mod testing;

pub use acpi_pm::{
    AcpiPm, AcpiPmConfig, GPE0_LEN, GPE0_OFFSET, PM_LEN, PM_PORT, PM_TIMER_HZ, PM_TMR_OFFSET,
    PM1A_CNT_OFFSET, PM1A_EVT_OFFSET, S5_SLEEP_TYPE, SCI_IRQ,
};
pub use debug_ports::{
    DEBUG_CONSOLE_PORT, DEBUG_EXIT_LEN, DEBUG_EXIT_PORT, DebugConsole, DebugExit,
    FIRMWARE_CONSOLE_PORT,
};
pub use fw_cfg::{FW_CFG_LEN, FW_CFG_PORT, FwCfg, FwCfgConfig, FwCfgError, fw_cfg_keys};
pub use hpet::{HPET_BASE, HPET_LEN, HPET_PIT_LINE, HPET_RTC_LINE, Hpet, HpetConfig, HpetLines};
pub use i8042::{FAST_A20_PORT, I8042, I8042_COMMAND_PORT, I8042_DATA_PORT, I8042_IRQ};
pub use ioapic::{IOAPIC_BASE, IOAPIC_LEN, IOAPIC_PINS, Ioapic, IoapicConfig};
pub use pic::{PIC_ELCR_PORT, PIC_LEN, PIC_MASTER_PORT, PIC_SLAVE_PORT, Pic};
pub use pit::{PIT_HZ, PIT_IRQ, PIT_LEN, PIT_PORT, PORT_B, Pit};
pub use reset_control::{RESET_CONTROL_PORT, RESET_VALUE, ResetControl};
pub use rtc::{RTC_CENTURY, RTC_IRQ, RTC_LEN, RTC_PORT, Rtc, RtcConfig};
pub use uart::{ByteSink, UART_LEN, UART_PORTS, Uart, UartConfig};
