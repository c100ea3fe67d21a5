//! The registers of an 8254 programmable interval timer (Intel 8254 data sheet, 1993), without lines.
//!
//! Time is counted in ticks of the timer's input clock and given to every function. A count begins in the
//! tick in which it is written, one tick earlier than in the chip. The gates of channels 0 and 1 are tied
//! high, as on a PC.

/// How many interrupts that the host was too slow for are made up for.
const BACKLOG: u64 = 10;

/// What a counting element does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counting {
    /// Waits for a count or a trigger.
    No,
    /// Since this tick.
    Since(u64),
    /// The gate stopped it after this many ticks.
    Held(u64),
}

/// One counter.
#[derive(Clone)]
struct Channel {
    mode: u8,
    /// 1: low byte only, 2: high byte only, 3: low then high.
    access: u8,
    bcd: bool,
    gate: bool,
    /// The count in use, 1..=65536; 0 before the first.
    count: u32,
    /// The count that was written last.
    written: u32,
    /// `written` is not in use yet.
    null_count: bool,
    counting: Counting,
    /// Modes 2 and 3: the end of the period, at which `written` takes the place of `count`.
    switch_at: Option<u64>,
    low_byte: Option<u8>,
    high_byte_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Channel {
        Channel {
            mode: 3,
            access: 3,
            bcd: false,
            gate,
            count: 0,
            written: 0,
            null_count: true,
            counting: Counting::No,
            switch_at: None,
            low_byte: None,
            high_byte_next: false,
            latched_count: None,
            latched_status: None,
        }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn settle(&mut self, tick: u64) {
        if let Some(at) = self.switch_at.filter(|&at| at <= tick) {
            self.switch_at = None;
            self.start(at);
        }
    }

    /// Begins to count down from what was written.
    fn start(&mut self, tick: u64) {
        self.count = self.written;
        self.null_count = false;
        self.counting = Counting::Since(tick);
    }

    fn elapsed(&self, tick: u64) -> Option<u64> {
        match self.counting {
            Counting::No => None,
            Counting::Since(start) => Some(tick.saturating_sub(start)),
            Counting::Held(elapsed) => Some(elapsed),
        }
    }

    fn out(&self, tick: u64) -> bool {
        let count = u64::from(self.count);
        match (self.mode, self.elapsed(tick)) {
            (0, None) => false,
            (_, None) => true,
            (0 | 1, Some(e)) => e >= count,
            (2, Some(e)) => e % count != count - 1,
            (3, Some(e)) => e % count < count.div_ceil(2),
            (_, Some(e)) => e != count,
        }
    }

    /// What the counting element shows.
    fn value(&self, tick: u64) -> u16 {
        let (count, modulus) = (u64::from(self.count), self.modulus());
        let value = match (self.mode, self.elapsed(tick)) {
            (_, None) => count,
            (2, Some(e)) => count - e % count,
            (3, Some(e)) => {
                let (phase, high) = (e % count, count.div_ceil(2));
                let phase = if phase < high { phase } else { phase - high };
                (count & !1) - 2 * phase
            }
            (_, Some(e)) => modulus - (e % modulus + modulus - count % modulus) % modulus,
        };
        let value = (value % modulus) as u16;
        match self.bcd {
            true => (0..4).fold(0, |bcd, digit| {
                bcd | (value / 10_u16.pow(digit) % 10) << (4 * digit)
            }),
            false => value,
        }
    }

    fn write_control(&mut self, control: u8) {
        let mode = control >> 1 & 7;
        *self = Channel {
            mode: if mode > 5 { mode - 4 } else { mode },
            access: control >> 4 & 3,
            bcd: control & 1 != 0,
            ..Channel::new(self.gate)
        };
    }

    fn latch_count(&mut self, tick: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            self.latched_status = Some(
                u8::from(self.out(tick)) << 7
                    | u8::from(self.null_count) << 6
                    | self.access << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = match self.latched_count {
            Some(count) => count,
            None => self.value(tick),
        }
        .to_le_bytes();
        let (byte, last) = match (self.access, self.high_byte_next) {
            (1, _) => (low, true),
            (2, _) => (high, true),
            (_, false) => (low, false),
            (_, true) => (high, true),
        };
        self.high_byte_next = !last;
        if last {
            self.latched_count = None;
        }
        byte
    }

    /// Returns whether this completed a count.
    fn write(&mut self, byte: u8, tick: u64) -> bool {
        let raw = match (self.access, self.low_byte.take()) {
            (1, _) => u16::from(byte),
            (2, _) => u16::from(byte) << 8,
            (_, None) => {
                self.low_byte = Some(byte);
                if self.mode == 0 {
                    self.counting = Counting::No;
                }
                return false;
            }
            (_, Some(low)) => u16::from_le_bytes([low, byte]),
        };
        self.load(raw, tick);
        true
    }

    fn load(&mut self, raw: u16, tick: u64) {
        let value = match self.bcd {
            // Digits above 9 are undefined; this keeps the count in range.
            true => (0..4).rev().fold(0, |n, digit| {
                (n * 10 + u32::from(raw >> (4 * digit) & 0xf)) % 10_000
            }),
            false => u32::from(raw),
        };
        self.written = match value {
            0 => self.modulus() as u32,
            1 if self.periodic() => 2,
            n => n,
        };
        self.null_count = true;
        match (self.mode, self.counting) {
            (1 | 5, _) => {}
            (2 | 3, Counting::Since(start)) => {
                let count = u64::from(self.count);
                let periods = tick.saturating_sub(start) / count + 1;
                self.switch_at = Some(start.saturating_add(periods.saturating_mul(count)));
            }
            _ if self.gate => self.start(tick),
            (2 | 3, _) => {}
            _ => {
                self.start(tick);
                self.counting = Counting::Held(0);
            }
        }
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        if self.gate == gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate, self.counting) {
            (0 | 4, false, Counting::Since(start)) => {
                self.counting = Counting::Held(tick.saturating_sub(start));
            }
            (0 | 4, true, Counting::Held(elapsed)) => {
                self.counting = Counting::Since(tick.saturating_sub(elapsed));
            }
            (2 | 3, false, _) => {
                self.counting = Counting::No;
                self.switch_at = None;
            }
            (1 | 2 | 3 | 5, true, _) if self.written != 0 => self.start(tick),
            _ => {}
        }
    }

    /// The first tick after `tick` in which OUT goes from low to high.
    fn next_rise(&self, tick: u64) -> Option<u64> {
        let Counting::Since(start) = self.counting else {
            return None;
        };
        let count = u64::from(self.count);
        let rise = match self.mode {
            // The start is a rise itself if the period before it was counted too.
            2 | 3 if tick < start => start,
            2 | 3 => start.saturating_add(((tick - start) / count + 1).saturating_mul(count)),
            0 | 1 => start.saturating_add(count),
            _ => start.saturating_add(count + 1),
        };
        (rise > tick).then_some(rise)
    }

    fn save(&self) -> saved::ChannelV1 {
        let Channel {
            mode,
            access,
            bcd,
            gate,
            count,
            written,
            null_count,
            counting,
            switch_at,
            low_byte,
            high_byte_next,
            latched_count,
            latched_status,
        } = self.clone();
        saved::ChannelV1 {
            mode,
            access,
            bcd,
            gate,
            count,
            written,
            null_count,
            counting: match counting {
                Counting::No => saved::CountingV1::No,
                Counting::Since(start) => saved::CountingV1::Since(start),
                Counting::Held(elapsed) => saved::CountingV1::Held(elapsed),
            },
            switch_at,
            low_byte,
            high_byte_next,
            latched_count,
            latched_status,
        }
    }

    /// Returns `None` for a state that cannot be.
    fn restore(state: saved::ChannelV1) -> Option<Channel> {
        let counting = match state.counting {
            saved::CountingV1::No => Counting::No,
            saved::CountingV1::Since(start) => Counting::Since(start),
            saved::CountingV1::Held(elapsed) => Counting::Held(elapsed),
        };
        let lowest = if matches!(state.mode, 2 | 3) { 2 } else { 1 };
        let idle = counting == Counting::No && state.switch_at.is_none();
        let counts_fit = [state.count, state.written]
            .iter()
            .all(|n| (lowest..=0x1_0000).contains(n) || (idle && *n == 0));
        (state.mode < 6 && state.access < 4 && counts_fit).then_some(Channel {
            mode: state.mode,
            access: state.access,
            bcd: state.bcd,
            gate: state.gate,
            count: state.count,
            written: state.written,
            null_count: state.null_count,
            counting,
            switch_at: state.switch_at,
            low_byte: state.low_byte,
            high_byte_next: state.high_byte_next,
            latched_count: state.latched_count,
            latched_status: state.latched_status,
        })
    }
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) channels: [ChannelV1; 3],
        pub(super) irq: bool,
        pub(super) delivered: u64,
        pub(super) port_b: u8,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct ChannelV1 {
        pub(super) mode: u8,
        pub(super) access: u8,
        pub(super) bcd: bool,
        pub(super) gate: bool,
        pub(super) count: u32,
        pub(super) written: u32,
        pub(super) null_count: bool,
        pub(super) counting: CountingV1,
        pub(super) switch_at: Option<u64>,
        pub(super) low_byte: Option<u8>,
        pub(super) high_byte_next: bool,
        pub(super) latched_count: Option<u16>,
        pub(super) latched_status: Option<u8>,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) enum CountingV1 {
        No,
        Since(u64),
        Held(u64),
    }
}

