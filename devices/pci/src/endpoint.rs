//! What every PCI device has: its configuration space, MSI-X and interrupt pin, and their effects on the machine.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use lodger_device_model::{IrqLine, Msi, MsiTarget};
use serde::{Deserialize, Serialize};

use crate::config::{
    BarKind, CAPABILITY_MSIX, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, ConfigSpace, SavedConfig,
};
use crate::decode::Decoder;
use crate::msix::{CONTROL_ENABLE, CONTROL_MASK_ALL, ENTRY_SIZE, Msix, SavedMsix};

/// Where a device has its MSI-X structures.
#[derive(Debug, Clone, Copy)]
pub struct MsixPlace {
    /// How many vectors.
    pub vectors: u16,
    /// The memory BAR in which both lie.
    pub bar: usize,
    /// Offset of the table, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bit array, a multiple of 8.
    pub pending: u32,
}

/// See the module documentation.
pub struct Endpoint {
    // Fixed configuration.
    msix_place: Option<MsixPlace>,
    /// Offset of the MSI-X message control word.
    msix_control: u16,
    // Runtime glue.
    target: Option<Arc<dyn MsiTarget>>,
    attachment: OnceLock<Attachment>,
    // Volatile state.
    state: Mutex<State>,
}

struct Attachment {
    slot: u8,
    decoder: Arc<Decoder>,
    line: IrqLine,
}

struct State {
    config: ConfigSpace,
    msix: Option<Msix>,
    /// The device asserts its interrupt (whether or not the line may show it).
    asserted: bool,
}

/// The volatile state of an [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedEndpoint {
    config: SavedConfig,
    msix: Option<SavedMsix>,
    asserted: bool,
}

impl Endpoint {
    /// A function without MSI-X.
    pub fn new(config: ConfigSpace) -> Endpoint {
        Endpoint {
            msix_place: None,
            msix_control: 0,
            target: None,
            attachment: OnceLock::new(),
            state: Mutex::new(State {
                config,
                msix: None,
                asserted: false,
            }),
        }
    }