/// The three channels, and the system control port B (0x61) that gates the third.
pub(crate) struct Pit8254 {
    channels: [Channel; 3],
    /// The level of the interrupt line: channel 0's OUT, but for the short low phases of modes 2 to 5.
    irq: bool,
    /// Rises of channel 0's OUT up to this tick have been delivered.
    delivered: u64,
    /// The bits of port B that a guest writes: gate of channel 2, speaker, parity and channel check enables.
    port_b: u8,
}

impl Pit8254 {
    /// After power-on.
    pub(crate) fn new() -> Pit8254 {
        Pit8254 {
            channels: [true, true, false].map(Channel::new),
            irq: false,
            delivered: 0,
            port_b: 0,
        }
    }

    pub(crate) fn save(&self) -> saved::V1 {
        let Pit8254 {
            channels,
            irq,
            delivered,
            port_b,
        } = self;
        saved::V1 {
            channels: channels.each_ref().map(Channel::save),
            irq: *irq,
            delivered: *delivered,
            port_b: *port_b,
        }
    }

    /// Returns `None` for a state that cannot be.
    pub(crate) fn restore(state: saved::V1) -> Option<Pit8254> {
        let [a, b, c] = state.channels.map(Channel::restore);
        Some(Pit8254 {
            channels: [a?, b?, c?],
            irq: state.irq,
            delivered: state.delivered,
            port_b: state.port_b & 0xf,
        })
    }