    /// A function with MSI-X, whose messages go to `target`; the capability is added to `config`.
    pub fn with_msix(
        mut config: ConfigSpace,
        place: MsixPlace,
        target: Arc<dyn MsiTarget>,
    ) -> Endpoint {
        let MsixPlace {
            vectors,
            bar,
            table,
            pending,
        } = place;
        assert!(
            table % 8 == 0 && pending % 8 == 0,
            "the low bits are the BAR"
        );
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | bar as u32).to_le_bytes());
        body[6..].copy_from_slice(&(pending | bar as u32).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes();
        let at = config.add_capability(CAPABILITY_MSIX, &body, &writable);
        Endpoint {
            msix_place: Some(place),
            msix_control: at + 2,
            target: Some(target),
            attachment: OnceLock::new(),
            state: Mutex::new(State {
                config,
                msix: Some(Msix::new(vectors)),
                asserted: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a bus or interrupt user panicked")
    }

    /// Puts the function on the bus; false if it was on one already.
    pub(crate) fn attach(&self, slot: u8, decoder: Arc<Decoder>, line: IrqLine) -> bool {
        let attachment = Attachment {
            slot,
            decoder,
            line,
        };
        self.attachment.set(attachment).is_ok()
    }

    /// Kind and size of base address register `index`, if there is one.
    pub fn bar(&self, index: usize) -> Option<(BarKind, u64)> {
        self.lock().config.bar(index)
    }

    /// Reads configuration space.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(offset, data);
    }

    /// Writes configuration space, with all its effects.
    pub fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        state.config.write(offset, data);
        let State { config, msix, .. } = &mut *state;
        let control = config.word(self.msix_control);
        let due = msix.as_mut().map(|m| m.set_control(control));
        self.show(&state, IrqLine::set);
        self.send(&state, due.unwrap_or_default());
    }

    /// Lets the machine see the decoded ranges and the level of the interrupt line.
    fn show(&self, state: &State, drive: fn(&IrqLine, bool)) {
        let Some(a) = self.attachment.get() else {
            return;
        };
        for bar in 0..6 {
            a.decoder.set(a.slot, bar, state.config.region(bar));
        }
        drive(&a.line, state.line());
    }

    /// A message is a memory write, so only a bus master sends it.
    fn send(&self, state: &State, messages: impl IntoIterator<Item = Msi>) {
        if let Some(target) = &self.target
            && state.bus_master()
        {
            messages.into_iter().for_each(|m| target.send(m));
        }
    }

    /// Whether the function may access memory by itself.
    pub fn bus_master(&self) -> bool {
        self.lock().bus_master()
    }

    /// Whether the guest uses MSI-X; then the interrupt pin is silent.
    pub fn msix_enabled(&self) -> bool {
        self.lock().msix.as_ref().is_some_and(Msix::enabled)
    }

    /// The event of MSI-X vector `vector` happened. No effect unless MSI-X is enabled.
    pub fn raise(&self, vector: u16) {
        let mut state = self.lock();
        let message = state.msix.as_mut().and_then(|m| m.raise(vector));
        self.send(&state, message);
    }

    /// Asserts or releases the interrupt pin.
    pub fn set_interrupt(&self, asserted: bool) {
        let mut state = self.lock();
        state.asserted = asserted;
        state.config.set_interrupt_status(asserted);
        if let Some(a) = self.attachment.get() {
            a.line.set(state.line());
        }
    }

    /// Answers a read that falls into the MSI-X structures; false if it does not.
    pub(crate) fn msix_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> bool {
        let state = self.lock();
        match (self.msix_part(bar, offset), &state.msix) {
            (Some(Part::Table(at)), Some(m)) => m.read_table(at, data),
            (Some(Part::Pending(at)), Some(m)) => m.read_pending(at, data),
            _ => return false,
        }
        true
    }

    /// As `msix_read`, for a write.
    pub(crate) fn msix_write(&self, bar: usize, offset: u64, data: &[u8]) -> bool {
        let mut state = self.lock();
        let due = match (self.msix_part(bar, offset), &mut state.msix) {
            (Some(Part::Table(at)), Some(m)) => m.write_table(at, data),
            (Some(Part::Pending(_)), Some(_)) => Vec::new(),
            _ => return false,
        };
        self.send(&state, due);
        true
    }

    fn msix_part(&self, bar: usize, offset: u64) -> Option<Part> {
        let p = self.msix_place.filter(|p| p.bar == bar)?;
        let within =
            |start: u32, len: u64| offset.checked_sub(u64::from(start)).filter(|&at| at < len);
        let vectors = u64::from(p.vectors);
        let table = within(p.table, vectors * ENTRY_SIZE).map(Part::Table);
        table.or_else(|| within(p.pending, vectors.div_ceil(64) * 8).map(Part::Pending))
    }

    /// Power-on: the base address registers are unassigned, nothing is enabled.
    pub fn reset(&self) {
        let mut state = self.lock();
        let State {
            config,
            msix,
            asserted,
        } = &mut *state;
        config.reset();
        if let Some(m) = msix {
            m.reset();
        }
        *asserted = false;
        self.show(&state, IrqLine::set);
    }

    /// The volatile state.
    pub fn save(&self) -> SavedEndpoint {
        let state = self.lock();
        let State {
            config,
            msix,
            asserted,
        } = &*state;
        SavedEndpoint {
            config: config.save(),
            msix: msix.as_ref().map(Msix::save),
            asserted: *asserted,
        }
    }

    /// Takes a saved state, or says what is wrong with it and stays as it was. Decodes the ranges, sets the line without an
    /// edge, sends no message.
    pub fn restore(&self, saved: &SavedEndpoint) -> Result<(), &'static str> {
        let mut state = self.lock();
        let mut config = state.config.clone();
        let mut msix = state.msix.clone();
        if !config.restore(&saved.config) {
            return Err("the configuration space is another device's");
        }
        let control = config.word(self.msix_control);
        let fits = match (&mut msix, &saved.msix) {
            (Some(m), Some(s)) => m.restore(s, control),
            (None, None) => true,
            _ => false,
        };
        if !fits {
            return Err("the MSI-X table is another device's");
        }
        config.set_interrupt_status(saved.asserted);
        *state = State {
            config,
            msix,
            asserted: saved.asserted,
        };
        self.show(&state, IrqLine::import);
        Ok(())
    }
}

enum Part {
    Table(u64),
    Pending(u64),
}

impl State {
    fn bus_master(&self) -> bool {
        self.config.command() & COMMAND_BUS_MASTER != 0
    }

    /// The level of the interrupt line.
    fn line(&self) -> bool {
        let silent = self.config.command() & COMMAND_INTX_DISABLE != 0
            || self.msix.as_ref().is_some_and(Msix::enabled);
        self.asserted && !silent
    }
}