    /// Lets the time go on to `tick`; precedes every other call.
    pub(crate) fn catch_up(&mut self, tick: u64) {
        for channel in &mut self.channels {
            channel.settle(tick);
        }
    }

    /// Reads port 0x40 + `port`.
    pub(crate) fn read(&mut self, port: u64, tick: u64) -> u8 {
        match self.channels.get_mut(port as usize) {
            Some(channel) => channel.read(tick),
            // The control word cannot be read: nobody drives the bus.
            None => 0xff,
        }
    }

    /// Writes port 0x40 + `port`.
    pub(crate) fn write(&mut self, port: u64, value: u8, tick: u64) {
        if let Some(channel) = self.channels.get_mut(port as usize) {
            let was_counting = channel.periodic() && channel.counting != Counting::No;
            channel.write(value, tick);
            if port == 0 && !was_counting {
                self.restart_interrupts(tick);
            }
            return;
        }
        let select = value >> 6;
        if select == 3 {
            for (i, channel) in self.channels.iter_mut().enumerate() {
                if value & 2 << i == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch_count(tick);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(tick);
                }
            }
        } else if value & 0x30 == 0 {
            self.channels[usize::from(select)].latch_count(tick);
        } else {
            self.channels[usize::from(select)].write_control(value);
            if select == 0 {
                self.restart_interrupts(tick);
            }
        }
    }

    /// Reads port B; `refresh` is the state of the refresh toggle.
    pub(crate) fn read_port_b(&self, tick: u64, refresh: bool) -> u8 {
        self.port_b | u8::from(refresh) << 4 | u8::from(self.channels[2].out(tick)) << 5
    }

    /// Writes port B.
    pub(crate) fn write_port_b(&mut self, value: u8, tick: u64) {
        self.port_b = value & 0xf;
        self.channels[2].set_gate(value & 1 != 0, tick);
    }

    /// The level of the interrupt line.
    pub(crate) fn irq(&self) -> bool {
        self.irq
    }

    /// Whether OUT of channel 0 has risen and that has not been told yet. Rises that are too far in the past
    /// are dropped.
    pub(crate) fn take_rise(&mut self, tick: u64) -> bool {
        let channel = &self.channels[0];
        if channel.periodic() {
            let oldest = tick.saturating_sub(u64::from(channel.count).saturating_mul(BACKLOG));
            self.delivered = self.delivered.max(oldest);
        }
        match channel.next_rise(self.delivered) {
            Some(rise) if rise <= tick => {
                self.delivered = rise;
                self.irq = true;
                true
            }
            _ => false,
        }
    }

    /// In which tick OUT of channel 0 rises next, which may have been long ago.
    pub(crate) fn next_rise(&self) -> Option<u64> {
        self.channels[0].next_rise(self.delivered)
    }

    /// Channel 0 was programmed: what went before does not count.
    fn restart_interrupts(&mut self, tick: u64) {
        self.delivered = tick;
        self.irq = self.channels[0].out(tick);
    }
}
